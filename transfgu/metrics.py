"""Compute scores from a confusion matrix, which for a validation set is the sum of the matrices of its batches.

Clusters have no names, so Hungarian matching on the matrix of the whole set assigns a cluster to each true class. IoU
and accuracy follow from the matched cells.
"""

from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, Num
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Scores of clusters matched to classes on a data set; NaN if there is nothing to score."""

    mean_iou: float
    """Percent; classes absent from both labels and predictions are left out."""
    pixel_accuracy: float
    """Percent of labelled pixels whose cluster is matched to their class."""
    iou: Float[np.ndarray, " C"]
    """Percent, by true class; NaN for a class absent from both labels and predictions."""
    clusters: Int[np.ndarray, " C"]
    """The cluster matched to each true class; -1 if there are fewer clusters than classes."""


def confusion_matrix(
    labels: ArrayLike, predictions: ArrayLike, num_classes: int, num_clusters: int | None = None
) -> Int[np.ndarray, "C clusters"]:
    """Count pixels by true class and predicted cluster, int64.

    Args:
        labels: true classes, of any shape and integer type; values outside [0, ``num_classes``) are ignored.
        predictions: clusters, of the same shape.
        num_classes: C.
        num_clusters: number of clusters; C unless given.

    Raises:
        ValueError: the shapes differ, or a prediction at a labelled pixel is not a cluster.
    """
    num_clusters = num_classes if num_clusters is None else num_clusters
    true, predicted = np.asarray(labels), np.asarray(predictions)
    _check_shapes(true.shape, predicted.shape)
    true, predicted = true.reshape(-1), predicted.reshape(-1)
    if not len(true):
        return np.zeros((num_classes, num_clusters), np.int64)
    # Neighbouring pixels mostly agree, so runs of equal pixels are counted: there are about twenty times fewer.
    ends = np.ones(len(true), bool)
    np.not_equal(true[1:], true[:-1], out=ends[:-1])
    ends[:-1] |= predicted[1:] != predicted[:-1]
    last = np.flatnonzero(ends)
    pixels = np.diff(last, prepend=-1)
    # To int64: a uint8 label times the number of clusters would wrap around.
    true, predicted = true[last].astype(np.int64), predicted[last].astype(np.int64)
    labelled = (true >= 0) & (true < num_classes)
    true, predicted, pixels = true[labelled], predicted[labelled], pixels[labelled]
    if len(predicted):
        _check_clusters(int(predicted.min()), int(predicted.max()), num_clusters)
    # Sums of whole numbers in float64 are exact up to 2 ** 53 pixels.
    cells = np.bincount(num_clusters * true + predicted, weights=pixels, minlength=num_classes * num_clusters)
    return cells.astype(np.int64).reshape(num_classes, num_clusters)


@overload
def batch_confusion(
    labels: Integer[np.ndarray, "..."],
    predictions: Integer[np.ndarray, "..."],
    num_classes: int,
    num_clusters: int | None = None,
) -> Int[np.ndarray, "C clusters"]: ...
@overload
def batch_confusion(
    labels: Integer[Tensor, "..."],
    predictions: Integer[Tensor, "..."],
    num_classes: int,
    num_clusters: int | None = None,
) -> Int[Tensor, "C clusters"]: ...
def batch_confusion(
    labels: Integer[np.ndarray, "..."] | Integer[Tensor, "..."],
    predictions: Integer[np.ndarray, "..."] | Integer[Tensor, "..."],
    num_classes: int,
    num_clusters: int | None = None,
) -> Int[np.ndarray, "C clusters"] | Int[Tensor, "C clusters"]:
    """Count like :func:`confusion_matrix`, over all images of a batch, on the device that holds them.

    Only C x clusters counts are then transferred from a GPU, instead of a prediction per pixel.

    Args:
        labels: true classes; values outside [0, ``num_classes``) are ignored.
        predictions: clusters, of the same shape, kind and device.
        num_classes: C.
        num_clusters: number of clusters; C unless given.

    Returns:
        Counts of pixels by true class and predicted cluster, int64: an array for arrays, a tensor for tensors.

    Raises:
        ValueError: the shapes differ, or a prediction at a labelled pixel is not a cluster.
    """
    if isinstance(labels, Tensor) and isinstance(predictions, Tensor):
        if labels.device.type != "cpu":
            return confusion_on_device(labels, predictions, num_classes, num_clusters or num_classes)
        return torch.from_numpy(confusion_matrix(labels.numpy(), predictions.numpy(), num_classes, num_clusters))
    return confusion_matrix(labels, predictions, num_classes, num_clusters)


def confusion_on_device(
    labels: Integer[Tensor, "..."], predictions: Integer[Tensor, "..."], num_classes: int, num_clusters: int
) -> Int[Tensor, "C clusters"]:
    """Count like :func:`confusion_matrix`, on the tensors' device and without waiting for it."""
    _check_shapes(labels.shape, predictions.shape)
    true, predicted = labels.flatten().long(), predictions.flatten().long()
    labelled = (true >= 0) & (true < num_classes)
    is_cluster = (predicted >= 0) & (predicted < num_clusters)
    # Two more cells, for pixels without a label and for bad predictions, avoid a selection, which would wait for the
    # GPU.
    cells = num_classes * num_clusters
    cell = torch.where(is_cluster, num_clusters * true + predicted, cells + 1).where(labelled, cells)
    counts = torch.bincount(cell, minlength=cells + 2)
    if counts[-1]:
        outside = predicted[labelled]
        _check_clusters(int(outside.min()), int(outside.max()), num_clusters)
    return counts[:cells].reshape(num_classes, num_clusters)


