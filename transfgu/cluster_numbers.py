"""Measure how well features fall into K clusters, for a range of K, without labels.

Stability is high if two halves of the images give the same clusters. With too many clusters, K-Means divides groups
without a gap, differently in each half; with too few, it joins different groups in each half. Windows of one image
overlap, so images are divided into halves, not windows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int
from numpy import ndarray

from transfgu.kmeans import Grid, Shard, cluster, whitened

_SILHOUETTE_ROWS = 2000  # number of rows whose pairs are all compared
_ITERATIONS = 50


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Measures for one K.

    Args:
        k: number of clusters.
        stability: mean adjusted Rand index between the assignments from two halves of the images; 1: the same.
        spread: standard deviation of that index over the divisions into halves.
        silhouette: mean silhouette of a sample of rows, -1 to 1.
        inertia: mean squared distance of a row to its centroid.
    """

    k: int
    stability: float
    spread: float
    silhouette: float
    inertia: float


def adjusted_rand(a: Int[ndarray, " n"], b: Int[ndarray, " n"]) -> float:
    """Return the adjusted Rand index of two assignments of the same rows: 1 for the same clusters, about 0 by chance.

    Source: Hubert and Arabie, Comparing partitions, Journal of Classification 2 (1985), equation 5.
    """
    table = np.zeros((int(a.max()) + 1, int(b.max()) + 1), np.int64)
    np.add.at(table, (a, b), 1)

    def pairs(counts: ndarray) -> float:
        return float((counts * (counts - 1) // 2).sum())

    both, of_a, of_b, every = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), math.comb(len(a), 2)
    expected = of_a * of_b / every if every else 0.0
    highest = (of_a + of_b) / 2
    return 1.0 if highest == expected else (both - expected) / (highest - expected)


def silhouette(rows: Float32[ndarray, "n d"], labels: Int[ndarray, " n"]) -> float:
    """Return the mean silhouette of rows, by Euclidean distance; 0 for a single row in a cluster, and for one cluster.

    Source: Rousseeuw, Silhouettes, Journal of Computational and Applied Mathematics 20 (1987).
    """
    found, index = np.unique(labels, return_inverse=True)
    if len(found) < 2:
        return 0.0
    wide = rows.astype(np.float64)
    square = np.square(wide).sum(1)
    distances = np.sqrt(np.maximum(square[:, None] + square[None] - 2 * wide @ wide.T, 0))
    np.fill_diagonal(distances, 0)
    members = np.eye(len(found))[index]
    sums, counts = distances @ members, members.sum(0)
    own = counts[index]
    within = sums[np.arange(len(rows)), index] / np.maximum(own - 1, 1)
    means = sums / counts
    means[np.arange(len(rows)), index] = np.inf
    nearest = means.min(1)
    higher = np.maximum(within, nearest)
    values = np.where((own > 1) & (higher > 0), (nearest - within) / np.where(higher > 0, higher, 1), 0)
    return float(values.mean())


def assign(rows: Float32[ndarray, "n d"], centroids: Float32[ndarray, "k d"]) -> Int[ndarray, " n"]:
    """Return the number of each row's nearest centroid."""
    shard = Shard([rows])
    shard.assign(centroids, Grid(shard.rows, shard.largest))
    return shard.labels().astype(np.int64)


def measure(
    rows: Float32[ndarray, "n d"],
    images: Int[ndarray, " n"],
    ks: Sequence[int],
    *,
    whiten: bool,
    seed: int = 0,
    divisions: int = 6,
    after: Callable[[int], None] | None = None,
) -> list[Measures]:
    """Measure each K on features.

    Each half of the images is clustered, and all rows are assigned to the centroids of either half. The stability is
    the adjusted Rand index of these two assignments, averaged over the divisions.

    Args:
        rows: the features.
        images: number of the image of each row.
        ks: numbers of clusters, each at least 2 and at most half of the number of rows.
        whiten: whiten the features first, as with `concepts.whiten`.
        seed: seed of the divisions into halves and of K-Means.
        divisions: number of divisions into halves.
        after: called after each K with the number of finished ones.
    """
    if whiten:
        shard = whitened(Shard([rows]))
        assert isinstance(shard, Shard)
        rows = shard.take(np.arange(shard.rows))
    generator = np.random.default_rng(seed)
    halves = [_halves(images, generator) for _ in range(divisions)]
    sample = np.sort(generator.choice(len(rows), min(len(rows), _SILHOUETTE_ROWS), replace=False))
    found = []
    for done, k in enumerate(ks, 1):
        whole = cluster(Shard([rows]), k, iterations=_ITERATIONS, seed=seed)
        agreements = []
        for half in halves:
            ways = [
                assign(rows, cluster(Shard([rows[own]]), k, iterations=_ITERATIONS, seed=seed + 1).centroids)
                for own in (half, ~half)
            ]
            agreements.append(adjusted_rand(*ways))
        found.append(
            Measures(
                k=k,
                stability=float(np.mean(agreements)),
                spread=float(np.std(agreements)),
                silhouette=silhouette(rows[sample], assign(rows[sample], whole.centroids)),
                inertia=whole.inertia / len(rows),
            )
        )
        if after:
            after(done)
    return found


def drawn_images(images: Int[ndarray, " n"], rows: int, seed: int = 0) -> Int[ndarray, " m"]:
    """Draw images that have at most so many rows together; returns their numbers, ascending.

    Args:
        images: number of the image of each row.
        rows: maximum number of rows.
        seed: seed of the draw.
    """
    numbers, counts = np.unique(images, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(numbers))
    kept = int(np.searchsorted(np.cumsum(counts[order]), rows, side="right"))
    return np.sort(numbers[order[:kept]])


def _halves(images: Int[ndarray, " n"], generator: np.random.Generator) -> ndarray:
    """Return a random half of the images: True for their rows."""
    names = generator.permutation(np.unique(images))
    return np.isin(images, names[: len(names) // 2])


def elbow(measures: Sequence[Measures]) -> int:
    """Return the K at which the curve of inertia is furthest below the line between its ends.

    Source: Satopaa et al., Finding a "Kneedle" in a Haystack (2011).
    """
    if len(measures) < 3:
        return measures[0].k
    x = np.array([m.k for m in measures], np.float64)
    y = np.array([m.inertia for m in measures])
    height = (y[0] - y) / ((y[0] - y[-1]) or 1.0) - (x - x[0]) / (x[-1] - x[0])
    return measures[int(height.argmax())].k


def as_stable(measures: Sequence[Measures]) -> list[int]:
    """Return the numbers K whose stability is at most one standard deviation below the highest, ascending."""
    best = max(measures, key=lambda m: m.stability)
    return [m.k for m in measures if m.stability >= best.stability - best.spread]


def suggested(measures: Sequence[Measures]) -> int:
    """Return the smallest K that is as stable as the most stable one.

    Among several whose difference is smaller than that between divisions, the smallest is the simplest, as in the
    one-standard-error rule of Breiman et al., Classification and Regression Trees (1984), section 3.4.3.

    Source: stability as a criterion: Ben-Hur, Elisseeff and Guyon, A stability based method for discovering structure
    in clustered data (2002); Lange et al., Stability-based validation of clustering solutions (2004).
    """
    return as_stable(measures)[0]
