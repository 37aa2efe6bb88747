"""K-Means gives the same bits on any number of workers once its sums are exact, and exact sums are cheap.

Rows are assigned and summed in fixed chunks that stay in cache between the two, so a chunk's float32 sum depends on
nothing but its rows and the centroids. Rounded to one grid that all chunks share, these sums add up in float64 without
error, hence in any order: over threads, over actors, over nodes.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from jaxtyping import Float32, Float64, Int, Int32
from numpy import ndarray
from scipy import sparse

from transfgu.errors import UserError

CHUNK = 1024  # rows; with 384 columns a chunk is 1.5 MB, and the sums find in cache what the assignment read
_GPU_CHUNK = 8192  # rows; on a GPU each chunk costs a transfer and a launch
_STARTS = 8
_START_ITERATIONS = 5
_SEED_CANDIDATES = 4
_SPLIT = 1 / 1024  # relative, alternating in sign; FAISS splits clusters by as much


@dataclass(frozen=True)
class KMeansResult:
    """What K-Means found.

    Args:
        centroids: the k means.
        counts: rows nearest to each centroid.
        inertia: sum over all rows of the squared distance to the nearest centroid.
        iterations: updates made before assignments stopped changing, or the limit was reached.
    """

    centroids: Float32[ndarray, "k d"]
    counts: Int[ndarray, " k"]
    inertia: float
    iterations: int


@dataclass(frozen=True)
class Assignment:
    """One pass over some rows, to be added to those over others.

    Args:
        sums: sum of the rows nearest to each centroid, on the grid that all passes share.
        counts: their number.
        inertia: sum of squared distances to the nearest centroid.
        changed: rows whose nearest centroid was another one in the pass before.
    """

    sums: Float64[ndarray, "k d"]
    counts: Int[ndarray, " k"]
    inertia: float
    changed: int

    def __add__(self, other: "Assignment") -> "Assignment":
        return Assignment(
            self.sums + other.sums,
            self.counts + other.counts,
            self.inertia + other.inertia,
            self.changed + other.changed,
        )


class Grid:
    """Multiples of one power of two, fine enough for any row and coarse enough that sums of all rows are exact.

    Args:
        rows: how many rows there are in all.
        largest: the largest absolute value among them.
    """

    def __init__(self, rows: int, largest: float) -> None:
        # A float64 near 3 * 2^e has its last bit at 2^(e - 51): adding this number and taking it away rounds to that
        # bit, the same way whatever else is added later. |sum| <= 2^e leaves all of its multiples exact.
        bound = max(rows * largest, float(np.finfo(np.float32).tiny))
        self._offset = 3.0 * 2.0 ** (math.ceil(math.log2(bound)) + 1)

    def round(self, sums: Float32[ndarray, "k d"]) -> Float64[ndarray, "k d"]:
        """`sums` on the grid."""
        shifted: ndarray = sums + np.float64(self._offset)
        shifted -= self._offset
        return shifted


class Shards(ABC):
    """Rows, wherever they lie; their order is that of one long array."""

    rows: int
    """How many there are."""

    largest: float
    """Their largest absolute value; not finite if one of theirs is not."""

    @abstractmethod
    def best_start(self, rows: Int[ndarray, " n"], k: int, seed: int) -> Float32[ndarray, "k d"]:
        """Of several starts on the rows of these numbers, the centroids of least inertia."""

    @abstractmethod
    def assign(self, centroids: Float32[ndarray, "k d"], grid: Grid) -> Assignment:
        """One pass over all rows."""


class Shard(Shards):
    """Rows in the memory of one process, worked through by its threads.

    Args:
        pieces: (n, d) arrays; chunks do not cross from one to the next. Contiguous float32 is used where it lies,
            anything else is copied.
        threads: how many; None: one for each core that the process may use.
        gpu: assign on the first GPU.
    """

    def __init__(self, pieces: Sequence[ndarray], threads: int | None = None, gpu: bool = False) -> None:
        step = _GPU_CHUNK if gpu else CHUNK
        arrays = [np.ascontiguousarray(p, np.float32) for p in pieces]
        self._chunks = [a[i : i + step] for a in arrays for i in range(0, len(a), step)]
        self._starts = np.cumsum([0, *map(len, self._chunks)])
        self._labels = [np.full(len(c), -1, np.int32) for c in self._chunks]
        self._gpu = _gpu_resources() if gpu else None
        self._threads = 1 if gpu else threads or cores()
        # Chunks are shared out to Python threads, each a single OpenMP thread: a chunk's result must not depend on how
        # many there are, and no core waits for another at the end of every chunk.
        self._pool = ThreadPoolExecutor(self._threads, initializer=faiss.omp_set_num_threads, initargs=(1,))
        self.rows = int(self._starts[-1])
        extremes = [x for low_high in self._pool.map(_extremes, self._chunks) for x in low_high]
        self.largest = float(np.abs(extremes).max(initial=0))  # keeps NaN

    def take(self, rows: Int[ndarray, " n"]) -> Float32[ndarray, "n d"]:
        """The rows of these numbers, which count from 0 at this shard's first."""
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        return np.stack([self._chunks[c][r - self._starts[c]] for c, r in zip(owners, rows, strict=True)])

    def assign(self, centroids: Float32[ndarray, "k d"], grid: Grid) -> Assignment:
        """One pass over all rows."""
        index: Any = faiss.IndexFlatL2(centroids.shape[1])
        index.add(centroids)
        if self._gpu:
            index = faiss.index_cpu_to_gpu(self._gpu, 0, index)
        numbers = iter(range(len(self._chunks)))  # one for all threads: whichever is free takes the next chunk
        passes = self._pool.map(lambda _: self._assign(index, centroids.shape, grid, numbers), range(self._threads))
        return sum(passes, Assignment(np.zeros(centroids.shape), np.zeros(len(centroids), np.int64), 0.0, 0))

    def _assign(self, index: Any, shape: tuple[int, ...], grid: Grid, numbers: Iterator[int]) -> Assignment:
        k = shape[0]
        sums, counts, inertia, changed = np.zeros(shape), np.zeros(k, np.int64), 0.0, 0
        selector = _selector(CHUNK, k)
        for number in numbers:
            chunk, before = self._chunks[number], self._labels[number]
            distances, nearest = index.search(chunk, 1)
            labels = nearest[:, 0]
            for i in range(0, len(chunk), CHUNK):
                block = chunk[i : i + CHUNK]
                select = selector if len(block) == CHUNK else _selector(len(block), k)
                select.indices[:] = labels[i : i + CHUNK]
                sums += grid.round(select @ block)
            counts += np.bincount(labels, minlength=k)
            inertia += float(distances.sum(dtype=np.float64))
            changed += int(np.count_nonzero(labels != before))
            before[:] = labels
        return Assignment(sums, counts, inertia, changed)

    def labels(self) -> Int32[ndarray, " n"]:
        """Each row's nearest centroid in the latest pass; -1 where there was none."""
        return np.concatenate([np.empty(0, np.int32), *self._labels])

    def distances(self, centroids: Float32[ndarray, "k d"]) -> Float64[ndarray, " n"]:
        """Each row's distance to the centroid that the latest pass assigned it to; differences are taken in float64."""
        pairs = zip(self._chunks, self._labels, strict=True)
        parts = self._pool.map(lambda p: np.linalg.norm(p[0] - centroids[p[1]].astype(np.float64), axis=1), pairs)
        return np.concatenate([np.empty(0), *parts])

    def starts(self, k: int, seed: int, numbers: Sequence[int]) -> list[tuple[float, Float32[ndarray, "k d"]]]:
        """The starts of these numbers: inertia over all rows and centroids after a few iterations, for each.

        Every start draws from its own generator, so that it is the same whoever makes it.
        """
        rows = np.concatenate(self._chunks)
        grid = Grid(self.rows, self.largest)
        seeds = self._pool.map(lambda n: _plus_plus(rows, k, np.random.default_rng([seed, n])), numbers)
        found = (_lloyd(lambda c: self.assign(c, grid), s, _START_ITERATIONS) for s in seeds)
        return [(result.inertia, result.centroids) for result in found]

    def best_start(self, rows: Int[ndarray, " n"], k: int, seed: int) -> Float32[ndarray, "k d"]:
        """Of several starts on the rows of these numbers, the centroids of least inertia."""
        return least(Shard([self.take(rows)], self._threads).starts(k, seed, START_NUMBERS))


