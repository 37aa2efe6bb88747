"""Trace the outlines of a mask's regions for labelling tools.

Corners lie on the edges between pixels, so an outline that is not simplified encloses exactly the pixels of its region.
OpenCV returns the outermost pixels of a region; in a mask of twice the size, they show on which side the edge lies.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Integer

Ring = Float[np.ndarray, "_ 2"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Region:
    """A connected region of one class.

    Args:
        outline: corners as x and y in pixels, from the image's upper left corner.
        holes: outlines of enclosed areas that do not belong to the region.
    """

    outline: Ring
    holes: tuple[Ring, ...]

    @property
    def keyhole(self) -> Ring:
        """Return one ring around the region that enters each hole and returns, for formats without holes."""
        ring = self.outline
        for hole in sorted(self.holes, key=lambda found: float(found[:, 0].min())):
            distances = ((ring[:, None] - hole[None]) ** 2).sum(axis=-1)
            near, far = np.unravel_index(int(distances.argmin()), distances.shape)
            around = np.concatenate((hole[far:], hole[: far + 1]))
            ring = np.concatenate((ring[: near + 1], around, ring[near:]))
        return ring

    @property
    def area(self) -> float:
        """Number of pixels in the region."""
        return _area(self.outline) - sum(map(_area, self.holes))


def regions(mask: Integer[np.ndarray, "H W"], index: int, *, tolerance: float = 1.0, least: int = 0) -> list[Region]:
    """Return the connected regions of a class; regions that touch at a corner are one.

    Args:
        mask: class indices.
        index: the class.
        tolerance: maximum distance between a simplified outline and the region's edge, in pixels; 0: not simplified.
        least: regions of fewer pixels are left out.
    """
    import cv2  # imported here, because everything except outlines works without OpenCV

    inside: Bool[np.ndarray, "H W"] = mask == index
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        return []
    top, left = int(rows[0]), int(columns[0])
    piece = inside[top : rows[-1] + 1, left : columns[-1] + 1].astype(np.uint8)
    doubled = piece.repeat(2, axis=0).repeat(2, axis=1)
    contours, tree = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    corner = np.array([left, top])
    rings = [corner + _simplified((contour[:, 0] + 1) // 2, tolerance) for contour in contours]
    found = []
    for number, (_, _, child, parent) in enumerate(tree[0]):
        if parent >= 0:
            continue
        holes = []
        while child >= 0:
            holes.append(rings[child])
            child = tree[0][child][0]
        region = Region(outline=rings[number], holes=tuple(hole for hole in holes if len(hole) >= 3))
        if len(region.outline) >= 3 and region.area >= max(least, 0.5):
            found.append(region)
    return found


def _simplified(corners: Integer[np.ndarray, "_ 2"], tolerance: float) -> Ring:
    """Return a ring without repeated corners and without corners on a straight line, simplified."""
    import cv2

    ring = corners[(corners != np.roll(corners, 1, axis=0)).any(axis=1)]
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    ring = ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]].astype(np.float64)
    if tolerance > 0 and len(ring) > 4:
        fewer = cv2.approxPolyDP(ring.astype(np.float32)[:, None], tolerance, closed=True)[:, 0].astype(np.float64)
        ring = fewer if len(fewer) >= 3 else ring
    found: Ring = ring
    return found


def _area(ring: Ring) -> float:
    x, y = ring.T
    return abs(float((x * np.roll(y, 1) - y * np.roll(x, 1)).sum())) / 2
