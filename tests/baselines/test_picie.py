"""PiCIE's steps against the published implementation, its formulae, and results derived by hand."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.refusals import refused
from transfgu.baselines.picie import (
    FeatureNetwork,
    FPNDecoder,
    MiniBatchKMeans,
    Transforms,
    assign,
    clustering_loss,
    draw_transforms,
    head_balance,
    make_views,
    transform,
)

Reference = Callable[[str], dict[str, np.ndarray]]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rows_of(features: Tensor) -> Tensor:
    return features.movedim(1, 3).flatten(0, 2)


# ---- assignment ----


@pytest.mark.parametrize("view", [1, 2])
def test_assignment_agrees_with_the_published_one(reference: Reference, view: int) -> None:
    arrays = reference("picie")
    labels, weights = assign(*(torch.from_numpy(arrays[f"assign/{name}_{view}"]) for name in ("features", "centroids")))
    np.testing.assert_array_equal(labels, arrays[f"assign/labels_{view}"])
    np.testing.assert_allclose(weights, arrays[f"assign/class_weights_{view}"], rtol=1e-6)


def test_assignment_by_hand() -> None:
    """Normalised first, then Euclidean: (3, 0) becomes (1, 0), which is nearer to (0.5, 0) than to (3, 0)."""
    features = torch.tensor([[3.0, 0.0], [0.0, 0.1]]).mT[None, :, None]  # (1, 2, 1, 2): pixels (3, 0) and (0, 0.1)
    centroids = torch.tensor([[3.0, 0.0], [0.5, 0.0], [0.0, 1.0], [0.0, -1.0]])
    labels, weights = assign(features, centroids)
    assert labels.tolist() == [[[1, 2]]]
    assert weights.tolist() == [0, 0.5, 0.5, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_assignment_is_the_nearest_in_any_precision(dtype: torch.dtype) -> None:
    features, centroids = normal(3, 8, 4, 5, dtype=dtype), normal(6, 8, seed=1, dtype=torch.float64)
    labels, weights = assign(features, centroids, chunk_rows=7)
    distances = torch.cdist(F.normalize(rows_of(features).double(), dim=1), centroids)
    assert torch.equal(labels.flatten(), distances.argmin(1))
    assert weights.sum().item() == pytest.approx(1)


# ---- loss ----


def test_loss_agrees_with_the_published_one(reference: Reference) -> None:
    arrays = {name: torch.from_numpy(np.asarray(array)) for name, array in reference("picie").items()}
    features = [arrays[f"assign/features_{view}"].requires_grad_() for view in (1, 2)]
    given = [arrays[f"assign/{name}_{v}"] for name in ("labels", "centroids", "class_weights") for v in (1, 2)]
    loss = clustering_loss(*features, *given)
    for name in ("total", "within", "across"):
        np.testing.assert_allclose(getattr(loss, name).item(), arrays[f"loss/{name}"], rtol=1e-5)
    for view, gradient in enumerate(torch.autograd.grad(loss.total, features), 1):
        np.testing.assert_allclose(gradient, arrays[f"loss/grad_{view}"], rtol=1e-4, atol=1e-8)


def test_loss_by_hand() -> None:
    """One pixel per view, orthogonal; each belongs to its own centroid only."""
    first, second = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 5.0]).view(1, 2, 1, 1)
    zero, one = (torch.full((1, 1, 1), label) for label in (0, 1))
    centroids, weights = torch.eye(2), torch.tensor([0.3, 0.7])
    loss = clustering_loss(first, second, zero, one, centroids, centroids, weights, weights)
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.e)
    assert loss.within.item() == pytest.approx(right)
    assert loss.across.item() == pytest.approx(wrong)
    assert loss.total.item() == pytest.approx((right + wrong) / 2)


def test_a_pixel_counts_as_its_class_weighs() -> None:
    """Two pixels of the same feature, labelled 0 (weight 0.8) and 1 (weight 0.2)."""
    features = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    labels, centroids, weights = torch.tensor([[[0, 1]]]), torch.eye(2), torch.tensor([0.8, 0.2])
    loss = clustering_loss(features, features, labels, labels, centroids, centroids, weights, weights)
    expected = 0.8 * math.log(1 + math.exp(-1)) + 0.2 * math.log(1 + math.e)
    assert loss.total.item() == pytest.approx(expected)


def test_views_may_have_other_numbers_of_clusters() -> None:
    features = normal(2, 4, 3, 3)
    few, many = normal(3, 4, seed=1), normal(5, 4, seed=2)
    (labels_1, weights_1), (labels_2, weights_2) = assign(features, few), assign(features, many)
    loss = clustering_loss(features, features, labels_1, labels_2, few, many, weights_1, weights_2)
    assert loss.within.item() == pytest.approx(loss.across.item())  # the same features stand for both views


def test_a_cluster_without_pixels_changes_nothing_but_the_softmax() -> None:
    features, labels = normal(1, 4, 3, 3), torch.zeros(1, 3, 3, dtype=torch.int64)
    centroids, weights = normal(3, 4, seed=1), torch.tensor([1.0, 0.0, 0.0])
    loss = clustering_loss(features, features, labels, labels, centroids, centroids, weights, weights)
    logits = F.normalize(features, dim=1).movedim(1, 3) @ centroids.mT
    assert loss.total.item() == pytest.approx(-logits.log_softmax(3)[..., 0].mean().item())


def test_no_pixel_of_any_weight_has_no_loss() -> None:
    features = normal(1, 4, 2, 2).requires_grad_()
    labels, centroids, weights = torch.zeros(1, 2, 2, dtype=torch.int64), normal(2, 4), torch.tensor([0.0, 1.0])
    loss = clustering_loss(features, features, labels, labels, centroids, centroids, weights, weights)
    assert loss.total.item() == 0
    assert not torch.autograd.grad(loss.total, features)[0].any()


def test_half_precision_is_taken_in_single() -> None:
    features, centroids = normal(2, 8, 4, 4).bfloat16().requires_grad_(), normal(5, 8, seed=1)
    labels, weights = assign(features, centroids)
    given = (labels, labels, centroids, centroids, weights, weights)
    loss = clustering_loss(features, features, *given).total
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, clustering_loss(features.float(), features.float(), *given).total)
    assert torch.autograd.grad(loss, features)[0].isfinite().all()


def test_balance_of_the_heads_is_the_same_at_chance() -> None:
    main, auxiliary = head_balance(27, 100)
    assert main + auxiliary == pytest.approx(1)
    assert main * math.log(27) == pytest.approx(auxiliary * math.log(100))
    assert main == pytest.approx(0.5829, abs=1e-4)
    assert head_balance(8, 8) == (0.5, 0.5)
    with pytest.raises(ValueError, match="1 and 100 clusters can't be balanced"):
        head_balance(1, 100)


# ---- network ----


def pyramid(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {n.removeprefix("fpn/weights/"): torch.from_numpy(a) for n, a in arrays.items() if "/weights/" in n}


@pytest.mark.parametrize("prefix", ["", "module.decoder."])
def test_decoder_agrees_with_the_published_one(reference: Reference, prefix: str) -> None:
    arrays = reference("picie")
    weights = {prefix + name: tensor for name, tensor in pyramid(arrays).items()}
    if prefix:
        weights["module.backbone.layer1.0.conv1.weight"] = torch.zeros(1)
    decoder = FPNDecoder.from_state_dict(weights)
    joined = decoder(*(torch.from_numpy(arrays[f"fpn/res{stage}"]) for stage in (2, 3, 4, 5)))
    np.testing.assert_allclose(joined.detach(), arrays["fpn/out"], rtol=1e-4, atol=1e-5)


def test_decoder_of_other_widths_and_sides() -> None:
    decoder = FPNDecoder((8, 16, 24, 32), 5)
    other = FPNDecoder.from_state_dict(decoder.state_dict())
    stages = [normal(2, 8, 10, 7), normal(2, 16, 5, 4), normal(2, 24, 3, 2), normal(2, 32, 2, 1)]
    joined = decoder(*stages)
    assert joined.shape == (2, 5, 10, 7)
    torch.testing.assert_close(other(*stages), joined)


@pytest.mark.parametrize("broken", ["missing", "narrow", "another"])
def test_weights_of_something_else_are_refused(reference: Reference, broken: str) -> None:
    weights = pyramid(reference("picie"))
    if broken == "missing":
        del weights["layer2.weight"]
    elif broken == "narrow":
        weights["layer1.bias"] = torch.zeros(7)
    else:
        weights = {"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}
    with refused("weights-misfit"):
        FPNDecoder.from_state_dict(weights)


def test_features_have_a_quarter_of_the_images_sides() -> None:
    network = FeatureNetwork("resnet18", "random", width=16)
    features = network(normal(2, 3, 64, 96))
    assert features.shape == (2, 16, 16, 24)
    again = FeatureNetwork("resnet18", "random", width=16)
    assert torch.equal(network.backbone.state_dict()["conv1.weight"], again.backbone.state_dict()["conv1.weight"])


@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
def test_weights_are_read_from_a_file(tmp_path: Path, prefix: str) -> None:
    """A file with torchvision's names and a classifier, and one with MoCo's names and the key encoder."""
    full = timm.create_model("resnet18", pretrained=False)
    tensors = {prefix + name: tensor for name, tensor in full.state_dict().items()}
    if prefix:
        tensors |= {name.replace("encoder_q", "encoder_k"): tensor + 1 for name, tensor in tensors.items()}
    torch.save({"state_dict": tensors}, tmp_path / "weights.pth")
    network = FeatureNetwork("resnet18", str(tmp_path / "weights.pth"))
    for name, tensor in network.backbone.state_dict().items():
        torch.testing.assert_close(tensor, full.state_dict()[name])


def test_wrong_weights_and_networks_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18", pretrained=False).state_dict(), tmp_path / "weights.pth")
    with refused("weights-misfit resnet50"):
        FeatureNetwork("resnet50", str(tmp_path / "weights.pth"))
    with refused("encoder-unknown vit_tiny_patch16_224"):
        FeatureNetwork("vit_tiny_patch16_224", "random")


# ---- views ----


def smooth(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return (255 * torch.stack((x, y, (x + y) / 2)))[None].round().to(torch.uint8)


def test_features_of_the_second_view_lie_where_the_first_view_s_do() -> None:
    """With pixels as features, cutting before or after gives the same picture."""
    images = smooth(64, 96).expand(6, -1, -1, -1)
    drawn = draw_transforms(range(6), seed=0, epoch=0)
    nothing = draw_transforms([], seed=0, epoch=0).colours
    first, second = make_views(images, Transforms(colours=nothing, geometry=drawn.geometry), (32, 48))
    assert first.shape == second.shape == (6, 3, 32, 48)
    # Half a pixel of a ramp over 48 pixels, in deviations of about 0.225.
    assert (transform(second, drawn, (32, 48)) - first).abs().max() < 0.5 / 48 / 0.22
    assert (first - second).abs().max() > 0.5


def test_a_cut_by_hand() -> None:
    """Half of the side, in the top left corner, mirrored."""
    plane = torch.arange(16.0).reshape(1, 1, 4, 4)
    geometry = np.array([[[-0.5, 0, -0.5], [0, 0.5, -0.5]]], np.float32)
    drawn = Transforms(colours=draw_transforms([0], seed=0, epoch=0).colours, geometry=geometry)
    assert transform(plane, drawn, (2, 2)).tolist() == [[[[1, 0], [5, 4]]]]


def test_cuts_stay_inside_the_image() -> None:
    drawn = draw_transforms(range(200), seed=0, epoch=1)
    corners = np.abs(drawn.geometry[:, [0, 1], [0, 1]]) + np.abs(drawn.geometry[:, :, 2])
    assert corners.max() <= 1 + 1e-6
    sides = drawn.geometry[:, 1, 1]
    assert 0.5 <= sides.min() < 0.55 < 0.95 < sides.max() <= 1
    assert 60 < (drawn.geometry[:, 0, 0] < 0).sum() < 140


def test_transforms_do_not_depend_on_their_batch() -> None:
    together, alone = draw_transforms([3, 4, 5], seed=1, epoch=2), draw_transforms([4], seed=1, epoch=2)
    np.testing.assert_array_equal(together.geometry[1:2], alone.geometry)
    images = (255 * torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))).to(torch.uint8)
    for found, expected in zip(
        make_views(images, together, (8, 8)), make_views(images[1:2], alone, (8, 8)), strict=True
    ):
        torch.testing.assert_close(found[1:2], expected)
    first, second = make_views(images, together, (8, 8))
    assert not torch.equal(first, second)


# ---- mini-batch K-Means ----


def test_mini_batch_kmeans_agrees_with_the_published_one(reference: Reference) -> None:
    arrays = reference("picie")
    features = torch.from_numpy(arrays["kmeans/features"])
    batches = [rows_of(batch) for batch in features]
    initial = torch.from_numpy(arrays["kmeans/initial_centroids"])
    first = int(arrays["kmeans/init_batches"])
    start = MiniBatchKMeans(initial, torch.zeros(len(initial))).sums(torch.cat(batches[:first]))
    kmeans = MiniBatchKMeans(initial, start.counts)
    losses = [start.mean_distance]
    losses += [kmeans.update(batch) for batch in batches[first:]]
    np.testing.assert_allclose(kmeans.centroids, arrays["kmeans/centroids"], rtol=1e-4, atol=1e-6)
    assert np.mean(losses) == pytest.approx(float(arrays["kmeans/loss"]), rel=1e-4)
    assert kmeans.counts.sum() == features.numel() // features.shape[2]
    assert torch.equal(initial, torch.from_numpy(arrays["kmeans/initial_centroids"]))  # not changed in place


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_a_step_by_hand(make: Callable[[object], Tensor | np.ndarray]) -> None:
    """Three earlier rows and one new one move a centroid by a quarter of the distance; one without rows stays."""
    kmeans = MiniBatchKMeans(make([[1.0, 0.0], [-1.0, 0.0]]), make([3, 5]))
    loss = kmeans.update(make([[0.6, 0.8]]))
    torch.testing.assert_close(torch.as_tensor(kmeans.centroids).float(), torch.tensor([[0.9, 0.2], [-1.0, 0.0]]))
    assert kmeans.counts.tolist() == [4, 5]
    assert loss == pytest.approx(0.4**2 + 0.8**2)


def test_a_centroid_without_rows_before_takes_the_mean_of_its_first() -> None:
    kmeans = MiniBatchKMeans(torch.eye(2), torch.zeros(2))
    kmeans.update(torch.tensor([[2.0, 0.0], [0.6, 0.8], [0.8, 0.6], [3.0, 0.0]]))
    torch.testing.assert_close(kmeans.centroids, torch.tensor([[2.8 / 3, 0.2], [0.6, 0.8]]))


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_give_the_same_bits_as_one_process(shards: int) -> None:
    rows, centroids = normal(1000, 16), F.normalize(normal(9, 16, seed=1), dim=1)
    one = MiniBatchKMeans(centroids, torch.full((9,), 40))
    other = MiniBatchKMeans(centroids, torch.full((9,), 40))
    for batch in torch.split(rows, 300):
        expected = one.update(batch)
        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(shards))
        parts = [other.sums(part) for part in batch[order].chunk(shards)]
        assert other.step(sum(parts[1:], parts[0])) == expected
    assert torch.equal(one.centroids, other.centroids)
    assert torch.equal(one.counts, other.counts)


def test_a_batch_without_rows_changes_nothing() -> None:
    kmeans = MiniBatchKMeans(torch.eye(2), torch.tensor([1, 2]))
    assert kmeans.update(torch.zeros(0, 2)) == 0
    assert torch.equal(kmeans.centroids, torch.eye(2))


def test_wrong_arguments_are_refused() -> None:
    features, centroids = normal(2, 4, 3, 3), normal(5, 4)
    labels, weights = assign(features, centroids)
    with pytest.raises(ValueError, match="features of 4 channels can't be compared with centroids of 3"):
        assign(features, centroids[:, :3])
    with pytest.raises(ValueError, match="the views differ"):
        clustering_loss(features, features[:1], labels, labels, centroids, centroids, weights, weights)
    with pytest.raises(ValueError, match=r"labels_2 must be \(2, 3, 3\), one for each pixel of the features, not"):
        clustering_loss(features, features, labels, labels[..., :2], centroids, centroids, weights, weights)
    with pytest.raises(ValueError, match=r"5 centroids need as many counts, not \(4,\)"):
        MiniBatchKMeans(centroids, torch.zeros(4))
    with pytest.raises(ValueError, match="features of 3 channels can't be compared with centroids of 4"):
        MiniBatchKMeans(centroids, torch.zeros(5)).update(normal(7, 3))
