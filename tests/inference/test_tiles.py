"""Tiles of an image against the sum of all their logits, enlarged at once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from transfgu.datasets.rasters import ArrayRows
from transfgu.errors import UserError
from transfgu.inference import tiles
from transfgu.inference.tiles import Tiling, enlarging, starts, strips, weights

SIDES = st.tuples(st.integers(2, 400), st.integers(2, 90), st.integers(0, 89), st.integers(1, 90)).filter(
    lambda s: s[2] < s[1]
)


@given(SIDES)
def test_as_few_tiles_as_overlap_enough(sides: tuple[int, int, int, int]) -> None:
    side, tile, overlap, cells = sides
    begins = starts(side, tile, overlap, cells)
    assert begins[0] == 0
    if side <= tile:
        assert begins == [0]
        return
    beyond = begins[-1] + tile - side
    steps = np.diff(begins)
    assert steps.min() > 0
    assert steps.max() <= tile - overlap
    assert 0 <= beyond <= tile // 4
    # As few as with starts at any pixel, except where whole steps of the grid don't fill `tile - overlap`.
    free = starts(side, tile, overlap, tile)
    assert free[-1] + tile == side
    assert side > tile + (len(free) - 2) * (tile - overlap)  # one fewer would not reach
    assert len(begins) >= len(free)


@given(st.integers(200, 900), st.integers(4, 10), st.integers(5, 12), st.integers(0, 4))
def test_tiles_begin_on_the_grid_of_cells(side: int, patch: int, cells: int, shared: int) -> None:
    tile = patch * cells
    begins = starts(side, tile, shared * patch, cells)
    assert all(begin % patch == 0 for begin in begins)
    assert begins[-1] + tile < side + patch
    steps = np.diff(begins) // patch
    assert steps.max() - steps.min() <= 1
    assert side > tile + (len(begins) - 2) * (cells - shared) * patch  # one fewer would not reach


def test_tiles_by_hand() -> None:
    assert starts(10, 4, 1, 4) == [0, 3, 6]
    assert starts(11, 4, 1, 4) == [0, 2, 5, 7]
    # Cells of 8 pixels: 400 - 128 = 34 cells, at most 12 per step (128 - 32); of 10: 21 of 10 pixels reach 406.
    assert starts(400, 128, 32, 16) == [0, 88, 184, 272]
    assert starts(405, 200, 100, 20) == [0, 70, 140, 210]
    # Cells of 7.5 pixels are rounded down: 4 and 8 cells.
    assert starts(90, 30, 0, 4) == [0, 30, 60]
    assert starts(85, 30, 15, 4) == [0, 15, 30, 45, 60]
    # A cell that is larger than a quarter of a tile, or than 4 - 3 pixels, binds nothing.
    assert starts(11, 4, 1, 2) == [0, 2, 5, 7]
    assert starts(6, 4, 3, 2) == [0, 1, 2]
    np.testing.assert_allclose(weights([0, 2], 4, 2), [[1, 1, 0.75, 0.25], [0.25, 0.75, 1, 1]])


@given(SIDES)
def test_weights_add_up_to_one(sides: tuple[int, int, int, int]) -> None:
    side, tile, overlap, cells = sides
    begins, tile = starts(side, tile, overlap, cells), min(tile, side)
    total = np.zeros(begins[-1] + tile)
    for begin, weight in zip(begins, weights(begins, tile, overlap), strict=True):
        assert weight.min() > 0
        total[begin : begin + tile] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize(("cells", "pixels"), [(1, 5), (4, 4), (5, 37), (40, 320), (9, 4)])
def test_enlarging_is_torchs(cells: int, pixels: int) -> None:
    row = torch.randn(1, 1, 1, cells)
    expected = F.interpolate(row, (1, pixels), mode="bilinear")[0, 0, 0]
    torch.testing.assert_close(torch.from_numpy(enlarging(cells, pixels)) @ row.flatten(), expected)


def pooled(batch: Tensor) -> Tensor:
    """A model of two classes that depends only on each patch of 8 pixels, and its position in the tile."""
    red, blue = F.avg_pool2d(batch.float(), 8).unbind(1)[::2]
    return torch.stack((red - red.mean(dim=(1, 2), keepdim=True), blue), dim=1)


class Watched(ArrayRows):
    """An image that records the requested rows."""

    def __init__(self, image: np.ndarray) -> None:
        super().__init__(image)
        self.asked: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> np.ndarray:
        self.asked.append((start, stop))
        return super().read(start, stop)


@pytest.mark.parametrize(("height", "width", "tile", "overlap"), [(70, 90, 32, 8), (33, 64, 32, 20), (20, 200, 40, 0)])
@pytest.mark.parametrize("cells", [32, 4])
@pytest.mark.parametrize("blended", [tiles.BLENDED, 999])
def test_strips_are_all_tiles_enlarged_weighted_and_added(
    height: int, width: int, tile: int, overlap: int, cells: int, blended: int
) -> None:
    """Blocks of all columns, and of some; the image is mirrored under tiles that end beyond it."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    rows = Watched(image)
    tiling = Tiling(tile=tile, overlap=overlap)
    counts: list[tuple[int, int]] = []
    found = list(
        strips(
            *(rows, (32, 32), tiling, (cells, cells), pooled, lambda logits: logits.numpy()),
            report=lambda done, total: counts.append((done, total)),
            blended=blended,
        )
    )
    tall, wide = min(tile, height), min(tile, width)
    from transfgu.datasets import images

    ys, xs = starts(height, tile, overlap, cells), starts(width, tile, overlap, cells)
    bottom, right = ys[-1] + tall, xs[-1] + wide
    whole = np.pad(image, ((0, bottom - height), (0, right - width), (0, 0)), mode="reflect")
    expected, total = torch.zeros(2, bottom, right), torch.zeros(bottom, right)
    for y, down in zip(ys, weights(ys, tall, overlap), strict=True):
        for x, across in zip(xs, weights(xs, wide, overlap), strict=True):
            piece = images.resize(whole[y : y + tall, x : x + wide], (32, 32))
            logits = F.interpolate(pooled(torch.from_numpy(piece)[None]), (tall, wide), mode="bilinear")[0]
            weight = torch.from_numpy(np.outer(down, across))
            expected[:, y : y + tall, x : x + wide] += weight * logits
            total[y : y + tall, x : x + wide] += weight
    torch.testing.assert_close(total, torch.ones(bottom, right))
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected[:, :height, :width].numpy(), atol=1e-3)
    assert counts[-1] == (len(ys) * len(xs), len(ys) * len(xs))
    assert [done for done, _ in counts] == sorted({done for done, _ in counts})
    asked = [pair for pair in rows.asked if pair != (0, 0)]
    assert [start for start, _ in asked] == [0, *(stop for _, stop in asked[:-1])]  # each row once, downwards


@pytest.mark.parametrize(("tile", "overlap"), [(1, 0), (0, 0), (64, 64), (64, -1)])
def test_tiles_that_cover_nothing(tile: int, overlap: int) -> None:
    with pytest.raises(UserError) as caught:
        Tiling(tile=tile, overlap=overlap)
    assert caught.value.code == "tile-wrong"


def test_a_tile_has_the_proportion_of_the_models_images() -> None:
    assert Tiling(tile=320).size((320, 640)) == (320, 640)
    assert Tiling(tile=100).size((480, 240)) == (100, 50)
