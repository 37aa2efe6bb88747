"""Encode images in batches of one shape, each on one thread, so that a row never depends on the others.

Matrix products round differently for another number of rows or another division among threads. So the last batch is
padded to full size and the padding discarded, and on CPUs each batch has one thread while the cores work on different
batches, which also avoids waiting. Features and maps are the same to the last bit on any process and in any batch.
Windows are cut directly into the batch, so a crop exists only while it is encoded.
"""

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int16, Shaped, UInt8
from torch import Tensor
from torch.nn import functional as F

from transfgu.datasets.packed_maps import pack_maps
from transfgu.encoder import Encoder, normalise, scaled_size
from transfgu.inference.device import allow_tf32, in_bfloat16
from transfgu.inference.memory import HalveOnOutOfMemory
from transfgu.maps import refine_maps
from transfgu.recipe import PseudoLabelsRecipe, Recipe, Size
from transfgu.windows import crop_windows

Result = TypeVar("Result")

_CPU_PATCHES = 2048  # maximum number of patches per batch on CPUs: more don't fit in the caches, and are slower


class FrozenEncoder:
    """The recipe's encoder on a device: computes saliency, window features and concept maps of decoded images.

    Images are uint8 arrays, and results are arrays. A batch that does not fit in the device's memory is halved, and
    `note` then says so.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, *, processes: int = 1, images_at_once: int | None = None
    ) -> None:
        """Load the encoder.

        Args:
            recipe: recipe with the encoder, its precision, and the number of patches per batch.
            device: device of the encoder.
            processes: number of processes that share the machine's cores.
            images_at_once: maximum number of images per call, if known: they then fill batches of one size, without
                unnecessary padding. Windows are batched across images and are not affected.

        Raises:
            UserError: an encoder or weights that are not available.
        """
        self.encoder = Encoder.from_pretrained(recipe.encoder.name, recipe.encoder.weights).to(device)
        self.device = device
        self.half = in_bfloat16(recipe.encoder, device)
        allow_tf32(recipe.encoder, device)
        self._patches = recipe.encoder.batch_size * self._grid(recipe.windows.size)[2]
        self._images_at_once = images_at_once
        self._threads: ThreadPoolExecutor | None = None
        if device.type == "cpu":
            self._patches = min(self._patches, _CPU_PATCHES)
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            self._threads = ThreadPoolExecutor(max(1, cores // processes), "encoder", torch.set_num_threads, (1,))
        self._fitting: dict[str, int] = {}  # rows that fitted, by kind of batch, after memory ran out

    @property
    def note(self) -> str:
        """A line for the user about the work so far; empty if there is nothing to report."""
        return "; ".join(
            f"out of memory: batch of {what} halved to {rows}, and on" for what, rows in sorted(self._fitting.items())
        )

    def rows(self, size: Size) -> int:
        """Return the number of images of `size` in a batch, which has as many patches as a batch of windows."""
        return max(1, self._patches // self._grid(size)[2])

    def saliency(self, images: UInt8[np.ndarray, "n 3 H W"], *, times_mean: float) -> Bool[np.ndarray, "n h w"]:
        """Return which patches are salient (see `Encoder.saliency`)."""

        def salient(batch: Tensor) -> Tensor:
            with self.precision():
                return self.encoder.saliency(batch, times_mean=times_mean)

        return self._of_images(salient, images, self.rows(_size(images)), "images")

    def window_features(
        self,
        images: UInt8[np.ndarray, "n 3 H W"],
        rows: Int[np.ndarray, " N"],
        windows: Int[np.ndarray, "N 4"],
        size: Size,
    ) -> Float[np.ndarray, "N d"]:
        """Return the class tokens of windows, cut from images and resized bilinearly to `size` (height, width).

        `rows` says which of `images` each window is cut from; `windows` are rows y0 y1 x0 x1, pixels.
        """
        at_once = self.rows(size)

        def batch(start: int) -> Tensor:
            here, places = rows[start : start + at_once], windows[start : start + at_once]
            crops = torch.zeros(at_once, 3, *size, device=self.device)
            for row in np.unique(here):
                its = np.flatnonzero(here == row)
                crops[its] = crop_windows(self._normalised(images[row : row + 1])[0], places[its], size)
            return self._fitted(self._class_tokens, crops, "windows")[: len(here)]

        return self._joined(batch, len(windows), at_once)

    def concept_maps(
        self, images: UInt8[np.ndarray, "n 3 H W"], concepts: Float[Tensor, "K d"], how: PseudoLabelsRecipe
    ) -> Int16[np.ndarray, "n planes h w"]:
        """Return packed concept maps (see `pack_maps`), one value per patch of the images.

        They are the sum over `how.scales` of the maps of the images resized by these (bilinear, to whole patches),
        brought to the images' own patches by area, then averaged over squares of `how.smoothing` patches, smaller ones
        at the border, then refined in `how.refine` steps (see `refine_maps`). Source of a single scale's maps: see
        `Encoder.concept_maps`.
        """
        concepts = concepts.to(self.device)
        height, width = _size(images)
        grid = self._grid((height, width))[:2]
        sizes = [scaled_size((height, width), scale, self.encoder.patch_size) for scale in how.scales]

        def maps(batch: Tensor) -> Tensor:
            return self.encoder.concept_maps(batch, concepts, gradient_scale=how.gradient_scale)

        def summed(batch: Tensor) -> Tensor:
            total = torch.zeros(len(batch), len(concepts), *grid, device=self.device)
            for size in sizes:
                resized = batch if size == (height, width) else F.interpolate(batch, size, mode="bilinear")
                with self.precision():
                    one = maps(resized)
                total += one if one.shape[2:] == grid else F.interpolate(one, grid, mode="area")
            if how.smoothing > 1:
                total = F.avg_pool2d(total, how.smoothing, 1, how.smoothing // 2, count_include_pad=False)
            if how.refine:
                with self.precision():
                    tokens = self.encoder.patch_tokens(batch)
                total = refine_maps(total, tokens.float(), how.refine)
            return pack_maps(total)

        rows = min(self.rows(size) for size in sizes)
        return self._of_images(summed, images, rows, "maps")

    def _of_images(
        self, function: Callable[[Tensor], Tensor], images: UInt8[np.ndarray, "n 3 H W"], rows: int, what: str
    ) -> Shaped[np.ndarray, "n ..."]:
        """Apply `function` to all images, normalised, in batches of at most `rows`."""
        if self._images_at_once is not None:  # not the present number, because all calls must have the same batch shape
            rows = math.ceil(self._images_at_once / math.ceil(self._images_at_once / rows))

        def batch(start: int) -> Tensor:
            some = self._normalised(images[start : start + rows])
            blank = some.new_zeros(rows - len(some), *some.shape[1:])
            return self._fitted(function, torch.cat([some, blank]), what)[: len(some)]

        return self._joined(batch, len(images), rows)

    def _joined(self, batch: Callable[[int], Tensor], count: int, rows: int) -> Shaped[np.ndarray, "n ..."]:
        """Join the results of `batch` for the first row of every batch. Without rows, one batch gives the shape."""
        joined: Shaped[np.ndarray, "n ..."] = torch.cat(self.each(batch, range(0, max(1, count), rows))).cpu().numpy()
        return joined

    def each(self, batch: Callable[[int], Result], starts: Iterable[int]) -> list[Result]:
        """Return `batch(start)` for each start, without gradients; on CPUs each thread runs one at a time."""

        def without_gradients(start: int) -> Result:
            with torch.no_grad():  # valid only in the calling thread
                return batch(start)

        return list((map if self._threads is None else self._threads.map)(without_gradients, starts))

    def _fitted(self, function: Callable[[Tensor], Tensor], batch: Tensor, what: str) -> Tensor:
        halving = HalveOnOutOfMemory(function, f"batch of {what}")
        halving.size = self._fitting.get(what)
        result: Tensor = halving(batch)
        if halving.size is not None:
            self._fitting[what] = halving.size
        return result

    def _class_tokens(self, batch: Tensor) -> Tensor:
        with self.precision():
            return self.encoder.class_tokens(batch).float()

    def _normalised(self, images: UInt8[np.ndarray, "n 3 H W"]) -> Float[Tensor, "n 3 H W"]:
        # Arrays from Ray's object store are read-only, so torch warns; nothing here writes to them.
        return normalise(torch.tensor(images, device=self.device), self.encoder.mean, self.encoder.std)

    def precision(self) -> torch.autocast | nullcontext[None]:
        """Return the context in which forward passes run."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.half else nullcontext()

    def _grid(self, size: Size) -> tuple[int, int, int]:
        h, w = (max(1, side // self.encoder.patch_size) for side in size)
        return h, w, h * w


def _size(images: UInt8[np.ndarray, "n 3 H W"]) -> Size:
    return images.shape[2], images.shape[3]
