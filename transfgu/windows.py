"""List sliding windows and select foreground and background ones: in each scale, spans along y times spans along x.

Along one axis the spans start at every half side, and the last one ends at the end of the grid. Selecting foreground
windows needs no image, only the saliency of patches, weighted by the number of pixel rows and columns of each patch in
the window.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from transfgu.errors import UserError


def sliding_windows(grid: tuple[int, int], scales: Sequence[float], patch_size: int = 8) -> Int[ndarray, "N 4"]:
    """Return all windows over an image of `grid` = (h, w) patches: rows y0 y1 x0 x1 in pixels, half-open.

    A window's side is `scale` of the image's shorter side, rounded down to whole patches. The windows of each scale
    cover the image. They are ordered by scale, then top to bottom, then left to right. The last pixel row and column of
    a window's patches are left out, as in the published features.

    The published code centres windows on those multiples of half a side that are whole patches. With an odd side these
    are only every other one, so no window touches the image's end, and there may be no window at all. Here a step of
    half an odd side is rounded to whole patches, alternately down and up, so that odd sides have as many windows as
    even ones. Even sides, which all published sizes have, give the published windows.

    Raises UserError if no scale is given, or one is outside (0, 1] or leaves less than one patch.
    Source: TransFGU (Yin et al. 2022).
    """
    if not len(scales):
        raise UserError("there are no window scales: give at least one", code="windows-scale")
    return np.concatenate([_windows_of_scale(grid, scale, patch_size) for scale in scales])


def _windows_of_scale(grid: tuple[int, int], scale: float, patch_size: int) -> Int[ndarray, "N 4"]:
    if not 0 < scale <= 1:
        raise UserError(
            f"window scale {scale} is not a share of the image's side: use values in (0, 1]", code="windows-scale"
        )
    side = int(min(grid) * scale)
    if side < 1:
        raise UserError(
            f"window scale {scale} of {grid[0]} x {grid[1]} patches is less than a patch: "
            "use larger scales or larger images",
            code="windows-scale",
        )
    rows, columns = (_spans(length, side, patch_size) for length in grid)
    return np.concatenate([np.repeat(rows, len(columns), 0), np.tile(columns, (len(rows), 1))], 1)


def _spans(length: int, side: int, patch_size: int) -> Int[ndarray, "n 2"]:
    """Return the pixel spans, along an axis of `length` patches, of windows of `side` patches.

    From half a side before its centre to half a side after it, a window touches one patch more than its side has.
    """
    patches = min(side + 1, length)
    end = length - patches  # where the last window starts
    step = max(side / 2, 1)
    first = np.append(np.arange(0, end, step).astype(np.int64), end)
    return np.stack([first * patch_size, (first + patches) * patch_size - 1], 1)


def select_windows(
    windows: Int[ndarray, "N 4"],
    saliency: Bool[ndarray, "h w"],
    patch_size: int,
    *,
    min_foreground: float = 0.5,
    min_background: float = 0.8,
) -> tuple[Int[ndarray, " foreground"], Int[ndarray, " background"]]:
    """Return the indices of foreground windows and of background windows; a window can be in neither.

    A window is foreground if its salient share exceeds `min_foreground`, background if its unsalient share exceeds
    `min_background` (shares of the window's pixels, 0 to 1). `windows` are rows y0 y1 x0 x1 in pixels from
    `sliding_windows`; `saliency` is True for salient patches. Source: TransFGU (Yin et al. 2022).
    """
    h, w = saliency.shape
    rows = _pixels_by_patch(windows[:, 0], windows[:, 1], h, patch_size)
    columns = _pixels_by_patch(windows[:, 2], windows[:, 3], w, patch_size)
    salient = ((rows @ saliency.astype(np.int64)) * columns).sum(1)  # (N, h) @ (h, w) -> pixels of each window
    area = rows.sum(1) * columns.sum(1)
    return (
        np.flatnonzero(salient / area > min_foreground),
        np.flatnonzero((area - salient) / area > min_background),
    )


def _pixels_by_patch(
    start: Int[ndarray, " N"], stop: Int[ndarray, " N"], patches: int, patch_size: int
) -> Int[ndarray, "N patches"]:
    """Return the number of pixels of each patch in [start, stop), along one axis."""
    edge = np.arange(patches) * patch_size
    overlap: ndarray = np.minimum(stop[:, None], edge + patch_size) - np.maximum(start[:, None], edge)
    return overlap.clip(min=0)


def crop_windows(
    image: Float[Tensor, "3 H W"], windows: Int[ndarray, "N 4"], size: tuple[int, int]
) -> Float[Tensor, "N 3 height width"]:
    """Cut `windows` (rows y0 y1 x0 x1, pixels) and resize each to `size` (bilinear, no antialias)."""
    crops = image.new_empty(len(windows), 3, *size)
    for crop, (y0, y1, x0, x1) in zip(crops, windows.tolist(), strict=True):
        crop.copy_(F.interpolate(image[None, :, y0:y1, x0:x1], size, mode="bilinear")[0])
    return crops
