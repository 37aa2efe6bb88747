"""The samples stage: scenes drawn by tasks equal those of the generator, and an interrupted attempt continues."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfgu import datasets
from transfgu.datasets import images
from transfgu.datasets.shapes import scene
from transfgu.recipe import preset
from transfgu.runtime.progress import Progress
from transfgu.stages import samples as stage
from transfgu.store.artifacts import Run

pytestmark = pytest.mark.ray


def test_scenes_are_drawn_once(tmp_path: Path, ray_cluster: None) -> None:
    recipe, run = preset("shapes").with_fields({"limit": 12, "seed": 5}), Run(str(tmp_path))
    told = io.StringIO()
    outcome = stage.run(recipe, run, Progress("samples", told))
    assert outcome.items == 24
    assert outcome.details == {"train images": 12, "validation images": 12, "validation labels": 12}
    assert "24/24 scenes" in told.getvalue()
    classes = datasets.classes(recipe)
    for split, stream in (("train", "train"), ("validation", "val")):
        table = stage.load(run, split)
        assert table.schema.equals(datasets.SCHEMA)
        assert table["index"].to_pylist() == list(range(12))
        for index in (0, 11):
            image, label = scene(5, stream, index)
            row = table.slice(index, 1).to_pylist()[0]
            np.testing.assert_array_equal(images.read_image(row["image"]), image)
            np.testing.assert_array_equal(images.read_label(row["label"], classes, image.shape[:2]), label)

    folder = tmp_path / "samples" / "scenes" / "train"
    before = (folder / "labels" / "000007.png").read_bytes()
    (folder / "labels" / "000007.png").unlink()
    Image.new("RGB", (4, 4)).save(folder / "images" / "000003.png")
    again = io.StringIO()
    assert stage.run(recipe, run, Progress("samples", again)) == outcome
    assert (folder / "labels" / "000007.png").read_bytes() == before
    assert Image.open(folder / "images" / "000003.png").size == (4, 4)  # what is there is not drawn again
