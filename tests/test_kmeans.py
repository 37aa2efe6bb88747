"""K-Means by hand, against brute force in float64, and the same to the bit for any division of the rows."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray

from tests.refusals import refused
from transfgu.kmeans import CHUNK, Assignment, Grid, Shard, cluster, faiss_rows, sample_rows, update, whitened
from transfgu.runtime import spread
from transfgu.stages.concepts import kmeans, shards
from transfgu.store.scratch import Scratch


def blobs(rows: int, d: int, seed: int, centres: int = 12) -> ndarray:
    generator = np.random.default_rng(seed)
    means = 2 * generator.standard_normal((centres, d))
    return (means[generator.integers(0, centres, rows)] + generator.standard_normal((rows, d))).astype(np.float32)


def brute_force(rows: ndarray, centroids: ndarray) -> tuple[ndarray, float]:
    """Return the nearest centroid of each row, and the inertia, from all differences in float64."""
    squared = ((rows[:, None].astype(np.float64) - centroids) ** 2).sum(2)
    return squared.argmin(1), float(squared.min(1).sum())


def split(rows: ndarray, cuts: list[int]) -> list[Shard]:
    """Return shards of whole chunks, cut after the numbers of chunks in `cuts`."""
    return [Shard([piece], threads=1) for piece in np.split(rows, [CHUNK * c for c in cuts])]


def test_four_points_by_hand() -> None:
    # 0 and 2 have mean 1, 10 and 12 have mean 11, and each lies at distance 1 from its own.
    result = kmeans(np.array([[0.0], [2.0], [10.0], [12.0]]), 2)
    np.testing.assert_array_equal(np.sort(result.centroids, axis=0), [[1], [11]])
    np.testing.assert_array_equal(result.counts, [2, 2])
    assert result.inertia == 4
    assert result.centroids.dtype == np.float32


def test_one_pass_by_hand() -> None:
    shard = Shard([np.array([[0, 0], [2, 0], [9, 3]], np.float32)])
    first = shard.assign(np.array([[1, 0], [8, 3]], np.float32), Grid(3, 9.0))
    np.testing.assert_array_equal(first.sums, [[2, 0], [9, 3]])
    np.testing.assert_array_equal(first.counts, [2, 1])
    assert (first.inertia, first.changed) == (3, 3)
    np.testing.assert_array_equal(update(first), [[1, 0], [9, 3]])
    # The middle row is now nearer to the second centroid; the others stay where they were.
    second = shard.assign(np.array([[-4, 0], [4, 0]], np.float32), Grid(3, 9.0))
    assert second.changed == 1
    np.testing.assert_array_equal(shard.labels(), [0, 1, 1])  # the tie of the first row goes to the lower number
    np.testing.assert_allclose(shard.distances(np.array([[-4, 0], [4, 0]], np.float32)), [4, 2, math.sqrt(34)])


def test_an_empty_cluster_takes_half_of_the_largest() -> None:
    e = 1 / 1024
    assignment = Assignment(np.array([[8.0, 8, 8], [0, 0, 0], [3, 3, 3]]), np.array([4, 0, 3]), 0.0, 1)
    np.testing.assert_array_equal(
        update(assignment), [[2 - 2 * e, 2 + 2 * e, 2 - 2 * e], [2 + 2 * e, 2 - 2 * e, 2 + 2 * e], [1, 1, 1]]
    )
    # Two empty ones: the second takes from what is then the largest, three rows against twice two.
    assignment = Assignment(np.array([[8.0], [0], [0], [3]]), np.array([4, 0, 0, 3]), 0.0, 1)
    np.testing.assert_array_equal(update(assignment)[:, 0], np.array([2 - 2 * e, 2 + 2 * e, 1 + e, 1 - e]))


def test_a_split_cluster_wins_rows() -> None:
    rows = blobs(3000, 8, seed=5)
    grid, shard = Grid(len(rows), float(np.abs(rows).max())), Shard([rows])
    far = np.full((1, 8), 1e3, np.float32)  # nearest to no row
    assignment = shard.assign(np.concatenate([rows[:3], far]), grid)
    assert assignment.counts[3] == 0
    assert shard.assign(update(assignment), grid).counts.min() > 0


@pytest.mark.parametrize("seed", [0, 1])
def test_it_ends_where_every_centroid_is_the_mean_of_its_rows(seed: int) -> None:
    rows = blobs(2500, 12, seed)
    result = kmeans(rows, 9, seed=seed)
    assert 0 < result.iterations < 100
    nearest, inertia = brute_force(rows, result.centroids)
    np.testing.assert_array_equal(result.counts, np.bincount(nearest, minlength=9))
    assert result.inertia == pytest.approx(inertia, rel=1e-5)
    means = [rows[nearest == c].mean(0, dtype=np.float64) for c in range(9)]
    np.testing.assert_allclose(result.centroids, means, rtol=1e-5, atol=1e-6)


def test_fewer_updates_where_the_limit_is_low() -> None:
    rows = blobs(12_000, 6, seed=2)
    stopped, ended = kmeans(rows, 11, iterations=1), kmeans(rows, 11)
    assert stopped.iterations == 1 < ended.iterations
    assert stopped.inertia > ended.inertia
    # Counts and inertia are those of the centroids returned, not of the ones before.
    assert stopped.inertia == pytest.approx(brute_force(rows, stopped.centroids)[1], rel=1e-5)
    assert stopped.counts.sum() == len(rows)


def test_it_goes_on_where_an_attempt_was_interrupted() -> None:
    rows, seen = blobs(12_000, 6, seed=2), []
    whole = cluster(Shard([rows]), 11, after=lambda made, centroids: seen.append((made, centroids)))
    assert [made for made, _ in seen] == list(range(1, whole.iterations + 1))
    resumed = cluster(Shard([rows]), 11, resume=seen[len(seen) // 2])
    np.testing.assert_array_equal(resumed.centroids, whole.centroids)
    assert (resumed.iterations, resumed.inertia) == (whole.iterations, whole.inertia)


def test_as_many_clusters_as_rows() -> None:
    result = kmeans(np.arange(5.0)[:, None], 5)
    np.testing.assert_array_equal(np.sort(result.centroids[:, 0]), range(5))
    assert result.inertia == 0


def test_fewer_distinct_rows_than_clusters() -> None:
    result = kmeans(np.repeat(np.array([[1.0, 2], [5, 6]]), 50, axis=0), 4)
    assert result.counts.sum() == 100
    assert result.inertia == pytest.approx(0, abs=1e-2)
    assert kmeans(np.zeros((10, 3)), 3).inertia == 0


def test_another_seed_is_another_sample() -> None:
    rows = sample_rows(200_000, 10, 0)
    assert len(rows) == 10_000 == len(set(rows.tolist()))
    assert len(sample_rows(200_000, 100, 0)) == 25_600
    assert (np.diff(rows) > 0).all()
    assert (rows != sample_rows(200_000, 10, 1)).any()
    np.testing.assert_array_equal(sample_rows(7, 10, 1), range(7))


def test_any_layout_and_type_of_array() -> None:
    rows = blobs(3000, 6, seed=4).astype(np.float16)
    expected = kmeans(rows.astype(np.float32), 5)
    for same in (rows, rows.astype(np.float64), np.asfortranarray(rows.astype(np.float32))):
        np.testing.assert_array_equal(kmeans(same, 5).centroids, expected.centroids)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 3), max_size=3), exponent=st.integers(-20, 20))
def test_sums_are_the_same_bits_however_rows_are_spread(seed: int, cuts: list[int], exponent: int) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((3 * CHUNK + 17, 3)) * 10.0 ** generator.integers(-6, 7, 3) * 2.0**exponent
    rows = rows.astype(np.float32)
    grid, centroids = Grid(len(rows), float(np.abs(rows).max())), rows[:4]
    shard = Shard([rows], threads=3)
    whole = shard.assign(centroids, grid)
    shards = split(rows, sorted(cuts))
    generator.shuffle(shards)
    first, *others = [shard.assign(centroids, grid) for shard in shards]
    spread = sum(others, first)
    np.testing.assert_array_equal(spread.sums, whole.sums)
    np.testing.assert_array_equal(spread.counts, whole.counts)
    # What the grid takes away is nothing next to the rows themselves.
    exact = np.stack([rows[shard.labels() == c].sum(0, dtype=np.float64) for c in range(4)])
    allowed = 2.0**-49 * np.abs(rows).max() * len(rows) ** 2
    assert (np.abs(whole.sums - exact) <= allowed).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(2, 12), d=st.integers(2, 9))
def test_inertia_never_rises(seed: int, k: int, d: int) -> None:
    rows = blobs(1500, d, seed)
    shard, grid, centroids = Shard([rows], threads=1), Grid(1500, float(np.abs(rows).max())), rows[:k]
    inertia = math.inf
    for _ in range(12):
        assignment = shard.assign(centroids, grid)
        assert assignment.inertia <= inertia * (1 + 1e-5)
        if assignment.counts.min() == 0:
            break  # a split may raise it once
        inertia, centroids = assignment.inertia, update(assignment)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), shift=st.sampled_from([0.0, 100.0]))
def test_a_pass_finds_what_a_first_pass_would(seed: int, k: int, shift: float) -> None:
    rows = blobs(CHUNK + 500, 7, seed) + np.float32(shift)
    grid, centroids = Grid(len(rows), float(np.abs(rows).max())), rows[:k]
    shard = Shard([rows], threads=1)
    for step in range(9):
        first = Shard([rows], threads=1)
        got, expected = shard.assign(centroids, grid), first.assign(centroids, grid)
        np.testing.assert_array_equal(shard.labels(), first.labels())
        np.testing.assert_array_equal(got.sums, expected.sums)
        np.testing.assert_array_equal(got.counts, expected.counts)
        assert got.inertia == expected.inertia
        centroids = update(got)
        if step == 5:
            centroids = rows[-k:]  # as another start's would follow


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(2, 9))
def test_the_order_of_rows_does_not_matter_to_an_update(seed: int, k: int) -> None:
    rows = blobs(3000, 5, seed)
    grid, centroids = Grid(3000, float(np.abs(rows).max())), rows[:k]
    shuffled = np.random.default_rng(seed).permutation(rows)
    one, other = (Shard([r], threads=1).assign(centroids, grid) for r in (rows, shuffled))
    np.testing.assert_array_equal(one.counts, other.counts)
    np.testing.assert_allclose(update(one), update(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whiten", [False, True])
def test_rows_on_disk_make_no_difference(tmp_path: Path, whiten: bool) -> None:
    rows = blobs(40 * CHUNK + 77, 8, seed=3)
    pieces = np.split(rows, [5000, 5001, 30_000])
    room = Scratch(str(tmp_path))
    found = []
    for shard in (Shard(pieces, threads=2), Shard([room.keep(piece) for piece in pieces], 2, room)):
        spread = whitened(shard) if whiten else shard
        result = cluster(spread, 6, iterations=8)
        before = spread.means_before(result.centroids) if whiten else result.centroids
        assert isinstance(spread, Shard)
        found.append((result.centroids, result.counts, before, spread.distances(result.centroids), spread.labels()))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_mistakes() -> None:
    rows = np.ones((4, 2), np.float32)
    with refused("concepts-too-many 5 4"):
        kmeans(rows, 5)
    with refused("concepts-too-many 0"):
        kmeans(rows, 0)
    with refused("features-shape (4,)"):
        kmeans(rows[:, 0], 2)
    with refused("argument-invalid"):
        kmeans(rows, 2, workers=0)
    for bad in (np.nan, np.inf, -np.inf):
        with refused("features-not-finite"):
            kmeans(np.where(np.eye(4, 2) > 0, bad, 1.0), 2)


@pytest.mark.processes
def test_an_array_needs_neither_ray_nor_torch() -> None:
    script = (
        "import sys, numpy as np; from transfgu.stages.concepts import kmeans; "
        "assert kmeans(np.eye(4), 2).counts.sum() == 4; assert not {'ray', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- on Ray ----


@pytest.mark.ray
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_make_no_difference(ray_cluster: None, workers: int) -> None:
    rows = blobs(9 * CHUNK + 100, 24, seed=7)
    alone, spread = kmeans(rows, 13, seed=3), kmeans(rows, 13, seed=3, workers=workers)
    np.testing.assert_allclose(spread.centroids, alone.centroids, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(spread.centroids, alone.centroids)  # as sums are exact, it is even the same bits
    np.testing.assert_array_equal(spread.counts, alone.counts)
    assert spread.iterations == alone.iterations
    assert spread.inertia == pytest.approx(alone.inertia, rel=1e-9)


@pytest.mark.ray
def test_of_many_workers_sums_few_are_fetched(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = blobs(9 * CHUNK + 100, 24, seed=9)
    alone = kmeans(rows, 13, seed=3)
    fetch, fetched = spread.fetch, list[int]()

    def counting(references: list[Any]) -> list[Any]:
        fetched.append(len(references))
        return fetch(references)

    monkeypatch.setattr(spread, "fetch", counting)
    with shards(rows, 5, added_at_once=2) as five:
        taken = np.array([8 * CHUNK + 3, 0, 5 * CHUNK])  # of three of the five
        np.testing.assert_array_equal(five.take(taken), rows[taken])
        fetched.clear()
        fetched.append(5)
        found = cluster(five, 13, seed=3)
    np.testing.assert_array_equal(found.centroids, alone.centroids)
    np.testing.assert_array_equal(found.counts, alone.counts)
    assert found.iterations == alone.iterations
    assert found.inertia == pytest.approx(alone.inertia, rel=1e-9)
    # What each has, and its starts; of each pass five sums are added to three, and those to two.
    assert fetched == [5, 5] + [2] * (alone.iterations + 1)


@pytest.mark.ray
def test_a_dataset_is_as_good_as_an_array(ray_cluster: None) -> None:
    import pyarrow as pa
    import ray

    rows = blobs(4 * CHUNK + 100, 6, seed=8)
    alone = kmeans(rows, 7)
    pieces = np.split(rows, [700, 2500, 3900])  # blocks that chunks and shards cut across
    tensors = kmeans(ray.data.from_numpy(pieces), 7, workers=2)
    np.testing.assert_array_equal(tensors.centroids, alone.centroids)
    lists = [pa.FixedSizeListArray.from_arrays(pa.array(p.ravel()), 6) for p in pieces]
    tables = [pa.table({"name": pa.array(["window"] * len(p)), "feature": p}) for p in lists]
    np.testing.assert_array_equal(kmeans(ray.data.from_arrow(tables), 7).centroids, alone.centroids)
    with refused("features-shape a b"):
        kmeans(ray.data.from_items([{"a": 1, "b": 2}]), 1)


@pytest.mark.parametrize(("rows", "k", "seed"), [(4000, 9, 1), (3000, 27, 1), (500, 3, 7)])
def test_faiss_start_is_that_of_faiss(rows: int, k: int, seed: int) -> None:
    """FAISS's own K-Means, with a single start and all rows, comes to the same clusters."""
    array = blobs(rows, 16, seed, centres=2 * k)
    theirs = faiss.Clustering(16, k)
    theirs.seed, theirs.niter, theirs.max_points_per_centroid, theirs.min_points_per_centroid = seed, 0, rows, 1
    theirs.train(array, faiss.IndexFlatL2(16))
    first = faiss.vector_to_array(theirs.centroids).reshape(k, 16)
    np.testing.assert_array_equal(array[faiss_rows(rows, k, seed)], first)

    theirs = faiss.Clustering(16, k)
    theirs.seed, theirs.niter, theirs.max_points_per_centroid, theirs.min_points_per_centroid = seed, 100, rows, 1
    theirs.train(array, faiss.IndexFlatL2(16))
    ours = kmeans(array, k, start="faiss", seed=seed)
    np.testing.assert_allclose(ours.centroids, faiss.vector_to_array(theirs.centroids).reshape(k, 16), atol=1e-4)


def test_rows_are_taken_in_the_order_asked_for() -> None:
    array = blobs(3 * CHUNK, 4, 0)
    rows = np.array([2 * CHUNK + 1, 5, CHUNK, 0, 5])
    np.testing.assert_array_equal(Shard(np.split(array, 3)).take(rows), array[rows])
