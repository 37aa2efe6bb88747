"""Whitening by hand, against its definition, and to the same bits however rows are divided."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfgu.errors import UserError
from transfgu.kmeans import CHUNK, Shard, cluster
from transfgu.stages.concepts import kmeans
from transfgu.whitening import Moments, Whitening, moment_step, moments


def rows_of(seed: int, n: int, d: int) -> np.ndarray:
    """Correlated rows with a mean other than zero."""
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((n, d)) @ generator.standard_normal((d, d)) + 3).astype(np.float32)


def moments_of(rows: np.ndarray) -> Moments:
    return moments(rows, moment_step(len(rows), float(np.abs(rows).max())))


def test_moments_by_hand() -> None:
    """Three rows up to 4: 3 * 4^25 < 2^53, so they are multiples of 2^(2 - 25)."""
    rows = np.array([[1, 2], [3, -4], [0.5, 0]], np.float32)
    step = moment_step(3, 4.0)
    assert step == 2.0**-23
    found = moments(rows, step)
    np.testing.assert_array_equal(found.sums * step, [4.5, -2])
    np.testing.assert_array_equal(found.products * step**2, [[10.25, -10], [-10, 20]])
    assert found.rows == 3


def test_whitening_by_hand() -> None:
    """Variances 4 and 1 and a ridge of a tenth of 2.5 give factors 1 / sqrt(4.25) and 1 / sqrt(1.25)."""
    rows = np.array([[12, 1], [12, -1], [8, 1], [8, -1]], np.float32)
    whitening = Whitening.of(moments_of(rows), 12.0)
    np.testing.assert_allclose(whitening.mean, [10, 0], atol=1e-12)
    np.testing.assert_allclose(whitening.matrix, np.diag([4.25**-0.5, 1.25**-0.5]), atol=1e-7)
    x, y = 2 * 4.25**-0.5, 1.25**-0.5
    unit = np.array([[x, y], [x, -y], [-x, y], [-x, -y]]) / np.hypot(x, y)
    np.testing.assert_allclose(whitening.apply(rows), unit, atol=1e-6)


def test_the_mean_becomes_zero_and_equal_rows_are_no_mistake() -> None:
    rows = np.full((5, 3), 2.5, np.float32)
    assert not Whitening.of(moments_of(rows), 2.5).apply(rows).any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 300), max_size=4), exponent=st.integers(-20, 20))
def test_bits_do_not_depend_on_how_rows_are_divided(seed: int, cuts: list[int], exponent: int) -> None:
    rows = rows_of(seed, 300, 7) * np.float32(2.0**exponent)
    largest = float(np.abs(rows).max())
    step = moment_step(300, largest)
    whole = moments(rows, step)
    pieces = [piece for piece in np.split(rows, sorted(cuts)) if len(piece)]
    added = moments(pieces[0], step)
    for piece in pieces[1:]:
        added += moments(piece, step)
    np.testing.assert_array_equal(added.sums, whole.sums)
    np.testing.assert_array_equal(added.products, whole.products)
    whitening = Whitening.of(whole, largest)
    np.testing.assert_array_equal(np.concatenate([whitening.apply(p) for p in pieces]), whitening.apply(rows))
    covariance = np.cov(rows.T.astype(np.float64), bias=True)
    values, vectors = np.linalg.eigh(covariance)
    expected = (vectors / np.sqrt(values + 0.1 * values.mean())) @ vectors.T
    np.testing.assert_allclose(whitening.matrix, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_clusters_that_one_loud_feature_hides() -> None:
    """Two kinds differ by 2 in a feature of low variance; one of high variance carries no information."""
    generator = np.random.default_rng(0)
    kind = np.arange(400) % 2
    rows = np.stack([3 * generator.standard_normal(400), 2 * kind + 0.05 * generator.standard_normal(400)], 1)
    rows = rows.astype(np.float32)
    hidden, seen = kmeans(rows, 2), kmeans(rows, 2, whiten=True)
    assert abs(hidden.centroids[0, 1] - hidden.centroids[1, 1]) < 0.3
    assert sorted(seen.centroids[:, 1].round(1).tolist()) == [0.0, 2.0]
    assert seen.counts.tolist() == [200, 200]


def test_centroids_are_means_of_the_features_as_given() -> None:
    rows = rows_of(1, 3 * CHUNK + 5, 6)
    white = Shard([rows]).whitened(Whitening.of(moments_of(rows), float(np.abs(rows).max())))
    found = cluster(white, 4)
    means = white.means_before(found.centroids)
    labels = white.labels()
    for k in range(4):
        np.testing.assert_allclose(means[k], rows[labels == k].mean(0, dtype=np.float64), rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(UserError) as raised:
        kmeans(np.array([[1, np.nan], [2, 3]]), 2, whiten=True)
    assert raised.value.code == "features-not-finite"


@pytest.mark.ray
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_make_no_difference(ray_cluster: None, workers: int) -> None:
    rows = rows_of(7, 4 * CHUNK + 100, 24)
    alone, spread = kmeans(rows, 9, seed=3, whiten=True), kmeans(rows, 9, seed=3, workers=workers, whiten=True)
    np.testing.assert_array_equal(spread.centroids, alone.centroids)
    np.testing.assert_array_equal(spread.counts, alone.counts)
    assert spread.iterations == alone.iterations
