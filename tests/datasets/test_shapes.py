"""Scenes depend only on their numbers, and show what their labels describe."""

import hashlib

import numpy as np
import pytest

from transfgu.datasets import shapes


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()


def test_a_scene_does_not_depend_on_which_were_drawn_before() -> None:
    forwards = [digest(*shapes.scene(7, "train", i)) for i in range(4)]
    backwards = [digest(*shapes.scene(7, "train", i)) for i in reversed(range(4))]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) == 4


def test_seed_split_and_index_each_make_another_scene() -> None:
    numbers = [(7, "train", 0), (8, "train", 0), (7, "val", 0), (7, "train", 1)]
    assert len({digest(*shapes.scene(*n)) for n in numbers}) == len(numbers)


def test_classes_have_names_and_colours_and_all_occur() -> None:
    assert len(shapes.CLASS_NAMES) == len(shapes.CLASS_COLOURS) == len(set(shapes.CLASS_COLOURS)) == 10
    seen = np.zeros(10, np.int64)
    for index in range(15):
        image, label = shapes.scene(11, "train", index)
        assert image.shape == (128, 128, 3)
        assert image.dtype == np.uint8
        assert label.shape == (128, 128)
        assert label.max() < 10
        present = np.unique(label)
        assert 1 <= (present < 6).sum() <= 3  # things
        assert 1 <= (present >= 6).sum() <= 2  # stuff
        seen += np.bincount(label.ravel(), minlength=10)
    assert (seen > 0).all()


def test_labels_lie_where_things_are() -> None:
    """Colours of things are vivid, those of stuff are not: pixels of things are more saturated on average."""
    vivid, dull = [], []
    for index in range(10):
        image, label = shapes.scene(12, "val", index)
        channels = image.astype(float)
        spread = channels.max(2) - channels.min(2)
        vivid.append(spread[label < 6].mean())
        dull.append(spread[label >= 6].mean())
    assert np.mean(vivid) > 2 * np.mean(dull)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="test"):
        shapes.scene(0, "test", 0)


def test_object_pictures_are_independent_and_show_all_classes() -> None:
    drawn = [shapes.object_image_and_class(3, i) for i in range(60)]
    assert {kind for _, kind in drawn} == set(range(10))
    assert len({digest(image) for image, _ in drawn}) == 60
    again = shapes.object_image(3, 37)
    assert again.shape == (72, 72, 3)
    assert (again == drawn[37][0]).all()
    assert shapes.object_image(3, 37, size=40).shape == (40, 40, 3)
