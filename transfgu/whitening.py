"""Whiten features, with the same result to the last bit however rows are divided among processes.

Rows and matrices are rounded to whole numbers with so few bits that each sum of their products is exact in float64. So
results do not depend on the order of a sum or the library that computes it: rows may be divided among threads, shards
and nodes in any way.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64
from numpy import ndarray

_EXACT = 53  # bits of whole numbers in a float64
_RIDGE = 0.1  # added to each variance, relative to their mean, so that directions without variance are not amplified


@dataclass(frozen=True)
class Moments:
    """Sums over rows of features, from which mean and covariance are computed; sums of shards can be added.

    Args:
        step: the unit to which rows are rounded, a power of two; see :func:`moment_step`.
        rows: number of rows.
        sums: sums of the rows, in steps.
        products: sums of the rows' outer products, in squares of steps.
    """

    step: float
    rows: int
    sums: Float64[ndarray, " d"]
    products: Float64[ndarray, "d d"]

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.step, self.rows + other.rows, self.sums + other.sums, self.products + other.products)


def moment_step(rows: int, largest: float) -> float:
    """Return the finest power of two for which all sums of :class:`Moments` are exact.

    Args:
        rows: number of rows in all shards together.
        largest: their largest absolute value.
    """
    bits = (_EXACT - math.ceil(math.log2(max(rows, 1)))) // 2  # rows * (2^bits)^2 <= 2^53
    return _step(largest, bits)


def moments(rows: Float32[ndarray, "n d"], step: float) -> Moments:
    """Return the sums over these rows, exactly."""
    whole = np.rint(rows / np.float64(step))
    return Moments(step, len(rows), whole.sum(0), whole.T @ whole)


@dataclass(frozen=True)
class Whitening:
    """A linear map after which the features' covariance is (nearly) the identity.

    Args:
        mean: of the features.
        matrix: symmetric: each principal direction is divided by its standard deviation.
        largest: bound of the features' absolute values.
    """

    mean: Float64[ndarray, " d"]
    matrix: Float64[ndarray, "d d"]
    largest: float

    @staticmethod
    def of(found: Moments, largest: float) -> "Whitening":
        """Return the whitening of features with these moments and this largest absolute value.

        A tenth of the mean variance is added to the variance of each direction.

        Source: ZCA whitening, (C + e I)^(-1/2) (Bell and Sejnowski 1997; Kessy, Lewin and Strimmer 2018).
        """
        mean = found.sums / found.rows * found.step
        covariance = found.products / found.rows * found.step**2 - np.outer(mean, mean)
        variances, directions = np.linalg.eigh(covariance)
        variances = variances.clip(min=0)
        ridge = _RIDGE * variances.mean() or 1.0  # all rows are equal: any scale will do
        return Whitening(mean, (directions / np.sqrt(variances + ridge)) @ directions.T, largest)

    def apply(self, rows: Float32[ndarray, "n d"]) -> Float32[ndarray, "n d"]:
        """Return the rows whitened and brought to unit length; the mean itself becomes zero."""
        bits = (_EXACT - math.ceil(math.log2(len(self.mean)))) // 2  # d * (2^bits)^2 <= 2^53
        reach = self.largest + float(np.abs(self.mean).max())
        centred = np.rint((rows - self.mean) / _step(reach, bits))
        matrix = np.rint(self.matrix / _step(float(np.abs(self.matrix).max()), bits))
        turned = centred @ matrix
        length = np.sqrt(np.square(turned).sum(1, keepdims=True))
        unit: ndarray = (turned / np.where(length > 0, length, 1)).astype(np.float32)
        return unit


def _step(largest: float, bits: int) -> float:
    """Return the power of two of which numbers up to `largest` are at most 2^bits multiples."""
    return 2.0 ** (math.ceil(math.log2(max(largest, float(np.finfo(np.float32).tiny)))) - bits)
