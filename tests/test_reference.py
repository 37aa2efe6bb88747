"""Agreement with the published implementation, number by number, through the public API."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from transfgu.decoder import MaskDecoder
from transfgu.encoder import Encoder
from transfgu.losses import bootstrapping_loss, pixel_losses
from transfgu.metrics import confusion_matrix, match_clusters, scores
from transfgu.stages.concepts import kmeans
from transfgu.training.step import make_optimiser, start_step
from transfgu.views import crop_views
from transfgu.windows import crop_windows, select_windows, sliding_windows

Reference = Callable[[str], dict[str, np.ndarray]]
HEADS = 3
BACKGROUND = {"thingstuff": None, "things": 0.1}


def state_of(arrays: dict[str, np.ndarray], folder: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(folder): torch.from_numpy(array) for name, array in arrays.items() if name.startswith(folder)
    }


def assert_agrees(actual: Tensor | np.ndarray, expected: np.ndarray, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    if isinstance(actual, Tensor):
        actual = actual.detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


# ---- encoder, windows, concept maps, views ----


def encoder_of(arrays: dict[str, np.ndarray]) -> Encoder:
    return Encoder.from_state_dict(state_of(arrays, "weights/"), patch_size=8, num_heads=HEADS)


@pytest.mark.parametrize("case", ["native", "square", "wide", "tall"])
def test_encoder(reference: Reference, case: str) -> None:
    arrays = reference("encoder")
    encoder, images = encoder_of(arrays), torch.from_numpy(arrays[f"{case}/image"])
    output = encoder(images)
    tokens, attention = arrays[f"{case}/tokens"], arrays[f"{case}/cls_attention"]
    assert output.grid == (images.shape[2] // 8, images.shape[3] // 8)
    assert_agrees(output.cls, tokens[:, 0])
    assert_agrees(output.patches, tokens[:, 1:])
    assert_agrees(output.cls_attention, attention)
    assert_agrees(encoder.class_tokens(images), tokens[:, 0])
    assert_agrees(encoder.patch_tokens(images), tokens[:, 1:])
    assert_agrees(encoder.attention_map(images).flatten(1), attention.mean(1))


@pytest.mark.parametrize("case", ["coco", "voc", "cityscapes", "lip", "small", "odd"])
def test_windows(reference: Reference, case: str) -> None:
    arrays = reference("windows")
    height, width = arrays[f"{case}/grid"].tolist()
    windows = sliding_windows((height, width), arrays[f"{case}/scales"].tolist(), patch_size=8)
    np.testing.assert_array_equal(windows, arrays[f"{case}/slices_y0_y1_x0_x1"])


@pytest.mark.parametrize("case", ["model", "blob"])
def test_crops(reference: Reference, case: str) -> None:
    arrays = reference("crops")
    encoder, images, saliency = encoder_of(arrays), torch.from_numpy(arrays["image"]), arrays[f"{case}/saliency"] > 0
    if case == "model":
        assert_agrees(encoder.attention_map(images), arrays["attention_mean"])
        np.testing.assert_array_equal(encoder.saliency(images)[0].numpy(), saliency)
    windows = sliding_windows((20, 20), arrays["scales"].tolist())
    selected = select_windows(windows, saliency, 8, min_foreground=0.5, min_background=0.8)
    for group, indices in zip(("fg", "bg"), selected, strict=True):
        assert len(indices) == arrays[f"{case}/n_{group}"]
        crops = crop_windows(images[0], windows[indices], (80, 80))
        assert_agrees(crops[:2], arrays[f"{case}/{group}_crops_first_two"])
        assert_agrees(encoder.class_tokens(crops), arrays[f"{case}/{group}_cls"])


@pytest.mark.parametrize("case", ["square", "wide"])
def test_concept_maps(reference: Reference, case: str) -> None:
    arrays = reference("concept_maps")
    images = torch.from_numpy(arrays[f"{case}/image"])
    maps = encoder_of(arrays).concept_maps(
        images, torch.from_numpy(arrays["centroids"]), gradient_scale=1 / len(images)
    )
    assert_agrees(maps, arrays[f"{case}/maps"])


def test_view_crop(reference: Reference) -> None:
    arrays = reference("view_crop")
    boxes = arrays["boxes_x1y1x2y2"][:, [1, 3, 0, 2]].astype(np.int64)  # here y0 y1 x0 x1
    images, maps = crop_views(
        torch.from_numpy(arrays["image"]), torch.from_numpy(arrays["pseudo_label"]), boxes, (40, 40), (5, 5)
    )
    assert_agrees(images, arrays["image_crop"])
    assert_agrees(maps, arrays["pseudo_label_crop"])


# ---- decoder, losses, the training step, metrics ----


def test_decoder(reference: Reference) -> None:
    arrays = reference("decoder")
    decoder = MaskDecoder.from_state_dict(state_of(arrays, "weights/"), num_heads=int(arrays["n_heads"]))
    logits, class_embeddings = decoder(torch.from_numpy(arrays["patch_tokens"]))
    assert_agrees(logits, arrays["masks"])
    assert_agrees(class_embeddings, arrays["class_embeddings"])


@pytest.mark.parametrize("kind", BACKGROUND)
@pytest.mark.parametrize(
    ("step", "alpha"), [("epoch0", 0.03), ("epoch3", 0.06), ("epoch7", 0.1), ("epoch40", 0.1), ("warmup", None)]
)
def test_losses(reference: Reference, kind: str, step: str, alpha: float | None) -> None:
    arrays = reference("losses")
    expected = {
        name.removeprefix(f"{kind}/{step}/"): array
        for name, array in arrays.items()
        if name.startswith(f"{kind}/{step}/")
    }
    logits, maps = torch.from_numpy(arrays[f"logits_{kind}"]), torch.from_numpy(arrays["pseudo_label"])
    teacher_logits = None if alpha is None else torch.from_numpy(arrays[f"teacher_{kind}"])
    permutation = None if alpha is None else torch.from_numpy(expected["permutation"])
    pixels = pixel_losses(
        logits,
        maps,
        teacher_logits,
        alpha=alpha or 0.0,
        permutation=permutation,
        background_threshold=BACKGROUND[kind],
    )
    np.testing.assert_array_equal(pixels.labels.numpy(), expected["labels"])
    assert_agrees(pixels.peer, expected["peer"])
    if kind == "thingstuff":
        assert_agrees(pixels.uncertainty, expected["uncertainty"])

    class_embeddings = torch.from_numpy(arrays["diversity/class_embeddings"])
    loss = bootstrapping_loss(
        logits,
        class_embeddings,
        maps,
        teacher_logits,
        omega_1=0.9,
        omega_2=0.3,
        alpha=alpha or 0.0,
        permutation=permutation,
        background_threshold=BACKGROUND[kind],
    )
    peer, diversity, uncertainty = expected["peer"].mean(), arrays["diversity/value"], expected["uncertainty"].mean()
    np.testing.assert_array_equal(loss.labels.numpy(), expected["labels"])
    assert_agrees(loss.peer, peer)
    assert_agrees(loss.diversity, diversity)
    assert_agrees(loss.uncertainty, uncertainty)
    assert_agrees(loss.total, peer + 0.9 * diversity + 0.3 * uncertainty)


@pytest.mark.parametrize("kind", BACKGROUND)
def test_three_training_steps(reference: Reference, kind: str) -> None:
    arrays = reference(f"train_step_{kind}")
    encoder = Encoder.from_state_dict(state_of(arrays, "weights/"), patch_size=8, num_heads=HEADS)
    # Decoders come in evaluation mode, in which there is no dropout: as the vectors were made.
    student = MaskDecoder.from_state_dict(state_of(arrays, "student/"), num_heads=HEADS)
    teacher = MaskDecoder.from_state_dict(state_of(arrays, "teacher/"), num_heads=HEADS)
    optimiser = make_optimiser(student, lr=float(arrays["lr"]), weight_decay=float(arrays["weight_decay"]))
    patches = encoder(torch.from_numpy(arrays["images"])).patches
    for permutation, losses in zip(arrays["permutations"], arrays["losses_peer_unc_div_total"], strict=True):
        result = start_step(
            student,
            optimiser,
            patches,
            torch.from_numpy(arrays["pseudo_label"]),
            teacher,
            omega_1=float(arrays["omega_div"]),
            omega_2=float(arrays["omega_unc"]),
            alpha=0.03 + 0.01 * int(arrays["alpha_epoch"]),
            permutation=permutation,
            background_threshold=BACKGROUND[kind],
        ).result()
        values = np.array([result.peer, result.uncertainty, result.diversity, result.total])
        assert_agrees(values, losses, rtol=1e-3, atol=1e-4)
    for name, weight in student.state_dict().items():
        assert_agrees(weight, arrays[f"student_after/{name}"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", ["small", "coarse"])
def test_metrics(reference: Reference, case: str) -> None:
    arrays = {
        name.removeprefix(f"{case}/"): array
        for name, array in reference("metrics").items()
        if name.startswith(f"{case}/")
    }
    confusion = confusion_matrix(arrays["labels"], arrays["predictions"], len(arrays["confusion"]))
    np.testing.assert_array_equal(confusion, arrays["confusion"])
    clusters = match_clusters(confusion)
    np.testing.assert_array_equal(clusters, arrays["assignment_true_to_pred"])
    result = scores(confusion)
    assert_agrees(result.iou, arrays["iou"][clusters])  # theirs is in the order of predicted clusters
    assert_agrees(np.array(result.mean_iou), arrays["mean_iou"])
    assert_agrees(np.array(result.pixel_accuracy), arrays["pixel_accuracy"])


# ---- concepts ----


def test_kmeans(reference: Reference) -> None:
    arrays = reference("kmeans")
    result = kmeans(arrays["x"], int(arrays["k"]), iterations=100)
    distances = ((arrays["x"][:, None].astype(np.float64) - result.centroids) ** 2).sum(2)
    assert distances.min(1).sum() == pytest.approx(result.inertia, rel=1e-5)
    assert result.inertia <= 1.001 * arrays["inertia"]
    np.testing.assert_array_equal(result.counts, np.bincount(distances.argmin(1), minlength=len(result.counts)))
