"""Scores by hand on small matrices, and their invariance to renaming."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfgu.metrics import (
    batch_confusion,
    confusion_matrix,
    confusion_on_device,
    invariant_information,
    match_clusters,
    scores,
)
from transfgu.training.checkpoints import merit


def test_confusion_matrix_by_hand() -> None:
    labels = [[0, 0, 1], [2, 2, 2]]
    predictions = [[0, 1, 1], [0, 2, 2]]
    confusion = confusion_matrix(labels, predictions, 3)
    assert confusion.dtype == np.int64
    np.testing.assert_array_equal(confusion, [[1, 1, 0], [0, 1, 0], [1, 0, 2]])


def test_labels_outside_the_classes_are_ignored() -> None:
    labels = np.array([0, 1, 255, 2], dtype=np.uint8)
    np.testing.assert_array_equal(confusion_matrix(labels, np.array([0, 1, 1, 0]), 2), [[1, 0], [0, 1]])
    # What is predicted there does not matter, even where it is no cluster.
    np.testing.assert_array_equal(confusion_matrix([-1, 1], [99, 0], 2), [[0, 0], [1, 0]])


def test_small_integer_types_do_not_wrap_around() -> None:
    labels = np.full(10, 170, dtype=np.uint8)
    confusion = confusion_matrix(labels, np.full(10, 169, dtype=np.uint8), 171)
    assert confusion.shape == (171, 171)
    assert confusion[170, 169] == confusion.sum() == 10


def test_bad_predictions_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        confusion_matrix([0, 1], [0], 2)
    with pytest.raises(ValueError, match="do not fit 2 clusters"):
        confusion_matrix([0, 1], [0, 2], 2)
    with pytest.raises(ValueError, match="do not fit 2 clusters"):
        confusion_matrix([0, 1], [0, -1], 2)


def on_device(
    labels: np.ndarray, predictions: np.ndarray, num_classes: int, num_clusters: int | None = None
) -> np.ndarray:
    """The counts of a GPU, computed here on the CPU."""
    tensors = torch.from_numpy(labels), torch.from_numpy(predictions)
    counted: np.ndarray = confusion_on_device(*tensors, num_classes, num_clusters or num_classes).numpy()
    return counted


def test_a_batch_by_hand() -> None:
    """Two images, each one row of pixels: runs continue from one to the next, and end at the last pixel."""
    labels = np.array([[0, 0, 1, 1], [1, 1, -1, 2]], np.int16)
    predictions = np.array([[2, 2, 2, 1], [1, 0, 0, 2]], np.uint8)
    expected = [[0, 0, 2], [1, 2, 1], [0, 0, 1]]
    array = batch_confusion(labels, predictions, 3)
    tensor = batch_confusion(torch.from_numpy(labels), torch.from_numpy(predictions), 3)
    assert array.dtype == np.int64
    assert tensor.dtype == torch.int64
    assert array.tolist() == tensor.tolist() == on_device(labels, predictions, 3).tolist() == expected
    assert batch_confusion(labels[:0], predictions[:0], 3).tolist() == np.zeros((3, 3)).tolist()
    assert on_device(labels[:0], predictions[:0], 3).tolist() == np.zeros((3, 3)).tolist()


@pytest.mark.parametrize("count", [batch_confusion, on_device])
def test_a_batch_with_bad_predictions_is_refused(count: Callable[..., np.ndarray]) -> None:
    labels = np.array([[0, -1], [1, 1]])
    with pytest.raises(ValueError, match=r"labels \(2, 2\) and predictions \(2, 1\) differ"):
        count(labels, labels[:, :1], 2)
    for bad in (-1, 2):
        assert count(labels, np.array([[0, bad], [0, 1]]), 2).tolist() == [[1, 0], [1, 1]]  # not labelled there
        predictions = np.array([[0, 0], [bad, 1]])
        with pytest.raises(ValueError, match=f"from {min(0, bad)} to {max(1, bad)} do not fit 2 clusters"):
            count(labels, predictions, 2)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), side=st.integers(1, 9), zoom=st.integers(1, 5), clusters=st.integers(1, 300))
def test_a_batch_is_the_sum_of_its_images(seed: int, side: int, zoom: int, clusters: int) -> None:
    draw = np.random.default_rng(seed)
    labels = draw.integers(-1, 5, (3, side, side)).astype(np.int16).repeat(zoom, 2)
    predictions = draw.integers(0, clusters, (3, side, side * zoom))
    expected = np.zeros((4, clusters), np.int64)
    for true, predicted in zip(labels.ravel().tolist(), predictions.ravel().tolist(), strict=True):
        if 0 <= true < 4:
            expected[true, predicted] += 1
    np.testing.assert_array_equal(batch_confusion(labels, predictions, 4, clusters), expected)
    np.testing.assert_array_equal(on_device(labels, predictions, 4, clusters), expected)
    one_by_one = sum(confusion_matrix(x, y, 4, clusters) for x, y in zip(labels, predictions, strict=True))
    np.testing.assert_array_equal(one_by_one, expected)


def test_scores_by_hand() -> None:
    """Class 0 is cluster 1, class 1 cluster 0: IoU 6 / (6 + 2 + 1) and 5 / (5 + 1 + 2), accuracy 11 / 14."""
    result = scores(np.array([[2, 6], [5, 1]]))
    np.testing.assert_array_equal(result.clusters, [1, 0])
    np.testing.assert_allclose(result.iou, [600 / 9, 500 / 8])
    assert result.mean_iou == pytest.approx((600 / 9 + 500 / 8) / 2)
    assert result.pixel_accuracy == pytest.approx(1100 / 14)


def test_matching_is_global_not_greedy() -> None:
    """Class 0 has more pixels with cluster 0, but 8 + 9 pixels agree if class 1 gets it, and only 10 + 0 otherwise."""
    np.testing.assert_array_equal(match_clusters(np.array([[10, 8], [9, 0]])), [1, 0])


def test_class_absent_from_both_is_left_out() -> None:
    result = scores(np.array([[4, 0, 0], [0, 4, 0], [0, 0, 0]]))
    assert np.isnan(result.iou[2])
    assert result.mean_iou == 100
    assert result.pixel_accuracy == 100


def test_class_never_predicted_counts_as_zero() -> None:
    result = scores(np.array([[4, 0], [4, 0]]))
    np.testing.assert_allclose(np.sort(result.iou), [0, 50])
    assert result.mean_iou == 25


def test_more_clusters_than_classes() -> None:
    """The third cluster has no match: its 3 pixels are wrong, and are part of class 0's union."""
    result = scores(np.array([[5, 0, 3], [0, 2, 0]]))
    np.testing.assert_array_equal(result.clusters, [0, 1])
    np.testing.assert_allclose(result.iou, [500 / 8, 100])
    assert result.pixel_accuracy == 70


