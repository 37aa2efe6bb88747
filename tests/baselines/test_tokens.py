from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.folder_run import IMAGES, photographs, small
from tests.made_run import SIDE, MadeRun, make_run
from tests.refusals import refused
from transfgu.baselines import tokens as module
from transfgu.baselines.pixel_features import PixelFeatures
from transfgu.baselines.tokens import baselines
from transfgu.datasets.images import resize
from transfgu.decoder import winners
from transfgu.encoder import Encoder, normalise
from transfgu.inference.tokens import PatchTokens
from transfgu.kmeans import Shard, cluster
from transfgu.maps import background_map, refine_maps, scale_maps
from transfgu.metrics import confusion_matrix, scores
from transfgu.recipe import EncoderRecipe, EvaluationRecipe


def validation(made: MadeRun) -> list[tuple[np.ndarray, np.ndarray]]:
    rows = pq.read_table(made.run.file("samples/validation.parquet")).to_pylist()
    pairs = [(np.asarray(Image.open(row["image"])), np.asarray(Image.open(row["label"]))) for row in rows]
    return [(resize(image, (SIDE, SIDE)), label[np.arange(SIDE) * len(label) // SIDE]) for image, label in pairs]


def test_baselines_of_a_run(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    found = baselines(made.recipe, made.run)
    assert sorted(found) == [
        "K-Means over colour and texture",
        "K-Means over colour, texture and height",
        "K-Means over patch tokens",
        "K-Means over patch tokens, smoothed",
        "K-Means over patch tokens, untrained encoder",
        "linear probe, supervised",
        "pseudo labels alone",
    ]
    # Told the truth, even random features say more than clusters do.
    clusters = max(found[name].pixel_accuracy for name in found if name.startswith("K-Means"))
    assert found["linear probe, supervised"].pixel_accuracy > clusters

    encoder = Encoder.from_pretrained(made.recipe.encoder.name, made.recipe.encoder.weights)
    concepts = safetensors.torch.load_file(made.run.file("concepts/concepts.safetensors"))["centroids"]
    confusion = np.zeros((10, 10), np.int64)
    for image, label in validation(made):
        maps = torch.zeros(1, 10, SIDE // 8, SIDE // 8)
        for scale in made.recipe.pseudo_labels.scales:
            pixels = normalise(torch.from_numpy(image)[None])
            pixels = torch.nn.functional.interpolate(pixels, scale_factor=scale, mode="bilinear")
            some = encoder.concept_maps(pixels, concepts)
            maps += torch.nn.functional.adaptive_avg_pool2d(some, SIDE // 8)
        maps = torch.nn.functional.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)
        tokens = encoder.patch_tokens(normalise(torch.from_numpy(image)[None]))
        maps = refine_maps(maps, tokens, made.recipe.pseudo_labels.refine)
        confusion += confusion_matrix(label, winners(scale_maps(maps)[0], (SIDE, SIDE)).numpy(), 10)
    assert found["pseudo labels alone"].mean_iou == pytest.approx(scores(confusion).mean_iou, abs=0.5)


def test_a_background_is_one_more_cluster(tmp_path: Path) -> None:
    made = make_run(tmp_path, labels=False, things=5, stuff=0)
    background = module.pseudo_label_method(made.recipe, made.run, torch.device("cpu"))
    (tmp_path / "labelled").mkdir()
    images = np.stack([image for image, _ in validation(make_run(tmp_path / "labelled"))])
    maps = background(images)
    assert maps.shape == (5, 6, SIDE // 8, SIDE // 8)
    torch.testing.assert_close(maps[:, :1], background_map(maps[:, 1:], 0.1))


def test_a_patch_is_of_the_nearest_centroid(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    encode = PatchTokens(made.recipe.encoder, torch.device("cpu"))
    train = pq.read_table(made.run.file("samples/train.parquet"))
    images = np.stack([resize(np.asarray(Image.open(path)), (SIDE, SIDE)) for path in train["image"].to_pylist()])
    tokens = encode(torch.from_numpy(images))
    centroids = cluster(Shard([tokens.flatten(0, 1).numpy()]), 10, seed=made.recipe.seed).centroids
    predict = module.bottom_up(made.recipe, encode, train, smoothing=1)
    nearest = torch.cdist(tokens, torch.from_numpy(centroids)).argmin(2)
    assert (predict(images).argmax(1).flatten(1) == nearest).float().mean() > 0.99


def test_standardised_numbers_weigh_the_same(tmp_path: Path) -> None:
    """Other units or an offset of a channel change no cluster with standardisation, and do without it."""
    made = make_run(tmp_path)
    train = pq.read_table(made.run.file("samples/train.parquet"))
    images = np.stack([image for image, _ in validation(made)])
    plain = PixelFeatures(8, torch.device("cpu"), height=True)

    class InOtherUnits(PixelFeatures):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            features = super().__call__(images)
            return torch.cat([features[..., :8], 1000 * features[..., 8:] + 50], 2)

    other = InOtherUnits(8, torch.device("cpu"), height=True)

    def clusters(features: PixelFeatures, *, standardised: bool) -> torch.Tensor:
        return module.bottom_up(made.recipe, features, train, smoothing=1, standardised=standardised)(images).argmax(1)

    same = clusters(plain, standardised=True) == clusters(other, standardised=True)
    assert same.float().mean() > 0.99
    found = clusters(other, standardised=False)  # height decides first: no cluster is of two rows of patches
    assert all(len({row for _, row, _ in (found == c).nonzero().tolist()}) <= 1 for c in range(10))


def test_predictions_are_averaged_over_sizes_and_mirror_images(tmp_path: Path) -> None:
    """For an image of twice the size and its mirror image, resized to the finest grid and averaged."""
    made = make_run(tmp_path)
    encode = PatchTokens(made.recipe.encoder, torch.device("cpu"))
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 24)).astype(np.uint8)
    small = normalise(torch.from_numpy(images))
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    parts = []
    for pixels, grid in ((small, (2, 3)), (large, (4, 6))):
        for flip in (False, True):
            tokens = encode(pixels.flip(3) if flip else pixels).mT.reshape(2, -1, *grid)[:, :4]
            tokens = tokens.flip(3) if flip else tokens
            parts.append(torch.nn.functional.interpolate(tokens, (4, 6), mode="bilinear"))
    found = module.averaged(
        EvaluationRecipe(scales=(1.0, 2.0), flip=True), encode, images, lambda tokens: tokens[:, :4]
    )
    torch.testing.assert_close(found, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-5)
    alone = module.averaged(EvaluationRecipe(), encode, images, lambda tokens: tokens)
    torch.testing.assert_close(alone, encode(small).mT.reshape(2, -1, 2, 3))


def test_majority_of_a_patch(tmp_path: Path) -> None:
    recipe = make_run(tmp_path).recipe
    label = np.full((16, 16), -1, np.int16)
    label[:8, :8] = 3
    label[:3, :8] = 5  # 24 of 64 pixels
    label[8, 8] = 2  # one pixel, and no other labelled
    found = module.majority(recipe, [label], 8)
    assert found.tolist() == [[[[3, -1], [-1, 2]]]]


def test_an_untrained_encoder_is_another(tmp_path: Path) -> None:
    recipe = EncoderRecipe(name="vit_tiny_patch16_224", weights="random")
    encode = PatchTokens(replace(recipe, weights="random"), torch.device("cpu"))
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 48)).astype(np.uint8)
    tokens = module.smoothed_tokens(encode, images)
    assert tokens.shape == (3, 192, 2, 3)
    torch.testing.assert_close(tokens.flatten(2).mT, encode(torch.from_numpy(images)))
    smooth = module.smoothed_tokens(encode, images, 3)
    torch.testing.assert_close(smooth[:, :, 0, 0], tokens[:, :, :2, :2].mean((2, 3)))


def test_a_probe_reads_classes_off_tokens(tmp_path: Path) -> None:
    """Bright discs on dark noise: colour alone separates them, except at patches on the edge of a disc."""
    photographs(tmp_path)
    recipe = small(tmp_path, **{"encoder.weights": str(tmp_path / "encoder.safetensors")})
    count, found = module.probe(recipe)
    assert (count, set(found)) == (IMAGES, {module.ENCODER, module.PIXELS})
    assert found[module.PIXELS].pixel_accuracy > 90
    assert len(found[module.PIXELS].iou) == 2  # as many classes as the labels have
    few, _ = module.probe(recipe.with_fields({"limit": 4}))
    assert few == 4


def test_a_probe_needs_labels_of_two_classes(tmp_path: Path) -> None:
    photographs(tmp_path)
    recipe = small(tmp_path)
    for file in (tmp_path / "labels").iterdir():
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(file)
    with refused("labels-few 6 1"):
        module.probe(recipe)
    with refused("labels-few 1"):
        module.probe(recipe.with_fields({"limit": 1}))
