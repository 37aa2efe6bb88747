"""Passes of K-Means by matrix products, with the CPU as device: the same bits as passes with threads."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_kmeans import blobs
from transfgu.device_kmeans import DeviceShard
from transfgu.kmeans import Grid, Shard, cluster

CPU = torch.device("cpu")


def test_one_pass_by_hand() -> None:
    rows = np.array([[0, 0], [2, 0], [9, 3]], np.float32)
    shard = DeviceShard([rows[:2], rows[2:]], CPU, threads=1, at_once=2)
    first = shard.assign(np.array([[1, 0], [8, 3]], np.float32), Grid(3, 9.0))
    np.testing.assert_array_equal(first.sums, [[2, 0], [9, 3]])
    np.testing.assert_array_equal(first.counts, [2, 1])
    assert (first.inertia, first.changed) == (3, 3)
    second = shard.assign(np.array([[-4, 0], [4, 0]], np.float32), Grid(3, 9.0))
    np.testing.assert_array_equal(second.sums, [[0, 0], [11, 3]])
    np.testing.assert_array_equal(second.counts, [1, 2])
    assert second.changed == 1
    np.testing.assert_array_equal(shard.labels(), [0, 1, 1])
    np.testing.assert_allclose(shard.distances(np.array([[-4, 0], [4, 0]], np.float32)), [4, 2, 34**0.5])


@settings(max_examples=15)
@given(
    rows=st.integers(1, 3000),
    k=st.integers(1, 9),
    seed=st.integers(0, 99),
    at_once=st.integers(1, 4000),
    cut=st.integers(0, 3000),
)
def test_results_are_those_of_threads(rows: int, k: int, seed: int, at_once: int, cut: int) -> None:
    features, k = blobs(rows, 7, seed), min(k, rows)
    pieces = [piece for piece in np.split(features, [min(cut, rows)]) if len(piece)]
    found = cluster(DeviceShard(pieces, CPU, threads=1, at_once=at_once), k, iterations=20)
    wanted = cluster(Shard([features], threads=1), k, iterations=20)
    np.testing.assert_array_equal(found.counts, wanted.counts)
    np.testing.assert_array_equal(found.centroids, wanted.centroids)
    assert found.inertia == pytest.approx(wanted.inertia, rel=1e-9, abs=1e-6)


def test_products_are_float32_whatever_the_process_computes_others_in() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        shard = DeviceShard([blobs(50, 4, 0)], CPU)
        shard.assign(blobs(3, 4, 1), Grid(50, 30.0))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
