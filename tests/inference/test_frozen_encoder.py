"""The frozen encoder against the encoder's own methods, one image or window at a time, and in any batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.made_run import write_encoder
from tests.refusals import refused
from transfgu.datasets.packed_maps import unpack_maps
from transfgu.encoder import normalise
from transfgu.inference.frozen_encoder import FrozenEncoder
from transfgu.maps import refine_maps
from transfgu.recipe import PseudoLabelsRecipe, Recipe, preset
from transfgu.windows import crop_windows

SIZE = (32, 24)
WINDOWS = np.array([[0, 15, 0, 15], [8, 31, 0, 23], [4, 12, 4, 20], [0, 31, 1, 24], [2, 9, 3, 11]])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    weights = tmp_path_factory.mktemp("frozen") / "encoder.safetensors"
    torch.manual_seed(0)
    write_encoder(weights)
    fields = {
        "encoder.name": "tiny",
        "encoder.weights": str(weights),
        "windows.size": (16, 16),
        "encoder.batch_size": 6,
    }
    return preset("folder").with_fields(fields)


@pytest.fixture(scope="module")
def frozen(recipe: Recipe) -> FrozenEncoder:
    return FrozenEncoder(recipe, torch.device("cpu"))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 3, *SIZE)).astype(np.uint8)


def direct(frozen: FrozenEncoder, pixels: np.ndarray) -> Tensor:
    return normalise(torch.tensor(pixels), frozen.encoder.mean, frozen.encoder.std)


def test_a_batch_has_as_many_patches_as_the_recipe_s_windows(recipe: Recipe, frozen: FrozenEncoder) -> None:
    assert [frozen.rows(size) for size in ((16, 16), (32, 24), (64, 64))] == [6, 2, 1]  # 24 patches
    many = FrozenEncoder(recipe.with_fields({"encoder.batch_size": 10_000}), torch.device("cpu"))
    assert [many.rows(size) for size in ((16, 16), (32, 24))] == [512, 170]  # on CPUs 2,048 patches at most


def test_saliency_is_the_encoder_s(frozen: FrozenEncoder, pixels: np.ndarray) -> None:
    found = frozen.saliency(pixels, times_mean=1.0)
    for one, image in zip(found, direct(frozen, pixels), strict=True):
        assert np.array_equal(one, frozen.encoder.saliency(image[None], times_mean=1.0)[0].numpy())
    assert 0 < found.mean() < 1


def test_window_features_are_class_tokens_of_crops(frozen: FrozenEncoder, pixels: np.ndarray) -> None:
    rows = np.array([0, 0, 0, 2, 2, 4, 4, 4, 4, 4])
    windows = WINDOWS[[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    found = frozen.window_features(pixels, rows, windows, (16, 16))
    for feature, row, window in zip(found, rows, windows, strict=True):
        crop = crop_windows(direct(frozen, pixels)[row], window[None], (16, 16))
        expected = frozen.encoder.class_tokens(crop)[0]
        torch.testing.assert_close(torch.tensor(feature), expected, rtol=1e-5, atol=1e-5)


def test_a_row_is_the_same_to_the_last_bit_in_any_company(frozen: FrozenEncoder, pixels: np.ndarray) -> None:
    rows = np.repeat(np.arange(5), len(WINDOWS))
    windows = np.tile(WINDOWS, (5, 1))
    features = frozen.window_features(pixels, rows, windows, (16, 16))
    saliency = frozen.saliency(pixels, times_mean=1.0)
    concepts, how = torch.tensor(features[:4]), PseudoLabelsRecipe(scales=(1.0, 1.5), refine=1)
    maps = frozen.concept_maps(pixels, concepts, how)
    for kept in ([0], [4], [1, 3], [0, 2, 3, 4]):
        inside = np.isin(rows, kept)
        alone = frozen.window_features(pixels[kept], np.searchsorted(kept, rows[inside]), windows[inside], (16, 16))
        assert np.array_equal(alone, features[inside])
        assert np.array_equal(frozen.saliency(pixels[kept], times_mean=1.0), saliency[kept])
        assert np.array_equal(frozen.concept_maps(pixels[kept], concepts, how), maps[kept])


@pytest.mark.parametrize(("images_at_once", "rows"), [(None, [6]), (5, [5]), (6, [6]), (8, [4, 4]), (13, [5])])
def test_batches_are_no_larger_than_calls_can_fill(
    recipe: Recipe, pixels: np.ndarray, images_at_once: int | None, rows: list[int]
) -> None:
    # Twenty windows of four patches are six images of twelve.
    recipe = recipe.with_fields({"encoder.batch_size": 20})
    frozen = FrozenEncoder(recipe, torch.device("cpu"), images_at_once=images_at_once)
    seen: list[int] = []
    frozen.encoder.vit.patch_embed.proj.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    assert len(frozen.saliency(pixels, times_mean=1.0)) == 5
    assert seen == rows
    seen.clear()
    assert len(frozen.saliency(pixels[:1], times_mean=1.0)) == 1
    assert seen == rows[:1]  # the same shape for a call that has fewer
    seen.clear()
    frozen.concept_maps(pixels, torch.ones(2, 24), PseudoLabelsRecipe())
    assert seen == rows
    seen.clear()
    frozen.window_features(pixels, np.zeros(5, np.int64), WINDOWS, (16, 16))
    assert seen == [20]


def test_maps_are_summed_over_scales_and_smoothed(frozen: FrozenEncoder, pixels: np.ndarray) -> None:
    concepts = torch.randn(3, frozen.encoder.width, generator=torch.Generator().manual_seed(0))
    how = PseudoLabelsRecipe(gradient_scale=0.5, scales=(1.0, 2.0, 1.4), smoothing=3)
    found = unpack_maps(torch.tensor(frozen.concept_maps(pixels, concepts, how)))
    images = direct(frozen, pixels)
    total = torch.zeros(5, 3, 4, 3)
    for size in (SIZE, (64, 48), (48, 32)):  # 1.4 x 32 is 5.6 patches, 1.4 x 24 is 4.2
        resized = F.interpolate(images, size, mode="bilinear")
        maps = frozen.encoder.concept_maps(resized, concepts, gradient_scale=0.5)
        total += F.adaptive_avg_pool2d(maps, (4, 3))
    corner = total[:, :, :2, :2].mean((2, 3))
    centre = total[:, :, 0:3, 0:3].mean((2, 3))
    torch.testing.assert_close(found[:, :, 0, 0], corner, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found[:, :, 1, 1], centre, rtol=2e-3, atol=2e-3)


def test_maps_are_refined_by_the_image_s_own_tokens(frozen: FrozenEncoder, pixels: np.ndarray) -> None:
    concepts = torch.randn(3, frozen.encoder.width, generator=torch.Generator().manual_seed(1))
    found = unpack_maps(torch.tensor(frozen.concept_maps(pixels, concepts, PseudoLabelsRecipe(smoothing=3, refine=2))))
    images = direct(frozen, pixels)
    plain = F.avg_pool2d(frozen.encoder.concept_maps(images, concepts), 3, 1, 1, count_include_pad=False)
    expected = refine_maps(plain, frozen.encoder.patch_tokens(images), 2)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert (expected - plain).abs().max() > 0.01


def test_no_image_gives_no_row(frozen: FrozenEncoder, pixels: np.ndarray) -> None:
    nothing = pixels[:0]
    assert frozen.saliency(nothing, times_mean=1.0).shape == (0, 4, 3)
    assert frozen.window_features(nothing, np.zeros(0, np.int64), WINDOWS[:0], (16, 16)).shape == (0, 24)
    maps = frozen.concept_maps(nothing, torch.ones(2, 24), PseudoLabelsRecipe())
    assert maps.shape == (0, 4, 4, 3)
    assert maps.dtype == np.int16


def test_too_little_memory_is_said_once_and_changes_nothing(
    recipe: Recipe, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = FrozenEncoder(recipe, torch.device("cpu"))
    rows = np.zeros(len(WINDOWS), np.int64)
    expected = frozen.window_features(pixels, rows, WINDOWS, (16, 16))
    assert frozen.note == ""
    whole, tried = frozen.encoder.class_tokens, []

    def class_tokens(batch: Tensor) -> Tensor:
        tried.append(len(batch))
        if len(batch) > 2:  # as a small device would
            raise torch.OutOfMemoryError
        return whole(batch)

    monkeypatch.setattr(frozen.encoder, "class_tokens", class_tokens)
    for _ in range(2):
        found = frozen.window_features(pixels, rows, WINDOWS, (16, 16))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert frozen.note == "out of memory: batch of windows halved to 1, and on"
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1] + [1] * 6  # what fitted is remembered


def test_bfloat16_is_close_and_not_the_same(recipe: Recipe, frozen: FrozenEncoder, pixels: np.ndarray) -> None:
    half = FrozenEncoder(recipe.with_fields({"encoder.precision": "bfloat16"}), torch.device("cpu"))
    rows = np.zeros(len(WINDOWS), np.int64)
    full = frozen.window_features(pixels, rows, WINDOWS, (16, 16))
    found = half.window_features(pixels, rows, WINDOWS, (16, 16))
    assert found.dtype == np.float32
    assert not np.array_equal(found, full)
    cosine = F.cosine_similarity(torch.tensor(found), torch.tensor(full))
    assert cosine.min() > 0.99


def test_the_encoder_is_where_it_was_asked_for(recipe: Recipe, tmp_path: Path) -> None:
    with refused("file-missing nowhere.pth"):
        FrozenEncoder(recipe.with_fields({"encoder.weights": str(tmp_path / "nowhere.pth")}), torch.device("cpu"))