def test_fewer_clusters_than_classes() -> None:
    """Class 1 gets no cluster: IoU 0, and its pixels are errors, one of them inside class 0's cluster."""
    result = scores(np.array([[5, 0], [1, 0], [0, 4]]))
    np.testing.assert_array_equal(result.clusters, [0, -1, 1])
    np.testing.assert_allclose(result.iou, [500 / 6, 0, 100])
    assert result.pixel_accuracy == 90


def test_nothing_labelled_scores_nothing() -> None:
    result = scores(np.zeros((2, 2), dtype=np.int64))
    assert np.isnan(result.mean_iou)
    assert np.isnan(result.pixel_accuracy)
    assert np.isnan(result.iou).all()


@settings(deadline=None)
@given(seed=st.integers(0, 1000), classes=st.integers(1, 6), clusters=st.integers(1, 6))
def test_names_of_clusters_and_order_of_classes_do_not_matter(seed: int, classes: int, clusters: int) -> None:
    draw = np.random.default_rng(seed)
    # Counts so large that no two matchings agree on as many pixels: of those, any would do.
    confusion = draw.integers(0, 10**12, (classes, clusters))
    before = scores(confusion)
    rows, columns = draw.permutation(classes), draw.permutation(clusters)
    after = scores(confusion[rows][:, columns])
    assert after.pixel_accuracy == pytest.approx(before.pixel_accuracy)
    np.testing.assert_allclose(after.iou, before.iou[rows])


@settings(deadline=None)
@given(seed=st.integers(0, 1000), pixels=st.integers(0, 50))
def test_matrix_is_a_sum_over_pixels(seed: int, pixels: int) -> None:
    draw = np.random.default_rng(seed)
    labels, predictions = draw.integers(-1, 5, pixels), draw.integers(0, 6, pixels)
    expected = np.zeros((4, 6), dtype=np.int64)
    for label, prediction in zip(labels, predictions, strict=True):
        if 0 <= label < 4:
            expected[label, prediction] += 1
    np.testing.assert_array_equal(confusion_matrix(labels, predictions, 4, 6), expected)


def test_invariant_information() -> None:
    assert invariant_information(np.diag([5, 5, 5])) == pytest.approx(100)  # certain, and all classes alike
    assert invariant_information(np.array([[9, 0], [0, 0]])) == 0  # one class everywhere says nothing
    assert invariant_information(np.full((4, 4), 3)) == pytest.approx(0)  # independent
    assert invariant_information(np.zeros((3, 3), np.int64)) == 0
    # Two of four classes, as often: ln 2 of ln 4.
    assert invariant_information(np.diag([7, 7, 0, 0])) == pytest.approx(50)
    # A quarter flips: ln 2 - H(1/4) = 0.6931 - 0.5623 of 0.6931. Either order of the two images is the same.
    joint = np.array([[3, 2], [0, 3]])
    wanted = 100 * (np.log(2) + 0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(2)
    assert invariant_information(joint) == pytest.approx(wanted)
    assert invariant_information(joint.T) == pytest.approx(wanted)


def test_merit() -> None:
    assert merit({"mean_iou": 30.0, "pixel_accuracy": 60.0}) == 90
    assert merit({"mean_iou": None, "pixel_accuracy": None}) < 0
