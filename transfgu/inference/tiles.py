"""Predict an image of any size in overlapping tiles and blend their logits; memory grows only with its width.

Tiles begin on a common grid of patches, so that all tiles cut the image into the same patches: with patches moved by
half their side, many pixels at outlines get another class. The last tiles may end beyond the image by less than a step
of that grid; the image is mirrored there.

Tiles are in rows. The logits of a tile are kept per patch, which takes a two-hundredth of the memory per pixel, and are
enlarged for a block of pixels at a time. Enlarging (bilinear) and the blending weights are both products of a vertical
and a horizontal part, so together they are two small matrices per tile.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from transfgu.datasets import images
from transfgu.errors import UserError
from transfgu.recipe import Size

_AT_ONCE = 16  # tiles per batch of the encoder

BLENDED = 1 << 25
"""Maximum number of blended logits in memory: 128 MiB."""


@runtime_checkable
class Rows(Protocol):
    """An image that is read from the top down."""

    height: int
    width: int

    def read(self, start: int, stop: int) -> UInt8[np.ndarray, "rows W 3"]:
        """Return the rows `start` to `stop`; neither is less than in the previous call."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tiles of an image.

    Args:
        tile: height of a tile, in pixels of the image; its width has the proportion of the recipe's `image_size`.
        overlap: minimum number of pixels that neighbouring tiles share, over which they are blended.
    """

    tile: int
    overlap: int = 64

    def __post_init__(self) -> None:
        if self.tile < 2 or not 0 <= self.overlap < self.tile:
            raise UserError(
                f"tiles of {self.tile} pixels that overlap by {self.overlap} cover nothing: set --tile to 2 or more, "
                "and --overlap below it",
                code="tile-wrong",
            )

    def size(self, wanted: Size) -> Size:
        """Return height and width of a tile, in pixels, for a model whose images have the size `wanted`."""
        return self.tile, max(2, round(self.tile * wanted[1] / wanted[0]))


def starts(side: int, tile: int, overlap: int, cells: int) -> list[int]:
    """Return the starts of tiles along a side: as few as possible, almost evenly spaced, on the grid of cells.

    Args:
        side: of the image, pixels.
        tile: side of a tile, pixels.
        overlap: minimum number of pixels that neighbouring tiles share.
        cells: a tile's side has so many cells, and tiles begin between cells (rounded down to a pixel). If a step of
            this grid is longer than `tile - overlap`, or than a quarter of a tile, tiles begin at any pixel.

    Returns:
        Starts in pixels, the first 0. The last tile ends with the side, or less than a step beyond it.
    """
    if side <= tile:
        return [0]
    step = Fraction(tile, cells)
    step *= math.ceil(1 / step)  # at least a pixel
    if step > min(Fraction(tile - overlap), Fraction(tile, 4)):
        step = Fraction(1)
    steps = math.ceil((side - tile) / step)
    gaps = math.ceil(Fraction(steps, (tile - overlap) // step))
    return [math.floor(round(Fraction(i * steps, gaps)) * step) for i in range(gaps + 1)]


def weights(begins: Sequence[int], tile: int, overlap: int) -> Float32[np.ndarray, "tiles tile"]:
    """Return the weight of each pixel of each tile along a side; the weights of a pixel of the image sum to 1.

    A tile's weight rises from its edge over `overlap` pixels; the image's own edges have no such ramp.
    """
    ramp = np.minimum((np.arange(tile) + 0.5) / max(overlap, 0.5), 1)
    found = np.ones((len(begins), tile))
    found[1:] *= ramp
    found[:-1] *= ramp[::-1]
    total = np.zeros(begins[-1] + tile)
    for begin, weight in zip(begins, found, strict=True):
        total[begin : begin + tile] += weight
    for begin, weight in zip(begins, found, strict=True):
        weight /= total[begin : begin + tile]
    return found.astype(np.float32)


def enlarging(cells: int, pixels: int) -> Float32[np.ndarray, "pixels cells"]:
    """Return the matrix that enlarges `cells` numbers to `pixels`, as torch's bilinear `interpolate` along one side."""
    centre = np.maximum((np.arange(pixels) + 0.5) * (cells / pixels) - 0.5, 0)
    first = np.minimum(centre.astype(int), cells - 1)
    second = np.minimum(first + 1, cells - 1)
    found = np.zeros((pixels, cells))
    np.add.at(found, (np.arange(pixels), first), 1 - (centre - first))
    np.add.at(found, (np.arange(pixels), second), centre - first)
    return found.astype(np.float32)