START_NUMBERS = range(_STARTS)


def least(starts: Sequence[tuple[float, Float32[ndarray, "k d"]]]) -> Float32[ndarray, "k d"]:
    """The centroids of least inertia, the first of them where several are equal."""
    return min(starts, key=lambda start: start[0])[1]


def cluster(
    shards: Shards,
    k: int,
    *,
    iterations: int = 100,
    seed: int = 0,
    resume: tuple[int, ndarray] | None = None,
    after: Callable[[int, ndarray], None] | None = None,
) -> KMeansResult:
    """K-Means by Lloyd's iteration: the best of several k-means++ starts on a sample, continued over all rows.

    It ends when a pass changes no assignment, or after `iterations` updates. A cluster that has lost all rows takes
    half of the largest one. The result depends on rows, their order, k and seed alone.

    Args:
        shards: the rows.
        k: number of clusters.
        iterations: updates at most.
        seed: of the sample and of the starts.
        resume: updates made by an earlier attempt, and the centroids it had come to.
        after: called after every update with the number of updates made and the centroids.

    Raises:
        UserError: more clusters than rows, or a row that is not finite.

    Source: TransFGU, section 3.1; k-means++ by Arthur and Vassilvitskii (2007), greedy as in their section 6.
    """
    if not 0 < k <= shards.rows:
        raise UserError(f"{k} clusters can't be made of {shards.rows} features: ask for 1 to {shards.rows}")
    largest = shards.largest
    if not math.isfinite(largest):
        raise UserError("the features hold NaN or infinite values, which have no mean: leave them out")
    grid = Grid(shards.rows, largest)
    if resume is None:
        resume = 0, shards.best_start(sample_rows(shards.rows, k, seed), k, seed)
    made, centroids = resume
    return _lloyd(lambda c: shards.assign(c, grid), centroids, iterations, made, after)


