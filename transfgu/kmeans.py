"""K-Means with exact sums: the result is the same to the last bit on any number of workers.

Rows are rounded to a grid that all shards share, so float64 sums are exact and do not depend on the order of threads,
actors or nodes. An exact sum can also be subtracted again, so a pass adds only the rows that change their centroid.

A row keeps its centroid as long as the centroids' moves are together smaller than its margin to the second nearest
(Hamerly, 2010). A pass looks at the other rows only; after some passes these are few.
"""

import functools
import itertools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
from jaxtyping import Float32, Float64, Int, Int32
from numpy import ndarray
from scipy import sparse

from transfgu.errors import UserError
from transfgu.store.scratch import Scratch
from transfgu.whitening import Moments, Whitening, moment_step, moments

CHUNK = 1024  # rows; with 384 columns a chunk is 1.5 MB, so the sums read from the cache what the assignment has read
_BLOCK = 16  # chunks whose bounds are checked together, because threads wait for each other at every call from Python
_STARTS = 8
_START_ITERATIONS = 5
_SEED_CANDIDATES = 4
_SPLIT = 1 / 1024  # relative, alternating in sign; FAISS splits clusters by as much
_SEARCH_ERROR = 4e-6  # error of FAISS's squared distances, relative to the squared lengths of the vectors
_BOUND_ERROR = 3e-5  # relative error of float32 bounds after adding hundreds of moves
# Results for a row must not depend on the number of rows searched together: FAISS uses another method for a few.
faiss.cvar.distance_compute_blas_threshold = 1


@dataclass(frozen=True)
class KMeansResult:
    """The result of K-Means.

    Args:
        centroids: the k means.
        counts: number of rows nearest to each centroid.
        inertia: sum over all rows of the squared distance to the nearest centroid.
        iterations: updates until assignments stopped changing, or the limit was reached.
    """

    centroids: Float32[ndarray, "k d"]
    counts: Int[ndarray, " k"]
    inertia: float
    iterations: int


