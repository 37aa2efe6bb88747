"""Measures of how well features fall into K clusters, against values by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfgu.cluster_numbers import Measures, adjusted_rand, as_stable, assign, elbow, measure, silhouette, suggested


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ([0, 0, 1, 1], [1, 1, 0, 0], 1.0),  # names do not count
        ([0, 0, 1, 1], [0, 1, 0, 1], -0.5),  # no pair agrees: (0 - 4/6) / (2 - 4/6)
        ([0, 0, 1, 1], [0, 0, 1, 2], 4 / 7),  # (1 - 2/6) / (3/2 - 2/6)
        ([0, 0, 0], [0, 0, 0], 1.0),
        ([0, 1, 2], [2, 1, 0], 1.0),
    ],
)
def test_the_adjusted_rand_index(a: list[int], b: list[int], wanted: float) -> None:
    assert adjusted_rand(np.array(a), np.array(b)) == pytest.approx(wanted)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=40))
def test_the_index_is_symmetric_and_at_most_one(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs).T
    assert adjusted_rand(a, b) == pytest.approx(adjusted_rand(b, a))
    assert adjusted_rand(a, b) <= 1 + 1e-12
    assert adjusted_rand(a, a) == 1


def test_the_silhouette_by_hand() -> None:
    rows = np.array([[0], [1], [4], [6]], np.float32)
    # Own distances 1, 1, 2, 2; to the other cluster 5, 4, 3.5, 5.5.
    wanted = np.mean([4 / 5, 3 / 4, 1.5 / 3.5, 3.5 / 5.5])
    assert silhouette(rows, np.array([0, 0, 1, 1])) == pytest.approx(wanted)
    assert silhouette(rows, np.array([0, 0, 0, 1])) == pytest.approx(np.mean([1 - 2.5 / 6, 1 - 2 / 5, 2 / 3.5 - 1, 0]))
    assert silhouette(rows, np.zeros(4, np.int64)) == 0


def test_three_heaps_are_found() -> None:
    random = np.random.default_rng(0)
    centres = np.array([[0, 0, 10], [0, 10, 0], [10, 0, 0]], np.float32)
    rows = (centres[np.arange(300) % 3] + random.normal(size=(300, 3))).astype(np.float32)
    calls: list[int] = []
    found = measure(rows, np.arange(300) // 10, range(2, 7), whiten=False, divisions=3, after=calls.append)
    by_k = {m.k: m for m in found}
    assert calls == [1, 2, 3, 4, 5]
    assert by_k[3].stability == pytest.approx(1)
    assert by_k[3].spread == pytest.approx(0)
    assert by_k[4].stability < 0.95
    assert by_k[3].silhouette > max(by_k[k].silhouette for k in (2, 4, 5, 6))
    assert by_k[3].inertia == pytest.approx(3, rel=0.1)  # a unit variance in each of three directions
    assert [m.inertia for m in found] == sorted((m.inertia for m in found), reverse=True)
    assert elbow(found) == suggested(found) == 3
    np.testing.assert_array_equal(assign(centres, centres), [0, 1, 2])
    again = measure(rows, np.arange(300) // 10, range(3, 4), whiten=True, divisions=2)
    assert again[0].stability == pytest.approx(1)


def test_the_elbow_of_a_straight_line_or_of_two_points() -> None:
    def of(*inertias: float) -> list[Measures]:
        return [Measures(k=k, stability=0.0, spread=0.0, silhouette=0.0, inertia=i) for k, i in enumerate(inertias, 2)]

    assert elbow(of(4.0, 3.0)) == 2
    assert elbow(of(10.0, 4.0, 3.0, 2.0)) == 3


def test_the_smallest_of_the_most_stable_numbers_is_suggested() -> None:
    def of(*stable: tuple[float, float]) -> list[Measures]:
        return [Measures(k=k, stability=s, spread=d, silhouette=0.0, inertia=1.0) for k, (s, d) in enumerate(stable, 2)]

    assert suggested(of((0.3, 0.3), (0.5, 0.1), (0.7, 0.1), (0.75, 0.05), (0.72, 0.2))) == 4  # 0.75 - 0.05
    assert as_stable(of((0.3, 0.3), (0.5, 0.1), (0.7, 0.1), (0.75, 0.05), (0.72, 0.2))) == [4, 5, 6]
    assert suggested(of((0.9, 0.0), (1.0, 0.0))) == 3
