"""Averaging by hand, with simple functions as encoder and decoder, and against a single pass."""

from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from tests.made_run import SIDE, MadeRun, make_run
from tests.refusals import refused
from transfgu import datasets
from transfgu.datasets import images
from transfgu.datasets.rows import read_labelled_rows
from transfgu.decoder import MaskDecoder
from transfgu.encoder import scaled_size
from transfgu.inference.averaging import averaged_logits
from transfgu.inference.mask_model import MaskModel
from transfgu.inference.tokens import PatchTokens
from transfgu.metrics import confusion_matrix
from transfgu.recipe import EvaluationRecipe
from transfgu.segmenter import Segmenter
from transfgu.stages import evaluation, samples


class RedOfEachPixel(PatchTokens):
    """An encoder with patches of one pixel, whose token is its red value: 0 to 255."""

    def __init__(self) -> None:
        self.encoder = SimpleNamespace(patch_size=1, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # type: ignore[assignment]
        self.device = torch.device("cpu")

    def __call__(self, images: Tensor) -> Tensor:
        red = images[:, 0] if images.dtype == torch.uint8 else 255 * images[:, 0]
        return red.flatten(1)[:, :, None].float()  # (B, H, W) -> (B, hw, 1)


class Squares(MaskDecoder):
    """A decoder: the first class's logit is the square of a token, the second's the token times its column."""

    def __init__(self, columns: int) -> None:
        super().__init__(3, 2, num_heads=1)
        self.columns = columns

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.arange(patches.shape[1]) % self.columns
        return torch.cat([patches**2, patches * place[:, None]], 2), patches


def row(*values: int) -> Tensor:
    """Return an image of one row of pixels with these red values."""
    return torch.tensor(values, dtype=torch.uint8).expand(1, 3, 1, -1)


def test_scales_by_hand() -> None:
    how = EvaluationRecipe(scales=(1.0, 2.0))
    (logits,) = averaged_logits([MaskModel(RedOfEachPixel(), Squares(2))], row(0, 4), how)
    # Of size 1 the squares are 0 and 16, enlarged 0 4 12 16; of size 2 the pixels are 0 1 3 4, their squares 0 1 9 16.
    assert logits.shape == (1, 2, 2, 4)
    torch.testing.assert_close(logits[0, 0], torch.tensor([[0, 2.5, 10.5, 16]] * 2))


def test_a_smaller_scale_is_brought_to_the_finest_patches() -> None:
    (logits,) = averaged_logits(
        [MaskModel(RedOfEachPixel(), Squares(4))], row(2, 2, 6, 6), EvaluationRecipe(scales=(0.5, 1.0))
    )
    # Half as wide, and still one pixel high: 2 and 6, of squares 4 and 36, enlarged 4 12 28 36.
    torch.testing.assert_close(logits[0, 0], torch.tensor([[4.0, 8, 32, 36]]))


def test_the_flip_by_hand() -> None:
    (logits,) = averaged_logits([MaskModel(RedOfEachPixel(), Squares(2))], row(1, 2), EvaluationRecipe(flip=True))
    # By place: 1 x 0 and 2 x 1; mirrored 2 x 0 and 1 x 1, and back 1 and 0. Squares don't depend on it.
    torch.testing.assert_close(logits[0], torch.tensor([[[1.0, 4]], [[0.5, 1]]]))


def test_sides_are_rounded_to_patches() -> None:
    assert scaled_size((128, 320), 0.75, 8) == (96, 240)
    assert scaled_size((48, 32), 0.7, 16) == (32, 16)  # 33.6 and 22.4
    assert scaled_size((320, 8), 0.1, 8) == (32, 8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("made"))


def test_one_scale_is_a_single_pass_bit_for_bit(made: MadeRun) -> None:
    segmenter = Segmenter.load(made.run.uri)
    batch = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    with torch.inference_mode():
        once = segmenter.decoder(segmenter.encode(batch))[0].mT.unflatten(2, (SIDE // 8, SIDE // 8))
    assert made.recipe.evaluation == EvaluationRecipe()
    assert torch.equal(segmenter.logits(batch), once)


def test_a_side_that_is_no_multiple_of_the_patch_is_refused(made: MadeRun) -> None:
    segmenter = Segmenter.load(made.run.uri)
    with refused("image-size 60 8"):
        segmenter.logits(torch.zeros(1, 3, 60, 64, dtype=torch.uint8))


def test_evaluation_and_segmenter_average_alike(made: MadeRun) -> None:
    recipe = made.recipe.with_fields({"evaluation.scales": (0.75, 1, 1.5), "flip": True})
    segmenter = Segmenter.load(made.run.uri)
    plain = segmenter.predict(np.full((SIDE, SIDE, 3), 90, np.uint8), probabilities=True)
    segmenter.recipe = recipe
    assert segmenter.logits(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)).shape[2:] == (SIDE * 3 // 16,) * 2
    assert not np.allclose(plain, segmenter.predict(np.full((SIDE, SIDE, 3), 90, np.uint8), probabilities=True))

    expected = np.zeros((10, 10), np.int64)
    for sample in pq.read_table(made.run.file("samples/validation.parquet")).to_pylist():
        image = images.resize(images.read_image(sample["image"]), (SIDE, SIDE))
        label = images.resize_label(images.read_label(sample["label"], datasets.classes(recipe)), (SIDE, SIDE))
        (mask,) = segmenter.predict_resized(image[None], [(SIDE, SIDE)])
        expected += confusion_matrix(label, mask, 10)
    rows = samples.labelled(recipe, made.run)
    batch = read_labelled_rows(rows, recipe=recipe)
    counts = evaluation.Count(recipe, [made.run.file("model.safetensors")], 1)(batch)["confusions"][0, 0]
    np.testing.assert_array_equal(counts[:, np.argsort(segmenter.class_of)], expected)
    before = evaluation.Count(made.recipe, [made.run.file("model.safetensors")], 1)(batch)["confusions"][0, 0]
    assert (counts != before).any()
