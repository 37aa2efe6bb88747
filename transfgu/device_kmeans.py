"""Run K-Means passes on a GPU: rows stay in its memory for all passes, and only centroids and sums are transferred.

A pass is one matrix product over all rows; the bounds that save a CPU most rows would cost a GPU more than they save.
Sums are exact as on CPUs (`transfgu.kmeans`), in any order of additions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float32
from numpy import ndarray

from transfgu.kmeans import Assignment, Grid, Shard
from transfgu.store.scratch import Scratch

_AT_ONCE = 1 << 17  # rows; with 384 columns 200 MB


class DeviceShard(Shard):
    """Rows in the memory of a GPU.

    Args:
        pieces: (n, d) arrays, as in `Shard`.
        device: the GPU. A CPU is possible, too, but slower than `Shard`.
        threads: CPU threads for distances and starts.
        scratch: as in `Shard`.
        at_once: rows per matrix product. All products have this shape, the last one with padding, so the result for a
            row does not depend on the number of rows.

    Raises:
        torch.OutOfMemoryError: the rows do not fit.
    """

    def __init__(
        self,
        pieces: Sequence[ndarray],
        device: torch.device,
        threads: int | None = None,
        at_once: int = _AT_ONCE,
        scratch: Scratch | None = None,
    ) -> None:
        super().__init__(pieces, threads, scratch)
        self._device, self._at_once = device, min(at_once, max(1, self.rows))
        self._rows, self._found = [], []
        for chunk in self._joined():
            self._rows.append(torch.from_numpy(chunk).to(device))
            self._found.append(torch.full((len(chunk),), -1, dtype=torch.int64, device=device))
        self._totals, self._sizes = torch.empty(0, 0), torch.empty(0)

    def _like(self, pieces: Sequence[ndarray]) -> Shard:
        try:
            return DeviceShard(pieces, self._device, self._threads, self._at_once, self._scratch)
        except torch.OutOfMemoryError:
            return super()._like(pieces)

    def _joined(self) -> Iterator[Float32[ndarray, "c d"]]:
        """Yield all rows in arrays of `at_once`, the last one padded with zeros."""
        width = self._blocks[0].shape[1] if self._blocks else 0
        chunk, filled = np.zeros((self._at_once, width), np.float32), 0
        for block in self._blocks:
            start = 0
            while start < len(block):
                taken = min(len(block) - start, self._at_once - filled)
                chunk[filled : filled + taken] = block[start : start + taken]
                start, filled = start + taken, filled + taken
                if filled == self._at_once:
                    yield chunk
                    chunk, filled = np.zeros_like(chunk), 0
            self._release(block)
        if filled:
            yield chunk

    def assign(self, centroids: Float32[ndarray, "k d"], grid: Grid) -> Assignment:
        """Assign all rows to their nearest centroids; see `Shard.assign`."""
        wide = centroids.astype(np.float64)
        adds = grid == self._grid and wide.shape == self._centroids.shape
        if not adds:
            self._totals = torch.zeros(*wide.shape, dtype=torch.float64, device=self._device)
            self._sizes = torch.zeros(len(wide), dtype=torch.int64, device=self._device)
        self._grid = None  # until everything is updated
        nearest, left, changed = torch.from_numpy(centroids).to(self._device), self.rows, 0
        half = nearest.square().sum(1) / 2
        with torch.no_grad(), _float32():
            for rows, found in zip(self._rows, self._found, strict=True):
                now = torch.addmm(half, rows, nearest.T, alpha=-1)[:left].argmin(1)
                before = found[: len(now)]
                moved = torch.nonzero(now != before)[:, 0]
                changed += len(moved)
                seen = moved if adds else torch.arange(len(now), device=self._device)
                rounded = rows[seen].double().add_(grid.offset).sub_(grid.offset)
                self._totals.index_add_(0, now[seen], rounded)
                self._sizes += torch.bincount(now[seen], minlength=len(wide))
                if adds:
                    self._totals.index_add_(0, before[seen], rounded, alpha=-1)
                    self._sizes -= torch.bincount(before[seen], minlength=len(wide))
                before.copy_(now)
                left -= len(now)
        self._keep_labels()
        self._grid, self._centroids = grid, wide
        sums, counts = self._totals.cpu().numpy(), self._sizes.cpu().numpy()
        lengths = np.square(wide).sum(1)
        inertia = self._squares - 2 * float((wide * sums).sum()) + float(lengths @ counts)
        return Assignment(sums, counts, max(0.0, inertia), changed)

    def _keep_labels(self) -> None:
        labels = torch.cat(self._found).to(torch.int32).cpu().numpy() if self._found else np.empty(0, np.int32)
        for start, kept in zip(self._starts, self._labels, strict=False):
            kept[:] = labels[start : start + len(kept)]


@contextmanager
def _float32() -> Iterator[None]:
    """Compute products in full float32, whatever precision the process uses otherwise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
