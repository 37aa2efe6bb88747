"""Hold a shard of features in one process: on its GPU if it has one and they fit, otherwise in its own memory.

A shard is read by the process that holds it, so a restarted Ray actor reads its own shard again.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32, Int
from numpy import ndarray

from transfgu.kmeans import Assignment, Grid, Shard
from transfgu.store.scratch import Scratch
from transfgu.whitening import Moments, Whitening

logger = logging.getLogger(__name__)

NEAREST = 8
"""Number of windows kept per concept, for the report."""

PLACE = ("index", "y0", "y1", "x0", "x1")
"""Columns with the place of a window: index of its image, and its sides in pixels."""

GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")
"""Files of NVIDIA's driver, on Linux and in WSL."""


@dataclass
class Rows:
    """Rows of features, in pieces, and for windows their places: columns index, y0, y1, x0, x1."""

    pieces: list[ndarray]
    scratch: Scratch | None = None
    """File of the pieces, if on disk; None: in memory."""
    places: list[ndarray] = field(default_factory=list)


Source = Callable[[], dict[str, Rows]]


class KMeansActor:
    """One shard, read on first use, in this process or, as a Ray actor, in another."""

    def __init__(self, source: Source, threads: int) -> None:
        self._source, self._threads = source, threads
        self._white: dict[str, Shard] = {}

    # Methods with a whitening use the whitened rows; without one, the original rows. Each call passes it, because a
    # restarted actor has none.

    @functools.cached_property
    def _groups(self) -> dict[str, tuple[Shard, list[ndarray]]]:
        rows = self._source()
        return {name: (own_shard(r.pieces, self._threads, r.scratch), r.places) for name, r in rows.items()}

    def computes_on(self) -> str:
        """Return the name of the class that assigns rows in this process: `Shard` or `DeviceShard`."""
        return type(next(iter(self._groups.values()))[0]).__name__

    def _shard(self, group: str, whitening: Whitening | None) -> Shard:
        if whitening is None:
            return self._groups[group][0]
        if group not in self._white:
            self._white[group] = self._groups[group][0].whitened(whitening)
        return self._white[group]

    def measure(self, group: str, whitening: Whitening | None = None) -> tuple[int, float]:
        """Return the number of rows and their largest absolute value, which is not finite if one value is not."""
        shard = self._shard(group, whitening)
        return shard.rows, shard.largest

    def moments(self, group: str, step: float) -> Moments | None:
        """Return the sums from which a whitening is computed; None without rows."""
        shard = self._shard(group, None)
        return shard.moments(step) if shard.rows else None

    def sums_before(
        self, group: str, centroids: Float32[ndarray, "k d"], grid: Grid, grid_before: Grid, whitening: Whitening
    ) -> tuple[ndarray, Int[ndarray, " k"]]:
        """Return sums, before whitening, and number of the rows nearest to each centroid."""
        sums, counts = self._shard(group, whitening).sums_before(centroids, grid, grid_before)
        return (sums if sums.size else np.zeros_like(centroids, np.float64)), counts

    def take(
        self, group: str, rows: Int[ndarray, " n"], whitening: Whitening | None = None
    ) -> Float32[ndarray, "n d"] | None:
        """Return the rows with these numbers in the shard; None if there are none."""
        return self._shard(group, whitening).take(rows) if len(rows) else None

    def starts(
        self, k: int, seed: int, numbers: Sequence[int], *samples: Float32[ndarray, "_ d"] | None
    ) -> list[tuple[float, Float32[ndarray, "k d"]]]:
        """Run K-Means on a sample from the starts of these numbers; returns inertia and centroids of each."""
        sample = np.concatenate([s for s in samples if s is not None])
        return own_shard([sample], self._threads).starts(k, seed, numbers)

    def assign(
        self, group: str, centroids: Float32[ndarray, "k d"], grid: Grid, whitening: Whitening | None = None
    ) -> Assignment:
        """Run one pass over the shard."""
        return self._shard(group, whitening).assign(centroids, grid)

    def nearest(
        self, group: str, centroids: Float32[ndarray, "k d"], grid: Grid, whitening: Whitening | None = None
    ) -> pa.Table:
        """Return the windows of this shard that may be among the nearest to their concept."""
        shard, places = self._shard(group, whitening), self._groups[group][1]
        shard.assign(centroids, grid)  # a restarted actor has no assignment yet
        columns = {"concept": shard.labels(), **dict(zip(PLACE, np.concatenate(places).T, strict=True))}
        return nearest_windows(pa.table({**columns, "distance": shard.distances(centroids).astype(np.float32)}))


def nearest_windows(windows: pa.Table, count: int = NEAREST) -> pa.Table:
    """Return the `count` windows nearest to each concept, one per image if there are enough images.

    All windows of an image are in one shard, so applying this to the results of all shards gives the result for all
    windows.

    Args:
        windows: columns `concept`, `index` (of the image), `distance`, and others.
        count: windows per concept.
    """
    concept, image, distance = (windows[name].to_numpy() for name in ("concept", "index", "distance"))
    order = np.lexsort((distance, concept))  # stable: by concept, distance, and place in the table
    chosen = []
    for rows in np.split(order, np.flatnonzero(np.diff(concept[order])) + 1):
        first = np.zeros(len(rows), bool)
        first[np.unique(image[rows], return_index=True)[1]] = True
        preferred = np.concatenate([rows[first], rows[~first]])[:count]
        chosen.append(preferred[np.argsort(distance[preferred], kind="stable")])
    return windows.take(np.concatenate(chosen))


def matrix(column: pa.ChunkedArray) -> Float[ndarray, "n d"]:
    """Return a column of lists or tensors of one length as a matrix; a column in one piece is not copied."""
    array = column.combine_chunks()
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    width = getattr(array.type, "list_size", -1 if len(array) else 0)
    matrix: ndarray = array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), width)
    return matrix


def own_shard(
    pieces: Sequence[ndarray],
    threads: int | None = None,
    scratch: Scratch | None = None,
    *,
    gpu_files: Sequence[str] = GPU_FILES,
) -> Shard:
    """Return the rows in the memory of this process's GPU if it has one and they fit, otherwise in its own.

    Each process decides for itself, because the driver may run on a machine without a GPU.

    Args:
        pieces: arrays of rows, (n, d) each.
        threads: CPU threads of the shard; None: one per core.
        scratch: file of the pieces, if on disk.
        gpu_files: files of which one exists if there is a GPU driver.
    """
    if not any(Path(file).exists() for file in gpu_files):  # torch takes seconds to import
        return Shard(pieces, threads, scratch)
    import torch

    from transfgu.device_kmeans import DeviceShard
    from transfgu.inference.device import without_gpus

    if without_gpus() or not torch.cuda.is_available():
        return Shard(pieces, threads, scratch)
    try:
        return DeviceShard(pieces, torch.device("cuda"), threads, scratch=scratch)
    except torch.OutOfMemoryError:
        logger.warning("concepts: the features do not fit the GPU's memory: K-Means runs on the CPU of this node")
        torch.cuda.empty_cache()
        return Shard(pieces, threads, scratch)
