"""Outlines against the pixels that they enclose, filled by pycocotools."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from transfgu.sharing.polygons import regions

coco = pytest.importorskip("pycocotools.mask")


def filled(rings: list[np.ndarray], height: int, width: int) -> np.ndarray:
    found = np.zeros((height, width), bool)
    for ring in rings:
        found |= coco.decode(coco.merge(coco.frPyObjects([ring.ravel().tolist()], height, width))).astype(bool)
    return found


def test_a_ring_by_hand() -> None:
    mask = np.zeros((5, 6), np.uint8)
    mask[1:5, 1:6] = 3
    mask[2:4, 2:4] = 0
    (region,) = regions(mask, 3, tolerance=0.0)
    assert {tuple(corner) for corner in region.outline.tolist()} == {(1, 1), (6, 1), (6, 5), (1, 5)}
    assert [{tuple(corner) for corner in hole.tolist()} for hole in region.holes] == [{(2, 2), (4, 2), (4, 4), (2, 4)}]
    assert region.area == 20 - 4
    assert len(region.keyhole) == 4 + 4 + 2
    np.testing.assert_array_equal(filled([region.keyhole], 5, 6), mask == 3)


@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 2)))
def test_regions_cover_their_pixels_and_no_others(mask: np.ndarray) -> None:
    for index in range(3):
        found = regions(mask, index, tolerance=0.0)
        assert sum(region.area for region in found) == (mask == index).sum()


def test_outlines_are_filled_by_others_as_they_were() -> None:
    y, x = np.mgrid[:60, :80]
    mask = ((x - 30) ** 2 + (y - 30) ** 2 < 25**2).astype(np.uint8) + (((x - 35) ** 2 + (y - 28) ** 2) < 81)
    for index in range(3):
        found = [region.keyhole for region in regions(mask, index, tolerance=0.0)]
        np.testing.assert_array_equal(filled(found, 60, 80), mask == index)


def test_simplified_outlines_stay_near_and_have_fewer_corners() -> None:
    y, x = np.mgrid[:200, :200]
    mask = ((x - 100) ** 2 + (y - 100) ** 2 < 80**2).astype(np.uint8)
    (exact,), (simple,) = regions(mask, 1, tolerance=0.0), regions(mask, 1, tolerance=1.0)
    assert len(simple.outline) < len(exact.outline) / 4
    distance = np.abs(np.hypot(*(simple.outline - 100).T) - 80)
    assert distance.max() < 2
    assert abs(simple.area - exact.area) < 0.02 * exact.area


def test_small_regions_and_absent_classes() -> None:
    mask = np.zeros((9, 9), np.uint8)
    mask[0, 0] = mask[4:8, 4:8] = 1
    assert len(regions(mask, 1)) == 2
    assert [region.area for region in regions(mask, 1, least=2)] == [16]
    assert regions(mask, 7) == []
