"""Masks from any program are scored on the same pixels as a run, and unsuitable ones are refused in one line."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.made_run import SIDE, MadeRun, make_run
from transfgu import Segmenter
from transfgu.baselines.masks import score_masks
from transfgu.datasets.mask_files import find_masks
from transfgu.datasets.rows import read_labelled_rows
from transfgu.errors import UserError
from transfgu.metrics import scores
from transfgu.recipe import Recipe
from transfgu.stages import evaluation, prediction, samples

OWN_SIZE = {"evaluation.protocol": "label"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def rows(made: MadeRun) -> pa.Table:
    return samples.labelled(made.recipe, made.run)


@pytest.fixture
def masks(made: MadeRun, rows: pa.Table, tmp_path: Path) -> Path:
    """Write masks like `transfgu predict`: indexed PNGs of class indices, next to the file that describes them."""
    segmenter = Segmenter.load(made.run.uri)
    colours = np.array(segmenter.colours, np.uint8)
    (tmp_path / "out" / "masks").mkdir(parents=True)
    for image in rows["image"].to_pylist():
        mask = segmenter.predict(image).astype(np.uint8)
        (tmp_path / "out" / "masks" / Path(image).name).write_bytes(prediction.png(mask, colours))
    (tmp_path / "out" / prediction.CLAIM).write_text("{}")
    return tmp_path / "out" / "masks"


def own_scores(recipe: Recipe, made: MadeRun, rows: pa.Table) -> dict[str, object]:
    """Return the counts of the run's own evaluation."""
    batch = read_labelled_rows(rows, recipe=recipe, protocol=recipe.evaluation.protocol)
    counted = evaluation.Count(recipe, [made.run.file("model.safetensors")], 1)(batch)["confusions"][0, 0]
    found = scores(counted)
    return {"mean_iou": found.mean_iou, "pixel_accuracy": found.pixel_accuracy, "iou": found.iou.tolist()}


def test_the_masks_of_a_run_score_as_the_run_itself_in_all_digits(made: MadeRun, rows: pa.Table, masks: Path) -> None:
    recipe = made.recipe.with_fields(OWN_SIZE)
    counted = score_masks(recipe, rows, str(masks.parent))  # the folder that --out named: its masks are found
    found = scores(counted.confusion)
    assert counted.images == len(rows) == 5
    wanted = own_scores(recipe, made, rows)
    assert (found.mean_iou, found.pixel_accuracy) == (wanted["mean_iou"], wanted["pixel_accuracy"])
    np.testing.assert_array_equal(found.iou, wanted["iou"])


def test_counts_are_those_of_the_pixels_by_hand(made: MadeRun, tmp_path: Path) -> None:
    label = np.array([[0, 0, 1, 1], [0, 0, 1, 1]], np.uint8)
    mask = np.array([[2, 2, 2, 3], [2, 2, 3, 3]], np.uint8)
    for name, pixels in (("label", label), ("mask", mask)):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "photo.png")
    table = pa.table({"name": ["photo"], "image": ["/data/photo.jpg"], "label": [str(tmp_path / "label/photo.png")]})
    counted = score_masks(made.recipe.with_fields(OWN_SIZE), table, str(tmp_path / "mask")).confusion
    assert counted[0, 2] == 4
    assert (counted[1, 2], counted[1, 3]) == (1, 3)
    assert counted.sum() == 8


def test_by_the_published_protocol_masks_of_the_images_size_serve_too(
    made: MadeRun, rows: pa.Table, masks: Path
) -> None:
    large = score_masks(made.recipe, rows, str(masks))
    for file in masks.iterdir():  # scenes of 64 x 64 have that size already, one has half the height
        picture = Image.open(file)
        picture.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(file)
    np.testing.assert_array_equal(score_masks(made.recipe, rows, str(masks)).confusion, large.confusion)


def test_a_mask_is_found_by_the_longest_end_of_the_images_path(tmp_path: Path) -> None:
    for name in ("a/0.png", "b/0.png", "1.png", "photo.jpg.png", "photo.png.png", "frankfurt_1.png", "deep/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (2, 2)).save(tmp_path / name)
    images = {
        "a/0": "s3://bucket/val/a/0.jpg",
        "b/0": "s3://bucket/val/b/0.jpg",
        "1": "/data/1.jpg",
        "photo.jpg": "/data/photo.jpg",
        "photo.png": "/data/photo.png",
        "frankfurt_1": "/data/frankfurt/frankfurt_1_leftImg8bit.png",
        "2": "/data/2.jpg",
        "3": "/data/3.jpg",
    }
    table = pa.table({"name": list(images), "image": list(images.values())})
    found = {name: Path(uri).relative_to(tmp_path).as_posix() for name, uri in find_masks(table, str(tmp_path)).items()}
    assert found == {
        "a/0": "a/0.png",
        "b/0": "b/0.png",
        "1": "1.png",
        "photo.jpg": "photo.jpg.png",
        "photo.png": "photo.png.png",
        "frankfurt_1": "frankfurt_1.png",
        "2": "deep/2.png",
    }


def refused(made: MadeRun, rows: pa.Table, masks: Path, **fields: object) -> UserError:
    with pytest.raises(UserError) as caught:
        score_masks(made.recipe.with_fields(OWN_SIZE | fields), rows, str(masks))
    assert "\n" not in str(caught.value)
    return caught.value


def test_what_does_not_fit_is_one_line(made: MadeRun, rows: pa.Table, masks: Path, tmp_path: Path) -> None:
    assert "nowhere" in str(refused(made, rows, tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert refused(made, rows, tmp_path / "empty").code == "masks-missing"

    first = masks / Path(rows["image"][0].as_py()).name
    good = first.read_bytes()
    Image.new("L", (SIDE, SIDE), 10).save(first)
    error = refused(made, rows, masks)
    assert error.code == "mask-class"
    assert "scene <0>" in str(error)
    assert "index 10" in str(error)

    Image.new("L", (SIDE, SIDE - 1)).save(first)
    assert refused(made, rows, masks).code == "mask-size"

    first.unlink()
    assert refused(made, rows, masks).code == "masks-missing"
    allowed = made.recipe.with_fields(OWN_SIZE | {"max_bad_share": 0.2})
    counted = score_masks(allowed, rows, str(masks))
    assert [(x.name, x.reason) for x in counted.left_out] == [("scene <0>", "missing mask")]
    assert counted.images == 4

    first.write_bytes(good)
    shutil.copy(first, first.with_suffix(".tif"))
    assert refused(made, rows, masks).code == "masks-ambiguous"


def test_a_mask_in_jpeg_is_left_out_with_the_reason(made: MadeRun, rows: pa.Table, masks: Path) -> None:
    first = masks / Path(rows["image"][0].as_py()).name
    Image.new("L", (SIDE, SIDE)).save(first.with_suffix(".jpg"), "JPEG")
    first.unlink()
    allowed = made.recipe.with_fields(OWN_SIZE | {"max_bad_share": 0.2})
    (left_out,) = score_masks(allowed, rows, str(masks)).left_out
    assert left_out.reason == "mask in JPEG, which changes class indices"


def test_rows_may_be_a_file_of_a_run(made: MadeRun, masks: Path) -> None:
    table = pq.read_table(made.run.file("samples/validation.parquet"))
    assert len(find_masks(table, str(masks))) == 5
