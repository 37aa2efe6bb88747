"""MaskContrast's losses against the published implementation, their formulae, and results derived by hand."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfgu.baselines.maskcontrast import (
    EmbeddingNetwork,
    PrototypeQueue,
    balanced_cross_entropy,
    contrastive_loss,
    enet_class_weights,
    object_prototypes,
    update_momentum_encoder,
)

Reference = Callable[[str], dict[str, np.ndarray]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks(*shape: int, seed: int = 0) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5).long()


# ---- contrastive loss ----


def test_contrastive_loss_agrees_with_the_published_one(reference: Reference) -> None:
    arrays = {name: torch.from_numpy(np.asarray(array)) for name, array in reference("maskcontrast").items()}
    query, key = arrays["query"].requires_grad_(), arrays["key"].requires_grad_()
    found = contrastive_loss(
        query,
        key,
        arrays["saliency_query"],
        arrays["saliency_key"],
        arrays["queue_before"],
        temperature=arrays["temperature"].item(),
    )
    np.testing.assert_allclose(found.logits.detach(), arrays["logits"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.targets, arrays["targets"])
    np.testing.assert_allclose(found.class_weights, arrays["class_weights"], rtol=1e-4)
    np.testing.assert_allclose(found.loss.item(), arrays["contrastive_loss"], rtol=1e-5)
    (gradient,) = torch.autograd.grad(found.loss, query, retain_graph=True)
    np.testing.assert_allclose(gradient, arrays["grad_query"], rtol=1e-4, atol=1e-7)
    assert not found.prototypes.requires_grad  # nor has the key any other way to the loss

    queue = PrototypeQueue(8, 12)
    queue.columns.copy_(arrays["queue_before"])
    queue.push(found.prototypes)
    np.testing.assert_allclose(queue.columns, arrays["queue_after"], rtol=1e-4, atol=1e-6)


def test_contrastive_loss_by_hand() -> None:
    """Two orthogonal one-pixel objects, each equal to its key, and a queue that contains the second one."""
    query = torch.tensor([[2.0, 0.0], [0.0, 3.0]])[..., None, None]
    ones, queue = torch.ones(2, 1, 1), torch.tensor([[0.0], [1.0]])
    found = contrastive_loss(query, 5 * query, ones, ones, queue, temperature=0.5)
    assert found.targets.tolist() == [0, 1]
    torch.testing.assert_close(found.logits, torch.tensor([[2.0, 0, 0], [0, 2, 2]]))
    first = math.log(1 + 2 * math.exp(-2))
    second = math.log(2 + math.exp(-2))
    assert found.loss.item() == pytest.approx((first + second) / 2)  # both classes weigh as much
    assert found.class_weights.tolist() == pytest.approx([1 / math.log(1.52)] * 2 + [1 / math.log(1.02)])


def test_is_its_formula_with_views_of_other_sizes() -> None:
    query, key = normal(3, 6, 5, 4), normal(3, 6, 3, 7, seed=1)
    query_mask, key_mask, queue = masks(3, 5, 4), masks(3, 3, 7), F.normalize(normal(6, 9, seed=2), dim=0)
    found = contrastive_loss(query, key, query_mask, key_mask, queue, temperature=0.2)
    losses, weights, total = [], [], int(query_mask.sum())
    means = [F.normalize(key[b], dim=0)[:, key_mask[b] > 0].mean(1) for b in range(3)]
    columns = torch.cat([F.normalize(torch.stack(means), dim=1), queue.mT])
    for b in range(3):
        for pixel in F.normalize(query[b], dim=0)[:, query_mask[b] > 0].mT:
            losses.append(-(columns @ pixel / 0.2).log_softmax(0)[b].item())
            weights.append(1 / math.log(1.02 + int(query_mask[b].sum()) / total))
    assert found.loss.item() == pytest.approx(np.average(losses, weights=weights), rel=1e-5)


def test_an_image_without_an_object_has_no_pixel_and_a_prototype_of_zeros() -> None:
    query, key, mask = normal(3, 4, 5, 5), normal(3, 4, 5, 5, seed=1), masks(3, 5, 5)
    mask[1] = 0
    queue = F.normalize(normal(4, 6), dim=0)
    found = contrastive_loss(query.requires_grad_(), key, mask, mask, queue)
    assert set(found.targets.tolist()) == {0, 2}
    assert not found.prototypes[1].any()
    assert found.class_weights[1].item() == pytest.approx(1 / math.log(1.02))
    (gradient,) = torch.autograd.grad(found.loss, query)
    assert gradient.isfinite().all()
    assert not gradient[1].any()


def test_no_object_at_all_has_no_loss() -> None:
    query = normal(2, 4, 3, 3).requires_grad_()
    empty = torch.zeros(2, 3, 3, dtype=torch.bool)
    found = contrastive_loss(query, normal(2, 4, 3, 3), empty, empty, normal(4, 5))
    assert found.logits.shape == (0, 7)
    assert found.loss.item() == 0
    assert not torch.autograd.grad(found.loss, query)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_in_single(dtype: torch.dtype) -> None:
    query, key, mask = normal(2, 4, 6, 6).to(dtype), normal(2, 4, 6, 6, seed=1).to(dtype), masks(2, 6, 6)
    queue = F.normalize(normal(4, 5), dim=0)
    loss = contrastive_loss(query, key, mask, mask.bool(), queue).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, contrastive_loss(query.float(), key.float(), mask, mask, queue).loss)


def test_the_length_of_an_embedding_does_not_matter() -> None:
    query, key, mask, queue = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1), masks(2, 3, 3), normal(4, 5)
    scale = 0.1 + torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    plain = contrastive_loss(query, key, mask, mask, queue).loss
    torch.testing.assert_close(contrastive_loss(query * scale, key * scale, mask, mask, queue).loss, plain)


def test_a_prototype_is_the_direction_of_the_mean() -> None:
    embeddings = torch.tensor([[3.0, 0.0, 7.0], [0.0, 0.1, 7.0]])[None, :, None]  # (1, 2, 1, 3)
    found = object_prototypes(embeddings, torch.tensor([[[1, 1, 0]]]))
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5]]))


def test_a_rare_class_weighs_up_to_fifty() -> None:
    found = enet_class_weights(torch.tensor([0.0, 1.0]))
    assert found.tolist() == pytest.approx([50.4984, 1.4222], rel=1e-4)


# ---- saliency ----


def test_balanced_cross_entropy_agrees_with_the_published_one(reference: Reference) -> None:
    arrays = {name: torch.from_numpy(np.asarray(array)) for name, array in reference("maskcontrast").items()}
    logits = arrays["query_saliency_logits"].requires_grad_()
    loss = balanced_cross_entropy(logits, arrays["saliency_query"])
    np.testing.assert_allclose(loss.item(), arrays["saliency_loss"], rtol=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    np.testing.assert_allclose(gradient, arrays["grad_saliency_logits"], rtol=1e-4, atol=1e-8)


def test_balanced_cross_entropy_by_hand() -> None:
    """One object pixel of four: its weight is 3/4, that of the others 1/4; at logit 0 each loses log 2."""
    labels = torch.tensor([[1, 0, 0, 0]])
    assert balanced_cross_entropy(torch.zeros(1, 4), labels).item() == pytest.approx(1.5 * math.log(2) / 4)
    sure = torch.tensor([[math.log(3), 0.0, 0.0, 0.0]])
    expected = (0.75 * math.log(4 / 3) + 0.75 * math.log(2)) / 4
    assert balanced_cross_entropy(sure, labels).item() == pytest.approx(expected)


@pytest.mark.parametrize("label", [0, 1])
def test_one_kind_of_pixel_alone_has_no_saliency_loss(label: int) -> None:
    logits = normal(2, 3, 3).requires_grad_()
    loss = balanced_cross_entropy(logits, torch.full((2, 3, 3), label))
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[-1e4, 1e4]], dtype=torch.float16)
    loss = balanced_cross_entropy(logits, torch.tensor([[True, False]]))
    assert loss.item() == pytest.approx(0.5 * 1e4, rel=1e-3)


# ---- queue and momentum encoder ----


def test_the_queue_forgets_the_oldest_and_skips_what_is_no_prototype() -> None:
    queue = PrototypeQueue(2, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(queue.columns.norm(dim=0), torch.ones(3))
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    queue.push(rows)
    assert queue.columns[:, :2].mT.tolist() == [[1, 0], [0, 1]]
    queue.push(torch.tensor([[0.6, 0.8], [0.8, 0.6]]))
    torch.testing.assert_close(queue.columns.mT, torch.tensor([[0.8, 0.6], [0.0, 1.0], [0.6, 0.8]]))
    assert queue.position.item() == 1


def test_of_more_than_a_queue_holds_the_last_are_kept() -> None:
    queue = PrototypeQueue(1, 2)
    queue.push(torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]))
    assert queue.columns.tolist() == [[5, 4]]
    assert queue.position.item() == 1


def test_a_queue_goes_on_from_its_state() -> None:
    queue, other = PrototypeQueue(4, 5), PrototypeQueue(4, 5)
    queue.push(normal(3, 4))
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.push(normal(4, 4, seed=1))
    assert torch.equal(queue.columns, other.columns)


def test_the_momentum_encoder_moves_a_part_of_the_way_and_keeps_its_statistics() -> None:
    slow, fast = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(fast.weight, 5)
    fast(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))  # changes its statistics
    update_momentum_encoder(slow, fast, 0.75)
    assert slow.weight.tolist() == [0.75 * 1 + 0.25 * 5] * 2
    assert [float(x) for x in slow.state_dict()["running_mean"]] == [0, 0]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        update_momentum_encoder(slow, nn.PReLU(2))


def test_the_network_gives_embeddings_and_saliency_at_the_images_size() -> None:
    network = EmbeddingNetwork("resnet18", "random", width=6)
    embeddings, saliency = network(normal(2, 3, 48, 40))
    assert embeddings.shape == (2, 6, 48, 40)
    assert saliency.shape == (2, 48, 40)
    assert network.backbone(normal(1, 3, 64, 64))[0].shape == (1, 512, 8, 8)  # an eighth of the side
    keys = copy.deepcopy(network)
    mask = masks(2, 48, 40)
    found = contrastive_loss(embeddings, keys(normal(2, 3, 48, 40, seed=1))[0], mask, mask, normal(6, 8))
    (found.loss + balanced_cross_entropy(saliency, mask)).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert all(p.grad is None for p in keys.parameters())


def test_wrong_arguments_are_refused() -> None:
    query, mask, queue = normal(2, 4, 3, 3), masks(2, 3, 3), normal(4, 5)
    with pytest.raises(ValueError, match="the views differ"):
        contrastive_loss(query, query[:, :3], mask, mask, queue)
    with pytest.raises(ValueError, match=r"key_mask must be \(2, 3, 3\), one for each pixel, not \(2, 3, 2\)"):
        contrastive_loss(query, query, mask, mask[..., :2], queue)
    with pytest.raises(ValueError, match="a queue of 3 channels can't be compared with embeddings of 4"):
        contrastive_loss(query, query, mask, mask, queue[:3])
    with pytest.raises(ValueError, match="the temperature must be more than 0, not 0"):
        contrastive_loss(query, query, mask, mask, queue, temperature=0)
    with pytest.raises(ValueError, match="need labels of the same shape"):
        balanced_cross_entropy(query[:, 0], mask[:1])
    with pytest.raises(ValueError, match="a queue must hold 1 prototype or more, not 0"):
        PrototypeQueue(4, 0)