def _check_shapes(labels: tuple[int, ...], predictions: tuple[int, ...]) -> None:
    if labels != predictions:
        raise ValueError(f"labels {tuple(labels)} and predictions {tuple(predictions)} differ in shape")


def _check_clusters(lowest: int, highest: int, num_clusters: int) -> None:
    if not 0 <= lowest <= highest < num_clusters:
        raise ValueError(f"predictions from {lowest} to {highest} do not fit {num_clusters} clusters")


def match_clusters(confusion: Num[np.ndarray, "C clusters"]) -> Int[np.ndarray, " C"]:
    """Return the cluster of each true class, one to one, with most agreeing pixels (Hungarian matching).

    If there are fewer clusters than classes, the remaining classes get -1.
    """
    confusion = np.asarray(confusion)
    classes, clusters = linear_sum_assignment(confusion.max(initial=0) - confusion)
    matched = np.full(len(confusion), -1, dtype=np.int64)
    matched[classes] = clusters
    return matched


def merge_clusters(
    confusion: Int[np.ndarray, "C clusters"], index_of: Int[np.ndarray, " clusters"], count: int
) -> Int[np.ndarray, "C count"]:
    """Return the confusion matrix after merging clusters, by summing their counts.

    Args:
        confusion: pixels, true class by cluster.
        index_of: new index of each cluster, 0 to `count` - 1.
        count: number of clusters after merging.
    """
    into = np.zeros((len(index_of), count), np.int64)
    into[np.arange(len(index_of)), index_of] = 1
    merged: Int[np.ndarray, "C count"] = confusion @ into
    return merged


def scores(confusion: Num[np.ndarray, "C clusters"], ignored: int = 0) -> Scores:
    """Match clusters to classes, and compute the scores from the matrix of the whole set.

    A cluster that is matched to no class (more clusters than classes) is an error wherever it is predicted.

    Args:
        confusion: pixels, true class by cluster.
        ignored: number of clusters at the end that are not matched.
    """
    confusion = np.asarray(confusion)
    clusters = match_clusters(confusion[:, : confusion.shape[1] - ignored])
    has_cluster = clusters >= 0
    rows = np.flatnonzero(has_cluster)
    hits, predicted = np.zeros((2, len(confusion)), dtype=np.int64)
    hits[rows] = confusion[rows, clusters[rows]]
    predicted[rows] = confusion.sum(axis=0)[clusters[rows]]
    union = confusion.sum(axis=1) + predicted - hits
    iou = np.full(len(confusion), np.nan)
    np.divide(100.0 * hits, union, out=iou, where=union > 0)
    pixels = confusion.sum()
    return Scores(
        mean_iou=float(np.mean(iou[union > 0])) if pixels else float("nan"),
        pixel_accuracy=float(100.0 * hits.sum() / pixels) if pixels else float("nan"),
        iou=iou,
        clusters=clusters,
    )


def invariant_information(joint: Int[np.ndarray, "C C"]) -> float:
    """Return the mutual information between predictions for an image and for a changed version of it; needs no labels.

    It is in percent of ln C, the maximum for C classes. It is 100 if all classes cover equal areas and the change does
    not affect predictions, and 0 if the two predictions are independent, for example if one class is predicted
    everywhere. It uses predictions, not probabilities, so training for higher certainty does not raise it.

    Source: the objective of Invariant Information Clustering (Ji, Henriques and Vedaldi, ICCV 2019), used here to
    compare models.

    Args:
        joint: counts of positions by their class before and after the change.
    """
    counts = (joint + joint.T) / 2  # the change can be reversed
    total, classes = counts.sum(), len(counts)
    if not total or classes < 2:
        return 0.0
    share = counts / total
    alone = share.sum(axis=1)
    independent = np.outer(alone, alone)
    seen = share > 0
    information = float((share[seen] * np.log(share[seen] / independent[seen])).sum())
    return max(0.0, 100 * information / float(np.log(classes)))


def scores_json(score: Scores) -> dict[str, Any]:
    """Return the scores as in `scores.json` and `metrics.json`; null if there is nothing to score."""
    return {
        "mean_iou": _number(score.mean_iou),
        "pixel_accuracy": _number(score.pixel_accuracy),
        "iou": [_number(x) for x in score.iou],
        "assignment": [int(x) for x in score.clusters],
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
