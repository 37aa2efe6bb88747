"""IIC, PiCIE and MaskContrast against the published implementations, and by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from transfgu.baselines.iic import mutual_information_loss
from transfgu.baselines.maskcontrast import balanced_cross_entropy, contrastive_loss
from transfgu.baselines.picie import FPNDecoder, MiniBatchKMeans, assign, clustering_loss

REFERENCE = Path(__file__).parents[1] / "reference"
IDENTITY = torch.eye(2, 3)[None]


def load(name: str) -> dict[str, Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["collapsed", "uncollapsed"])
def test_iic(kind: str) -> None:
    v = load("iic")
    logits = [v[f"iic/logits_{i}"].requires_grad_() for i in (1, 2)]
    loss = mutual_information_loss(
        logits[0].softmax(1),
        logits[1].softmax(1),
        v["iic/affine_2_to_1"],
        v["iic/mask"],
        weight=float(v[f"iic/{kind}/lambda"]),
        half_side=int(v[f"iic/{kind}/half_side"]),
        collapsed=kind == "collapsed",
    )
    loss.backward()  # type: ignore[no-untyped-call]
    close(loss, v[f"iic/{kind}/loss"])
    for i, view in enumerate(logits, 1):
        assert view.grad is not None
        close(view.grad, v[f"iic/{kind}/grad_{i}"])


def test_equal_views_of_two_classes_share_one_bit() -> None:
    """Half of the pixels are of each class, the same in both views: the information is log 2."""
    view = torch.zeros(1, 2, 1, 4)
    view[0, 0, 0, :2] = view[0, 1, 0, 2:] = 1
    loss = mutual_information_loss(view, view, IDENTITY, torch.ones(1, 1, 4), half_side=0)
    assert float(loss) == pytest.approx(-math.log(2), abs=1e-4)


def test_constant_views_share_nothing() -> None:
    view = torch.full((1, 3, 4, 4), 1 / 3)
    loss = mutual_information_loss(view, view, IDENTITY, torch.ones(1, 4, 4), half_side=1)
    assert float(loss) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="half_side must not be negative"):
        mutual_information_loss(view, view, IDENTITY, torch.ones(1, 4, 4), half_side=-1)


def test_a_mask_of_no_pixel_gives_a_finite_loss() -> None:
    view = torch.full((1, 3, 4, 4), 1 / 3)
    assert torch.isfinite(mutual_information_loss(view, view, IDENTITY, torch.zeros(1, 4, 4), half_side=1))


def test_picie_assigns_pixels_to_clusters() -> None:
    v = load("picie")
    for i in (1, 2):
        labels, weights = assign(v[f"assign/features_{i}"], v[f"assign/centroids_{i}"])
        assert torch.equal(labels, v[f"assign/labels_{i}"])
        close(weights, v[f"assign/class_weights_{i}"])


def test_picie_s_loss() -> None:
    v = load("picie")
    features = [v[f"assign/features_{i}"].requires_grad_() for i in (1, 2)]
    rest = [v[f"assign/{name}_{i}"] for name in ("labels", "centroids", "class_weights") for i in (1, 2)]
    loss = clustering_loss(*features, *rest)
    loss.total.backward()  # type: ignore[no-untyped-call]
    for name in ("total", "within", "across"):
        close(getattr(loss, name), v[f"loss/{name}"])
    for i, view in enumerate(features, 1):
        assert view.grad is not None
        close(view.grad, v[f"loss/grad_{i}"])


def test_picie_s_mini_batch_kmeans_and_its_shares() -> None:
    v = load("picie")
    batches = v["kmeans/features"].permute(0, 1, 3, 4, 2).flatten(1, 3)  # (5, n, d)
    first = int(v["kmeans/init_batches"])
    start = MiniBatchKMeans(v["kmeans/initial_centroids"], torch.zeros(9))
    _, counts = start.sums(batches[:first].flatten(0, 1))
    whole = MiniBatchKMeans(v["kmeans/initial_centroids"], counts)
    shared = MiniBatchKMeans(v["kmeans/initial_centroids"].double(), counts)
    for batch in batches[first:]:
        whole.update(batch)
        shares = [shared.sums(share) for share in batch.double().chunk(3)]
        shared.step(*(torch.stack(parts).sum(0) for parts in zip(*shares, strict=True)))
    close(whole.centroids, v["kmeans/centroids"])
    close(shared.centroids, v["kmeans/centroids"])
    assert int(whole.counts.sum()) == 5 * batches.shape[1]


def test_a_cluster_without_rows_stays() -> None:
    kmeans = MiniBatchKMeans(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([1.0, 5.0]))
    kmeans.update(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))  # of unit length (0, 1) and (1, 0); a tie goes to the first
    close(kmeans.centroids, torch.tensor([[2 / 3, 1 / 3], [-1.0, 0.0]]))  # 1/3 (1, 0) + 2/3 (1/2, 1/2)
    assert kmeans.counts.tolist() == [3, 5]


def test_picie_s_pyramid() -> None:
    v = load("picie")
    prefix = "fpn/weights/"
    decoder = FPNDecoder.from_state_dict({k.removeprefix(prefix): t for k, t in v.items() if k.startswith(prefix)})
    close(decoder(*(v[f"fpn/res{i}"] for i in (2, 3, 4, 5))), v["fpn/out"])


def test_maskcontrast() -> None:
    v = load("maskcontrast")
    query, logits = v["query"].requires_grad_(), v["query_saliency_logits"].requires_grad_()
    found = contrastive_loss(
        query, v["key"], v["saliency_query"], v["saliency_key"], v["queue_before"], temperature=float(v["temperature"])
    )
    close(found.logits, v["logits"])
    assert torch.equal(found.targets, v["targets"])
    close(found.class_weights, v["class_weights"])
    close(found.loss, v["contrastive_loss"])
    close(found.prototypes.T, v["queue_after"][:, : len(query)])
    found.loss.backward()  # type: ignore[no-untyped-call]
    saliency = balanced_cross_entropy(logits, v["saliency_query"])
    saliency.backward()  # type: ignore[no-untyped-call]
    close(saliency, v["saliency_loss"])
    assert query.grad is not None
    assert logits.grad is not None
    close(query.grad, v["grad_query"])
    close(logits.grad, v["grad_saliency_logits"])


def test_maskcontrast_without_objects() -> None:
    query = torch.randn(2, 4, 3, 3, requires_grad=True)
    nothing = torch.zeros(2, 3, 3)
    found = contrastive_loss(query, query.detach(), nothing, nothing, F.normalize(torch.randn(4, 6), dim=0))
    assert float(found.loss) == 0
    assert torch.isfinite(found.prototypes).all()
    assert torch.isfinite(found.class_weights).all()
    with pytest.raises(ValueError, match="temperature must be positive"):
        contrastive_loss(query, query, nothing, nothing, torch.zeros(4, 6), temperature=0.0)


def test_each_side_of_a_mask_weighs_by_the_other() -> None:
    """One object pixel of four, all logits 0: (3/4 + 3 * 1/4) log 2 / 4."""
    labels = torch.tensor([[[1, 0], [0, 0]]])
    assert float(balanced_cross_entropy(torch.zeros(1, 2, 2), labels)) == pytest.approx(1.5 * math.log(2) / 4)