@dataclass(frozen=True)
class Assignment:
    """The result of one pass over some rows; results of several can be added.

    Args:
        sums: sum of the rows nearest to each centroid, on the grid that all passes share.
        counts: number of these rows.
        inertia: sum of squared distances to the nearest centroid.
        changed: number of rows whose nearest centroid was another one in the previous pass.
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
        rows: total number of rows.
        largest: their largest absolute value.
    """

    def __init__(self, rows: int, largest: float) -> None:
        # A float64 near 3 * 2^e has its last bit at 2^(e - 51): adding this number and subtracting it again rounds to
        # that bit, whatever else is added later. |sum| <= 2^e keeps all of its multiples exact.
        bound = max(rows * largest, float(np.finfo(np.float32).tiny))
        self.offset = 3.0 * 2.0 ** (math.ceil(math.log2(bound)) + 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and self.offset == other.offset

    def round(self, rows: Float32[ndarray, "n d"]) -> Float64[ndarray, "n d"]:
        """Return `rows` rounded to the grid."""
        shifted: ndarray = rows + np.float64(self.offset)
        shifted -= self.offset
        return shifted


Start = Literal["best", "faiss"]
"""What K-Means starts from; see :func:`cluster`."""


class Shards(ABC):
    """Rows in one or several processes, ordered as in one long array."""

    rows: int
    """Number of rows."""

    largest: float
    """Their largest absolute value; not finite if one value is not."""

    @abstractmethod
    def best_start(self, rows: Int[ndarray, " n"], k: int, seed: int) -> Float32[ndarray, "k d"]:
        """Return the centroids of least inertia among several starts on the rows of these numbers."""

    @abstractmethod
    def take(self, rows: Int[ndarray, " n"]) -> Float32[ndarray, "n d"]:
        """Return the rows with these numbers, counted from 0 at the first row."""

    @abstractmethod
    def assign(self, centroids: Float32[ndarray, "k d"], grid: Grid) -> Assignment:
        """Assign all rows to their nearest centroids."""

    @abstractmethod
    def moments(self, step: float) -> Moments:
        """Return sums over all rows from which a whitening is computed; see :func:`transfgu.whitening.moments`."""

    @abstractmethod
    def whitened(self, whitening: Whitening) -> "Shards":
        """Return the rows whitened and scaled to unit length; the original rows are kept."""

    @abstractmethod
    def means_before(self, centroids: Float32[ndarray, "k d"]) -> Float32[ndarray, "k d"]:
        """For whitened rows: return the mean, before whitening, of the rows nearest to each centroid.

        A centroid without rows gets the mean of all.
        """


class Shard(Shards):
    """Rows in the memory of one process, processed by its threads.

    Args:
        pieces: (n, d) arrays; chunks do not extend from one to the next. Contiguous float32 is used without a copy.
        threads: number of threads; None: one per core that the process may use.
        scratch: file of the pieces, if they are on disk; whitened rows are stored there, too.
    """

    def __init__(self, pieces: Sequence[ndarray], threads: int | None = None, scratch: Scratch | None = None) -> None:
        block = _BLOCK * CHUNK
        arrays = [np.ascontiguousarray(p, np.float32) for p in pieces]
        self._blocks = [a[i : i + block] for a in arrays for i in range(0, len(a), block)]
        self._scratch = scratch
        self._starts = np.cumsum([0, *map(len, self._blocks)])
        self._labels = [np.full(len(b), -1, np.int32) for b in self._blocks]
        # For each row: an upper bound of the distance to its centroid, and a lower bound of those to all others.
        self._bounds = [np.empty((2, len(b)), np.float32) for b in self._blocks]
        self._threads = threads or cores()
        # Blocks are divided among Python threads, each with a single OpenMP thread: results for a row must not depend
        # on the number of threads, and no core waits for another after every chunk.
        self._pool = ThreadPoolExecutor(self._threads, initializer=faiss.omp_set_num_threads, initargs=(1,))
        self.rows = int(self._starts[-1])
        measures = np.array([*self._pool.map(self._measure, self._blocks)]).reshape(-1, 3)
        self.largest = float(measures[:, 0].max(initial=0))  # keeps NaN
        self._reach = measures[:, 1]
        self._squares = float(measures[:, 2].sum())
        # Results of the latest pass; the grid is None if there was none.
        self._grid: Grid | None = None
        self._centroids = np.empty((0, 0))
        self._sums, self._counts = np.empty((0, 0)), np.empty(0, np.int64)
        self._before: Shard | None = None  # for whitened rows: the original rows

    def _measure(self, block: Float32[ndarray, "n d"]) -> tuple[float, float, float]:
        measured = _measure(block)
        self._release(block)
        return measured

    def _release(self, block: Float32[ndarray, "n d"]) -> None:
        """Release the memory of a block on disk."""
        if self._scratch:
            self._scratch.release(block)

    def take(self, rows: Int[ndarray, " n"]) -> Float32[ndarray, "n d"]:
        """Return the rows with these numbers, counted from 0 at the first row of this shard."""
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        return np.stack([self._blocks[b][r - self._starts[b]] for b, r in zip(owners, rows, strict=True)])

    def assign(self, centroids: Float32[ndarray, "k d"], grid: Grid) -> Assignment:
        """Assign all rows to their nearest centroids."""
        wide = centroids.astype(np.float64)
        moves = None
        if grid == self._grid and wide.shape == self._centroids.shape:
            moves = _Moves(np.linalg.norm(wide - self._centroids, axis=1))
        else:
            self._sums, self._counts = np.zeros(wide.shape), np.zeros(len(wide), np.int64)
        self._grid = None  # until everything is updated
        index: Any = faiss.IndexFlatL2(centroids.shape[1])
        index.add(centroids)
        lengths = np.square(wide).sum(1)
        numbers = iter(range(len(self._blocks)))  # shared by all threads: a free thread takes the next block
        passes = self._pool.map(
            lambda _: self._assign(index, float(lengths.max()), wide.shape, moves, grid, numbers), range(self._threads)
        )
        changed = 0
        for sums, counts, count in passes:
            self._sums += sums
            self._counts += counts
            changed += count
        self._grid, self._centroids = grid, wide
        # The sum of |x - c|^2, expanded.
        inertia = self._squares - 2 * float((wide * self._sums).sum()) + float(lengths @ self._counts)
        return Assignment(self._sums.copy(), self._counts.copy(), max(0.0, inertia), changed)

    def _assign(
        self,
        index: Any,
        reach: float,
        shape: tuple[int, ...],
        moves: "_Moves | None",
        grid: Grid,
        numbers: Iterator[int],
    ) -> tuple[Float64[ndarray, "k d"], Int[ndarray, " k"], int]:
        """Return the contribution of blocks to sums and counts, and the number of their rows that changed."""
        k = shape[0]
        sums, counts, changed = np.zeros(shape), np.zeros(k, np.int64), 0
        for number in numbers:
            block, labels, (upper, lower) = self._blocks[number], self._labels[number], self._bounds[number]
            error = _SEARCH_ERROR * (self._reach[number] + reach)
            for seen in self._looked_at(labels, None if moves is None else moves.in_doubt(labels, upper, lower)):
                rows = block[seen]
                squared, found = index.search(rows, 2)
                upper[seen] = np.sqrt(squared[:, 0] + error)
                lower[seen] = np.sqrt(np.maximum(squared[:, 1] - error, 0))
                now = found[:, 0]
                other = np.flatnonzero(now != labels[seen])
                before = labels[seen][other]
                labels[seen] = now
                changed += len(other)
                if moves is None:
                    sums += _gains(k, now) @ grid.round(rows)
                    counts += np.bincount(now, minlength=k)
                elif len(other):
                    rounded = grid.round(rows[other])
                    sums += (_gains(k, now[other]) - _gains(k, before)) @ rounded
                    counts += np.bincount(now[other], minlength=k) - np.bincount(before, minlength=k)
            self._release(block)
        return sums, counts, changed

    def _looked_at(
        self, labels: Int32[ndarray, " n"], doubted: Int[ndarray, " m"] | None
    ) -> Iterator[slice | Int[ndarray, " c"]]:
        """Yield the rows of a block to check, in chunks; slices, which copy nothing, if all are checked."""
        if doubted is None or len(doubted) == len(labels):
            yield from (slice(i, i + CHUNK) for i in range(0, len(labels), CHUNK))
        else:
            yield from (doubted[i : i + CHUNK] for i in range(0, len(doubted), CHUNK))

    def moments(self, step: float) -> Moments:
        """Return sums over all rows from which a whitening is computed; see :func:`transfgu.whitening.moments`."""

        def of_block(block: Float32[ndarray, "n d"]) -> Moments:
            found = functools.reduce(Moments.__add__, (moments(rows, step) for rows in _cut([block])))
            self._release(block)
            return found

        return functools.reduce(Moments.__add__, self._pool.map(of_block, self._blocks))

    def whitened(self, whitening: Whitening) -> "Shard":
        """Return the rows whitened and scaled to unit length; the original rows are kept."""

        def of_block(block: Float32[ndarray, "n d"]) -> Float32[ndarray, "n d"]:
            white = self._scratch.empty(block.shape) if self._scratch else np.empty(block.shape, np.float32)
            for before, after in zip(_cut([block]), _cut([white]), strict=True):
                np.copyto(after, whitening.apply(before))
            for array in (block, white):
                self._release(array)
            return white

        white = list(self._pool.map(of_block, self._blocks))
        shard = self._like(white)
        shard._before = self
        return shard

    def _like(self, pieces: Sequence[ndarray]) -> "Shard":
        """Return a shard with other rows in the same place."""
        return Shard(pieces, self._threads, self._scratch)

    def means_before(self, centroids: Float32[ndarray, "k d"]) -> Float32[ndarray, "k d"]:
        """For whitened rows: return the mean, before whitening, of the rows nearest to each centroid."""
        before = self._before
        if before is None:
            raise ValueError("these rows are not whitened")
        sums = self.sums_before(centroids, Grid(self.rows, self.largest), Grid(before.rows, before.largest))
        return means(*sums)

    def sums_before(
        self, centroids: Float32[ndarray, "k d"], grid: Grid, grid_before: Grid
    ) -> tuple[Float64[ndarray, "k d"], Int[ndarray, " k"]]:
        """For whitened rows: return sums, before whitening, and number of the rows nearest to each centroid."""
        assert self._before
        counts = self.assign(centroids, grid).counts
        before = self._before
        sums = np.zeros((len(centroids), before._blocks[0].shape[1] if before._blocks else 0))
        for block, found in zip(before._blocks, self._labels, strict=True):
            for rows, labels in zip(_cut([block]), _cut([found]), strict=True):
                sums += _gains(len(centroids), labels) @ grid_before.round(rows)
            before._release(block)
        return sums, counts

    def labels(self) -> Int32[ndarray, " n"]:
        """Return each row's nearest centroid in the latest pass; -1 if there was no pass."""
        return np.concatenate([np.empty(0, np.int32), *self._labels])

    def distances(self, centroids: Float32[ndarray, "k d"]) -> Float64[ndarray, " n"]:
        """Return each row's distance to its centroid of the latest pass; differences are computed in float64."""

        def of_block(block: Float32[ndarray, "n d"], found: Int32[ndarray, " n"]) -> list[Float64[ndarray, " c"]]:
            cut = zip(_cut([block]), _cut([found]), strict=True)
            distances = [np.linalg.norm(rows - centroids[labels].astype(np.float64), axis=1) for rows, labels in cut]
            self._release(block)
            return distances

        parts = self._pool.map(of_block, self._blocks, self._labels)
        return np.concatenate([np.empty(0), *itertools.chain.from_iterable(parts)])

    def starts(self, k: int, seed: int, numbers: Sequence[int]) -> list[tuple[float, Float32[ndarray, "k d"]]]:
        """Yield, for the starts of these numbers, inertia over all rows and centroids after a few iterations.

        Every start has its own generator, so it is the same in any process.
        """
        rows = np.concatenate(self._blocks)
        grid = Grid(self.rows, self.largest)
        seeds = self._pool.map(lambda n: _plus_plus(rows, k, np.random.default_rng([seed, n])), numbers)
        found = (_lloyd(lambda c: self.assign(c, grid), s, _START_ITERATIONS) for s in seeds)
        return [(result.inertia, result.centroids) for result in found]

    def best_start(self, rows: Int[ndarray, " n"], k: int, seed: int) -> Float32[ndarray, "k d"]:
        """Return the centroids of least inertia among several starts on the rows of these numbers."""
        return least(Shard([self.take(rows)], self._threads).starts(k, seed, START_NUMBERS))


START_NUMBERS = range(_STARTS)


def least(starts: Sequence[tuple[float, Float32[ndarray, "k d"]]]) -> Float32[ndarray, "k d"]:
    """Return the centroids of least inertia; of equal ones, the first."""
    return min(starts, key=lambda start: start[0])[1]


def means(sums: Float64[ndarray, "k d"], counts: Int[ndarray, " k"]) -> Float32[ndarray, "k d"]:
    """Return the mean of each cluster; for a cluster without rows, the mean of all rows."""
    overall = sums.sum(0) / counts.sum()
    found: ndarray = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], overall).astype(np.float32)
    return found