def _lloyd(
    assign: Callable[[ndarray], Assignment],
    centroids: Float32[ndarray, "k d"],
    iterations: int,
    made: int = 0,
    after: Callable[[int, ndarray], None] | None = None,
) -> KMeansResult:
    assignment, settled = assign(centroids), False
    # What the first pass changed says nothing: the pass before it may have been another clustering's.
    while made < iterations and not settled:
        centroids = update(assignment)
        made += 1
        if after:
            after(made, centroids)
        assignment = assign(centroids)
        settled = not assignment.changed
    return KMeansResult(centroids, assignment.counts, assignment.inertia, made)


def update(assignment: Assignment) -> Float32[ndarray, "k d"]:
    """The mean of each cluster; a cluster without rows and the largest one part what the largest has.

    The two are moved apart by 1/1024 of each coordinate, up and down in turn, as FAISS does; FAISS draws the cluster
    to split, here it is the largest.
    """
    counts = assignment.counts.astype(np.float64)
    means = assignment.sums / np.maximum(counts, 1)[:, None]
    apart = np.where(np.arange(means.shape[1]) % 2 == 0, 1 + _SPLIT, 1 - _SPLIT)
    for empty in np.flatnonzero(assignment.counts == 0):
        donor = counts.argmax()
        means[empty] = means[donor] * apart
        means[donor] *= 2 - apart
        counts[empty] = counts[donor] = counts[donor] / 2
    return means.astype(np.float32)


def sample_rows(rows: int, k: int, seed: int) -> Int[ndarray, " n"]:
    """Ascending numbers of the rows that starts are tried on: 256 a cluster (FAISS's measure), 10,000 at least."""
    size = min(rows, max(256 * k, 10_000))
    return np.sort(np.random.default_rng(seed).choice(rows, size, replace=False, shuffle=False))


def _plus_plus(rows: Float32[ndarray, "n d"], k: int, generator: np.random.Generator) -> Float32[ndarray, "k d"]:
    """Seeds far apart: each is the best of a few draws in proportion to the squared distance from those before."""
    size = min(len(rows), max(16 * k, 4096))
    rows = rows[generator.choice(len(rows), size, replace=False)]
    chosen = [int(generator.integers(size))]
    distances = _squared(rows, rows[chosen])[0]
    while len(chosen) < k:
        heights = np.cumsum(distances, dtype=np.float64)
        draws = generator.random(_SEED_CANDIDATES)
        # Where every row lies on a seed already, there is nothing to choose by.
        drawn = np.searchsorted(heights, draws * heights[-1], side="right") if heights[-1] else draws * size
        candidates = np.minimum(drawn.astype(np.int64), size - 1)
        nearer = np.minimum(distances, _squared(rows, rows[candidates]))
        best = int(nearer.sum(1, dtype=np.float64).argmin())
        chosen.append(int(candidates[best]))
        distances = nearer[best]
    return rows[chosen]


def _squared(rows: Float32[ndarray, "n d"], seeds: Float32[ndarray, "c d"]) -> Float32[ndarray, "c n"]:
    return np.asarray(np.maximum(faiss.pairwise_distances(seeds, rows), 0))


def _selector(rows: int, k: int) -> Any:
    """A sparse (k, rows) matrix with a single 1 in each column; whose row it is in is written to its `indices`."""
    ones, where = np.ones(rows, np.float32), np.zeros(rows, np.int32)
    return sparse.csc_matrix((ones, where, np.arange(rows + 1, dtype=np.int32)), shape=(k, rows))


def _extremes(chunk: Float32[ndarray, "n d"]) -> tuple[float, float]:
    return float(chunk.min()), float(chunk.max())


def _gpu_resources() -> Any:
    return faiss.StandardGpuResources()


def gpu_index() -> bool:
    """Whether this installation of FAISS can put an index on a GPU."""
    return hasattr(faiss, "StandardGpuResources")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
