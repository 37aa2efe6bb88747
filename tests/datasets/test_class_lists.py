"""Class lists: value maps equal the published ones; names and colours for every class of every preset."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.refusals import refused
from transfgu import datasets
from transfgu.datasets import shapes
from transfgu.presets import PRESETS
from transfgu.recipe import preset

PUBLISHED = {
    "coco-stuff-27": "coco_stuff_27",
    "coco-stuff-27-curated": "coco_stuff_27",
    "coco-stuff-171": "coco_stuff_171",
    "coco-80": "coco_80_plus_background",
    "pascal-voc": "pascal_voc_21",
    "cityscapes": "cityscapes_27",
    "lip-5": "lip_5",
    "lip-16": "lip_16",
    "lip-19": "lip_19",
}


def published_map(name: str) -> dict[int, int]:
    """Class by pixel value; -1 is ignored. A licence plate's -1 is 255 in a PNG."""
    tree = json.loads((Path(__file__).parents[1] / "reference" / "label_maps.json").read_text())
    return {int(value) % 256: index for value, index in tree[PUBLISHED[name]].items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_the_published_ones(name: str) -> None:
    found, expected = datasets.classes(preset(name)), published_map(name)
    assert {v: int(found.label_map[v]) for v in np.flatnonzero(found.known)} == expected


@pytest.mark.parametrize("name", PRESETS)
def test_every_class_has_a_name_and_a_colour_of_its_own(name: str) -> None:
    recipe = preset(name)
    found = datasets.classes(recipe)
    assert len(found.names) == len(set(found.names)) == recipe.classes
    assert len(found.colours) == len(set(found.colours)) == recipe.classes
    assert all(0 <= c <= 255 for colour in found.colours for c in colour)
    assert (found.names[0] == "background") == recipe.background
    assert found.label_map.max() == recipe.classes - 1


def test_names_stand_where_the_values_say() -> None:
    # Known by their ids: COCO's person is 1 and its toothbrush 90, stuff's banner 92 and wood 182 (PNG: one less).
    fine, coarse, things = (datasets.classes(preset(n)) for n in ("coco-stuff-171", "coco-stuff-27", "coco-80"))
    for value, name in {0: "person", 89: "toothbrush", 91: "banner", 181: "wood", 156: "sky-other"}.items():
        assert fine.names[fine.label_map[value]] == name
    for value, name in {0: "person", 2: "vehicle", 17: "animal", 156: "sky", 123: "plant", 148: "ground"}.items():
        assert coarse.names[coarse.label_map[value]] == name
    assert things.names[things.label_map[89]] == "toothbrush"
    assert things.names[things.label_map[156]] == "background"
    voc, city, lip = (datasets.classes(preset(n)) for n in ("pascal-voc", "cityscapes", "lip-5"))
    assert [voc.names[i] for i in (1, 15, 20)] == ["aeroplane", "person", "tv monitor"]
    assert voc.colours[15] == (192, 128, 128)  # as in the data set's own palette
    assert {v: city.names[city.label_map[v]] for v in (7, 11, 23, 26, 33)} == {
        7: "road", 11: "building", 23: "sky", 26: "car", 33: "bicycle",
    }  # fmt: skip
    assert lip.names[lip.label_map[13]] == "head"  # the face


def test_shapes_and_folders_number_their_classes() -> None:
    drawn = datasets.classes(preset("shapes"))
    assert drawn.names == shapes.CLASS_NAMES
    assert drawn.colours == tuple(shapes.CLASS_COLOURS)
    folder = datasets.classes(preset("folder").with_fields({"things": 3, "stuff": 0, "groups": "foreground"}))
    assert folder.names == ("background", "concept 1", "concept 2", "concept 3")
    assert folder.label_map.tolist() == [0, 1, 2, 3] + [-1] * 252
    assert np.flatnonzero(folder.known).tolist() == [0, 1, 2, 3, 255]
    assert len(datasets.classes(preset("folder").with_fields({"things": 300})).names) == 315


def test_palette_grows_without_changing() -> None:
    long = datasets.palette(171)
    assert datasets.palette(5) == long[:5]
    assert len(set(long)) == 171
    assert len(datasets.palette(800)) == 800


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        (
            {"things": 13},
            "classes-mismatch coco_stuff_27 27 28 --things",
        ),
        ({"dataset.classes": "ade20k"}, "class-list-unknown ade20k coco_stuff_27 auto"),
    ],
)
def test_classes_that_do_not_fit(fields: dict[str, object], refusal: str) -> None:
    with refused(refusal):
        datasets.classes(preset("coco-stuff-27").with_fields(fields))