def whitened(shards: Shards) -> Shards:
    """Whiten rows by their own covariance, then scale them to unit length.

    If one property of all rows (such as the brightness of a window) varies most, distances reflect little else; after
    whitening all directions have the same weight.

    Raises:
        UserError: a row that is not finite.
    """
    _check_finite(shards)
    step = moment_step(shards.rows, shards.largest)
    return shards.whitened(Whitening.of(shards.moments(step), shards.largest))


def _check_finite(shards: Shards) -> None:
    if not math.isfinite(shards.largest):
        raise UserError(
            "the features hold NaN or infinite values, which have no mean: leave them out", code="features-not-finite"
        )


def cluster(
    shards: Shards,
    k: int,
    *,
    iterations: int = 100,
    seed: int = 0,
    start: Start = "best",
    resume: tuple[int, ndarray] | None = None,
    after: Callable[[int, ndarray], None] | None = None,
) -> KMeansResult:
    """Run K-Means by Lloyd's iterations over all rows from a start, by default the best of several on a sample.

    It ends when a pass changes no assignment, or after `iterations` updates. A cluster that has lost all rows gets half
    of the largest one. The result depends only on rows, their order, k and seed.

    Args:
        shards: the rows.
        k: number of clusters.
        iterations: maximum number of updates.
        seed: seed of the sample and of the starts.
        start: `best` of several k-means++ starts on a sample, or `faiss`: the rows from which FAISS starts with this
            seed.
        resume: number of updates of an earlier attempt, and its last centroids.
        after: called after every update with the number of updates and the centroids.

    Raises:
        UserError: more clusters than rows, or a row that is not finite.

    Source: TransFGU, section 3.1; k-means++ by Arthur and Vassilvitskii (2007), greedy as in their section 6.
    """
    if not 0 < k <= shards.rows:
        raise UserError(
            f"{k} clusters are too many for {shards.rows} features: choose 1 to {shards.rows}",
            code="concepts-too-many",
        )
    _check_finite(shards)
    grid = Grid(shards.rows, shards.largest)
    if resume is None:
        if start == "faiss":
            resume = 0, shards.take(faiss_rows(shards.rows, k, seed))
        else:
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
    # Changes of the first pass mean nothing, because the previous pass may belong to another clustering.
    while made < iterations and not settled:
        centroids = update(assignment)
        made += 1
        if after:
            after(made, centroids)
        assignment = assign(centroids)
        settled = not assignment.changed
    return KMeansResult(centroids, assignment.counts, assignment.inertia, made)