class _Side:
    """Tiles along one side of an image, and their weights on ranges of its pixels."""

    def __init__(self, side: int, tile: int, overlap: int, cells: int) -> None:
        self.tile = min(tile, side)
        self.begins = starts(side, tile, overlap, cells)
        self.beyond = self.begins[-1] + self.tile - side  # pixels of the last tile that the image does not have
        self._weights = weights(self.begins, self.tile, overlap)

    def part(self, index: int, start: int, stop: int, cells: int) -> Float32[np.ndarray, "pixels cells"] | None:
        """Return the matrix from a tile's cells to its share of the pixels `start` to `stop`; None if it has none."""
        begin = self.begins[index]
        low, high = max(start, begin), min(stop, begin + self.tile)
        if low >= high:
            return None
        found = np.zeros((stop - start, cells), np.float32)
        own = slice(low - begin, high - begin)
        found[low - start : high - start] = enlarging(cells, self.tile)[own] * self._weights[index, own, None]
        return found


def strips(
    image: Rows,
    size: Size,
    tiling: Tiling,
    cells: Size,
    logits_of: Callable[[UInt8[Tensor, "B 3 H W"]], Float[Tensor, "B C h w"]],
    reduce: Callable[[Float[Tensor, "C rows columns"]], np.ndarray],
    *,
    report: Callable[[int, int], None] = lambda done, total: None,
    blended: int = BLENDED,
) -> Iterator[np.ndarray]:
    """Predict an image as strips of rows.

    Args:
        image: read from the top down, each row once.
        size: height and width to which tiles are resized, pixels.
        tiling: the tiles.
        cells: vertical and horizontal number of cells of a tile, on whose grid tiles begin (`starts`); patches, for a
            model that sees patches.
        logits_of: returns logits of resized tiles.
        reduce: computes the result from blended logits, such as the index of the largest: (C, rows, columns) to (...,
            rows, columns).
        report: called after each batch of tiles, with the number of tiles done and that of all tiles.
        blended: number of logits blended at a time; limits memory and does not change results.

    Yields:
        (..., rows, W), from the top down.
    """
    height, width = tiling.size(size)
    down = _Side(image.height, height, tiling.overlap, cells[0])
    across = _Side(image.width, width, tiling.overlap, cells[1])
    held: dict[int, Tensor] = {}  # logits of the tiles of a row, (tiles, C, h, w), by row
    rows = image.read(0, 0)
    top = done = 0
    for row, begin in enumerate(down.begins):
        end = begin + down.tile
        rows = np.concatenate((rows[begin - top :], image.read(top + len(rows), min(end, image.height))))
        top = begin
        found = []
        for first in range(0, len(across.begins), _AT_ONCE):
            columns = across.begins[first : first + _AT_ONCE]
            tiles = [images.resize(_whole(rows[:, x : x + across.tile], down.tile, across.tile), size) for x in columns]
            found.append(logits_of(torch.from_numpy(np.stack(tiles))).float())
            report(row * len(across.begins) + first + len(columns), len(down.begins) * len(across.begins))
        held[row] = torch.cat(found)
        stop = down.begins[row + 1] if row + 1 < len(down.begins) else image.height
        yield _strip(held, down, across, done, stop, image.width, reduce, blended)
        done = stop
        held = {r: logits for r, logits in held.items() if down.begins[r] + down.tile > done}


def _whole(part: UInt8[np.ndarray, "rows columns 3"], height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """Return a tile that ends beyond the image as a whole tile, mirrored there; other tiles are not copied."""
    rows, columns = part.shape[:2]
    if (rows, columns) == (height, width):
        return part
    return np.pad(part, ((0, height - rows), (0, width - columns), (0, 0)), mode="reflect")


def _strip(
    held: dict[int, Tensor],
    down: _Side,
    across: _Side,
    start: int,
    stop: int,
    width: int,
    reduce: Callable[[Any], np.ndarray],
    at_once: int,
) -> np.ndarray:
    """Return the rows `start` to `stop`, from the logits of the tiles that cover them."""
    logits = next(iter(held.values()))
    _, classes, h, w = logits.shape
    columns = max(1, min(across.tile, at_once // (classes * (stop - start))))
    blocks = []
    for left in range(0, width, columns):
        right = min(left + columns, width)
        horizontal = [(i, across.part(i, left, right, w)) for i in range(len(across.begins))]
        near = [(i, torch.from_numpy(m).to(logits.device)) for i, m in horizontal if m is not None]
        blended = logits.new_zeros((classes, stop - start, right - left))
        for row, its in held.items():
            vertical = down.part(row, start, stop, h)
            if vertical is not None:
                wide = sum((its[i] @ m.T for i, m in near), start=logits.new_zeros(()))  # (C, h, columns)
                blended += torch.from_numpy(vertical).to(logits.device) @ wide
        blocks.append(reduce(blended))
    return np.concatenate(blocks, axis=-1)