def update(assignment: Assignment) -> Float32[ndarray, "k d"]:
    """Return the mean of each cluster; a cluster without rows shares the rows of the largest one.

    The two are moved apart by 1/1024 of each coordinate, up and down in turn, as in FAISS; FAISS draws the cluster to
    split, here it is the largest.
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
    """Return ascending numbers of the rows for the starts: 256 per cluster (as in FAISS), at least 10,000."""
    size = min(rows, max(256 * k, 10_000))
    return np.sort(np.random.default_rng(seed).choice(rows, size, replace=False, shuffle=False))


def faiss_rows(rows: int, k: int, seed: int) -> Int[ndarray, " k"]:
    """Return the numbers of the rows that FAISS's K-Means takes as its first centroids, of its first start.

    Source: `Clustering::train_encoded` of facebookresearch/faiss, without its sampling of rows.
    """
    numbers = np.empty(rows, np.int32)
    faiss.rand_perm(faiss.swig_ptr(numbers), rows, seed + 1)  # type: ignore[attr-defined]
    return numbers[:k].astype(np.int64)


def _plus_plus(rows: Float32[ndarray, "n d"], k: int, generator: np.random.Generator) -> Float32[ndarray, "k d"]:
    """Return seeds far apart: each is the best of a few draws with probability proportional to the squared distance."""
    size = min(len(rows), max(16 * k, 4096))
    rows = rows[generator.choice(len(rows), size, replace=False)]
    chosen = [int(generator.integers(size))]
    distances = _squared(rows, rows[chosen])[0]
    while len(chosen) < k:
        heights = np.cumsum(distances, dtype=np.float64)
        draws = generator.random(_SEED_CANDIDATES)
        # If every row equals a seed, all choices are the same.
        drawn = np.searchsorted(heights, draws * heights[-1], side="right") if heights[-1] else draws * size
        candidates = np.minimum(drawn.astype(np.int64), size - 1)
        nearer = np.minimum(distances, _squared(rows, rows[candidates]))
        best = int(nearer.sum(1, dtype=np.float64).argmin())
        chosen.append(int(candidates[best]))
        distances = nearer[best]
    return rows[chosen]


def _squared(rows: Float32[ndarray, "n d"], seeds: Float32[ndarray, "c d"]) -> Float32[ndarray, "c n"]:
    return np.asarray(np.maximum(faiss.pairwise_distances(seeds, rows), 0))


class _Moves:
    """The distance that each centroid has moved since the previous pass, and its effect on bounds."""

    def __init__(self, own: Float64[ndarray, " k"]) -> None:
        self._own = own
        self._others = np.full(len(own), own.max())  # the largest move of any other centroid
        if len(own) > 1:
            self._others[own.argmax()] = np.partition(own, -2)[-2]

    def in_doubt(
        self, labels: Int32[ndarray, " n"], upper: Float32[ndarray, " n"], lower: Float32[ndarray, " n"]
    ) -> Int[ndarray, " m"]:
        """Return the rows that may have another nearest centroid now, and update the bounds."""
        upper += self._own[labels]
        lower -= self._others[labels]
        return np.flatnonzero(upper >= lower - _BOUND_ERROR * np.abs(lower))


def _cut(blocks: Sequence[ndarray]) -> Iterator[ndarray]:
    """Yield all blocks in chunks."""
    return (block[i : i + CHUNK] for block in blocks for i in range(0, len(block), CHUNK))


def _gains(k: int, labels: Int[ndarray, " n"]) -> Any:
    """Return a sparse (k, n) matrix with a single 1 in each column, in the row of its label."""
    n = len(labels)
    return sparse.csc_array((np.ones(n), labels, np.arange(n + 1)), shape=(k, n))


def _measure(block: Float32[ndarray, "n d"]) -> tuple[float, float, float]:
    """Return the largest absolute value, the largest of the rows' squared lengths, and their sum."""
    chunks = [block[i : i + CHUNK] for i in range(0, len(block), CHUNK)]
    extremes = [x for chunk in chunks for x in (chunk.min(), chunk.max())]
    squares = np.concatenate([np.square(chunk, dtype=np.float64).sum(1) for chunk in chunks])
    return float(np.abs(extremes).max()), float(squares.max()), float(squares.sum())


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
