"""From a bucket of images to a bucket of masks: predicted once, the same after interruptions, bad ones reported."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.gateway import Gateway
from tests.made_run import MadeRun, make_run
from tests.refusals import refused
from tests.stages.small_run import BAD, picture, spoil
from transfgu.datasets.listing import Images, find_images
from transfgu.errors import UserError
from transfgu.recipe import ComputeRecipe
from transfgu.runtime import capacity, connect
from transfgu.runtime.progress import Progress
from transfgu.segmenter import Segmenter
from transfgu.stages import prediction
from transfgu.stages.prediction import PredictionJob, predict
from transfgu.store import parquet, predicted, storage

ROOT = Path(__file__).resolve().parents[2]
QUIET = Progress("prediction", quiet=True)
COMPUTE = ComputeRecipe(actors=2)
NAMES = ["a/003.png", "a/040.png", *(f"a/{n:03d}.jpg" for n in range(4, 39)), "b/001.jpg", "b/001.png", "c.bmp"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("made"))


def write_images(folder: Path, names: Sequence[str] = NAMES) -> Path:
    """Pictures of several formats, two of them bad, in folders."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(path)
    for number, how in BAD.items():
        path = folder / "a" / f"{number:03d}.png"
        if path.exists():
            spoil(path, "unreadable image" if how == "missing image" else how)
    (folder / "notes.txt").write_text("no image")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def job(made: MadeRun, folder: Path, **more: object) -> PredictionJob:
    asked = {"run": made.run.uri, "images": str(folder / "images"), "out": str(folder / "out")}
    return PredictionJob(**{**asked, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["png", "parquet"])
def test_masks_are_written_one_images_arrays_at_a_time(how: str, made: MadeRun, tmp_path: Path) -> None:
    side, count = 1500, 12
    rows = {
        "name": [f"{i}.png" for i in range(count)],
        "mask": [str(i) for i in range(count)],
        "size": [9] * count,
        "changed": [1] * count,
        "tag": [""] * count,
        "height": pa.array([side] * count, pa.int32()),
        "width": pa.array([side] * count, pa.int32()),
        "file": pa.nulls(count, pa.large_binary()),
        "reason": pa.nulls(count, pa.string()),
        "indices": pa.array([zlib.compress(bytes([i % 3]) * side**2) for i in range(count)], pa.large_binary()),
    }
    asked = job(made, write_images(tmp_path, ["a.png"]), images=str(tmp_path), format=how)
    asked = replace(asked, out=str(tmp_path.parent / f"{how}-masks"))
    prediction.preflight(asked)
    tracemalloc.start()
    held = pa.total_allocated_bytes()
    told = prediction.WriteMasks(job=asked)(pa.table(rows))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert told["made"].to_pylist() == [count]
    assert side**2 < peak < 7 * side**2  # an image at hand, one before it, and their buffers: not all twelve
    assert pa.total_allocated_bytes() - held < side**2
    if how == "png":
        found = [np.asarray(Image.open(Path(asked.out) / "masks" / f"{i}.png")) for i in range(count)]
    else:
        (file,) = (Path(asked.out) / "masks").glob("*.parquet")
        assert pq.ParquetFile(file).num_row_groups == count
        found = [np.frombuffer(mask, np.uint8).reshape(side, side) for mask in pq.read_table(file)["mask"].to_pylist()]
    assert [(int(mask.min()), int(mask.max())) for mask in found] == [(i % 3, i % 3) for i in range(count)]


def samples(*names: str) -> pa.Table:
    files = {name: f"/x/{name}" for name in names}
    versions = {name: storage.Version(size=9, changed=1) for name in names}
    return prediction.named_samples(Images(files=files, versions=versions, passed={}))


def test_masks_are_named_after_images_and_never_share_a_file() -> None:
    table = samples("b/photo.jpg", "a.jpg", "b/photo.png", "dir.v2/x.jpeg")
    assert table["name"].to_pylist() == ["a.jpg", "b/photo.jpg", "b/photo.png", "dir.v2/x.jpeg"]
    assert table["mask"].to_pylist() == ["a", "b/photo.jpg", "b/photo.png", "dir.v2/x"]


def test_a_mask_lies_on_what_a_viewer_shows(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    rows = prediction.named_samples(find_images(str(tmp_path)))
    for orient, shape in ((True, [8, 4]), (False, [4, 8])):
        read = prediction.ReadPhotos(size=(2, 2), interpolation="bilinear", orient=orient, keep_files=True)(rows)
        assert [read["height"][0].as_py(), read["width"][0].as_py()] == shape
        drawn = prediction.overlay(
            read["file"][0].as_py(), np.zeros(shape, np.uint8), np.zeros((1, 3), np.uint8), orient=orient
        )
        assert Image.open(io.BytesIO(drawn)).size == (shape[1], shape[0])


def test_masks_on_stored_and_on_turned_pixels_are_kept_apart(made: MadeRun, tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a/004.jpg"])
    prediction.preflight(job(made, tmp_path, orient=False))
    with refused("out-taken --orient"):
        prediction.preflight(job(made, tmp_path, orient=True))
    prediction.preflight(job(made, tmp_path))  # goes on with what is there
    assert prediction.resolved_orient(job(made, tmp_path)) is False
    assert prediction.resolved_orient(job(made, tmp_path, out=str(tmp_path / "other"))) is True


def test_what_is_to_be_made() -> None:
    table = samples(*(f"{n}.jpg" for n in range(6)))
    done = {"0.jpg", "1.jpg", "2.jpg"}

    def names(bad: dict[str, str], whole: bool) -> list[list[str]]:
        return [t["name"].to_pylist() for t in prediction.parts_to_make(table, 2, done, bad, whole=whole)]

    # A part that was stopped half way is made again whole, so that its batches are what they would have been.
    assert names({}, True) == [["2.jpg", "3.jpg"], ["4.jpg", "5.jpg"]]
    assert names({"3.jpg": "empty image"}, True) == [["3.jpg"], ["4.jpg", "5.jpg"]]
    assert names({}, False) == [["3.jpg"], ["4.jpg", "5.jpg"]]


def test_a_mask_is_an_indexed_png_in_its_classes_colours() -> None:
    mask = np.array([[0, 1], [2, 1]], np.uint8)
    colours = np.array([[0, 0, 0], [255, 0, 0], [1, 2, 3]], np.uint8)
    read = Image.open(io.BytesIO(prediction.png(mask, colours)))
    assert read.mode == "P"
    np.testing.assert_array_equal(np.asarray(read), mask)
    np.testing.assert_array_equal(np.asarray(read.convert("RGB")), colours[mask])


def test_a_mask_in_strips_is_the_same_png() -> None:
    mask = np.random.default_rng(0).integers(0, 5, (37, 300), dtype=np.uint8)
    colours = np.random.default_rng(1).integers(0, 256, (5, 3), dtype=np.uint8)
    data = prediction.png_of_strips(iter(np.split(mask, [10, 11, 30])), (37, 300), colours)
    whole = Image.open(io.BytesIO(prediction.png(mask, colours)))
    read = Image.open(io.BytesIO(data))
    assert read.mode == "P"
    np.testing.assert_array_equal(np.asarray(read), mask)
    np.testing.assert_array_equal(np.asarray(read.convert("RGB")), np.asarray(whole.convert("RGB")))


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", ["png", "parquet"])
def test_masks_in_tiles(made: MadeRun, tmp_path: Path, kind: prediction.Format) -> None:
    write_images(tmp_path / "images", ["a/004.jpg", "a/003.png", "b/001.png"])
    Image.fromarray(np.tile(picture(4), (2, 3, 1))).save(tmp_path / "images" / "wide.png")
    asked = job(made, tmp_path, format=kind, tile=64, overlap=16)
    done = predict(asked, COMPUTE, QUIET)
    assert (done.made, [bad.name for bad in done.left_out]) == (3, ["a/003.png"])
    segmenter = Segmenter.load(made.run.uri, device="cpu")
    if kind == "png":
        found = {n: np.asarray(Image.open(tmp_path / "out" / "masks" / f"{n}.png")) for n in ("a/004", "b/001", "wide")}
    else:
        rows = pq.read_table(tmp_path / "out" / "masks").to_pylist()
        found = {
            row["name"].rpartition(".")[0]: np.frombuffer(row["mask"], np.uint8).reshape(row["height"], row["width"])
            for row in rows
        }
    for file in ("a/004.jpg", "b/001.png", "wide.png"):
        expected = segmenter.predict(tmp_path / "images" / file, tile=64, overlap=16)
        np.testing.assert_array_equal(found[file.rpartition(".")[0]], expected)
    assert predict(asked, COMPUTE, QUIET).found == 3
    for overlap, refusal in ((32, "out-taken --tile --overlap"), (64, "tile-wrong 64")):
        with refused(refusal):
            prediction.preflight(job(made, tmp_path, format=kind, tile=64, overlap=overlap))


def shown_tiles(made: MadeRun, tmp_path: Path) -> list[str]:
    """Predict in tiles; return the lines that were printed."""
    out = io.StringIO()
    progress = Progress("prediction", stream=out, pause=0.005)
    predict(job(made, tmp_path, tile=64, overlap=48), COMPUTE, progress)
    return out.getvalue().splitlines()


@pytest.mark.usefixtures("without_ray")
def test_the_tiles_of_a_large_image_are_counted(made: MadeRun, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(np.tile(picture(4), (4, 8, 1))).save(tmp_path / "images" / "large.png")
    lines = shown_tiles(made, tmp_path)
    counted = [line.split()[1] for line in lines if " tiles " in line]
    assert len(set(counted)) > 2, lines
    assert len({of.partition("/")[2] for of in counted}) == 1
    assert lines[-1].startswith("prediction: 1/1 images")
    assert sum(line.startswith("prediction: 1/1 images") for line in lines) == 1


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_tiles_of_several_images_are_counted_in_actors(made: MadeRun, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(2):
        Image.fromarray(np.tile(picture(4), (4, 8, 1))).save(tmp_path / "images" / f"{number}.png")
    lines = shown_tiles(made, tmp_path)
    assert any("tiles of the images begun" in line for line in lines), lines
    assert lines[-1].startswith("prediction: 2/2 images")


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"run": "/nowhere/run"}, "run-missing recipe.yaml"),
        ({"images": "/nowhere/images"}, "file-missing /nowhere/images"),
        ({"images": "IMAGES/a/004.jpg"}, "folder-expected --images"),
        ({"images": "EMPTY"}, "images-missing --images"),
        ({"out": "IMAGES/masks"}, "folders-nested"),
        ({"out": "IMAGES/a/004.jpg/out"}, "folders-nested"),
        ({"out": "/proc/out"}, "storage-failed /proc/out"),
    ],
)
def test_mistakes_are_told_before_ray_starts(
    made: MadeRun, tmp_path: Path, change: dict[str, str], refusal: str
) -> None:
    write_images(tmp_path / "images", ["a/004.jpg"])
    (tmp_path / "empty").mkdir()
    places = {"IMAGES": str(tmp_path / "images"), "EMPTY": str(tmp_path / "empty")}
    for short, path in places.items():
        change = {name: value.replace(short, path) for name, value in change.items()}
    with refused(refusal):
        prediction.preflight(job(made, tmp_path, **change))


def test_another_models_masks_stay_as_they_are(made: MadeRun, tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a/004.jpg"])
    prediction.preflight(job(made, tmp_path))
    with refused("out-taken"):
        prediction.preflight(job(made, tmp_path, format="parquet"))
    claim = tmp_path / "out" / "prediction.json"
    told = json.loads(claim.read_text())
    assert told["averaged"] == {"scales": [1.0], "flip": False}
    claim.write_text(json.dumps({**told, "averaged": {"scales": [1.0], "flip": True}}))
    with refused("out-taken evaluation.scales evaluation.flip"):
        prediction.preflight(job(made, tmp_path))
    claim.write_text(json.dumps({name: value for name, value in told.items() if name != "averaged"}))
    prediction.preflight(job(made, tmp_path))  # made before anything was averaged
    assert told["classes"][0] == {"index": 0, "name": "target", "colour": [228, 26, 28]}
    claim.write_text(json.dumps({**told, "model": "0", "run": "s3://other/run"}))
    with refused("out-taken s3://other/run"):
        prediction.preflight(job(made, tmp_path))


def test_of_models_that_start_at_once_one_has_the_folder(made: MadeRun, tmp_path: Path) -> None:
    """Each process checks before any of them has written."""
    start, asked = threading.Barrier(8), job(made, tmp_path)

    def claim(model: int) -> str:
        start.wait()
        try:
            prediction.take_folder(
                asked,
                {
                    "model": str(model),
                    "run": f"/{model}",
                    "files": "png",
                    "averaged": {"scales": [1.0], "flip": False},
                    "orient": True,
                    "tiles": None,
                    "classes": [],
                },
            )
            return str(model)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(claim, range(8)))
    winner = json.loads((tmp_path / "out" / "prediction.json").read_text())["model"]
    refusal = f"{tmp_path}/out holds masks of /{winner}: choose another --out, or delete its content"
    assert told == [winner if winner == str(model) else refusal for model in range(8)]


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("how", [{"overlays": True}, {"format": "parquet"}])
def test_few_images_are_predicted_without_ray(how: dict[str, Any], made: MadeRun, tmp_path: Path) -> None:
    write_images(tmp_path / "images", [*NAMES[:31], "b/001.jpg"])
    asked = job(made, tmp_path, **how)
    first = predict(asked, COMPUTE, QUIET)
    assert (first.images, first.found, first.made, len(first.left_out)) == (32, 0, 30, 2)
    assert predict(asked, COMPUTE, QUIET).found == 30
    masks = files(tmp_path / "out" / "masks")
    if "format" not in how:
        assert len(masks) == len(files(tmp_path / "out" / "overlays")) == 30
        expected = Segmenter.load(made.run.uri).predict(str(tmp_path / "images" / "a" / "004.jpg"))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(masks["a/004.png"]))), expected)
    # One image more than that, and not one that was bad, is Ray's.
    write_images(tmp_path / "images", NAMES[31:])
    write_images(tmp_path / "images", [f"c/{number}.png" for number in range(33)])
    with pytest.raises(pytest.fail.Exception, match="Ray was started"):
        predict(asked, COMPUTE, QUIET)


@pytest.mark.s3
@pytest.mark.usefixtures("without_ray")
def test_images_in_s3_are_listed_once(
    made: MadeRun, tmp_path: Path, s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b/c.png"):
        file = io.BytesIO()
        Image.fromarray(picture(4)).save(file, "png")
        storage.write_bytes(f"{s3}/images/{name}", file.getvalue())
    gateway = Gateway(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", gateway.url)
    assert predict(job(made, tmp_path, images=f"{s3}/images"), COMPUTE, QUIET).made == 2
    gateway.close()
    listed = [parse_qs(urlsplit(asked.line.split()[1]).query) for asked in gateway.asked if "list-type=2" in asked.line]
    # Others only look whether the folder exists.
    assert [query["prefix"] for query in listed if query.get("max-keys") != ["1"]] == [["images/"]], listed


@pytest.mark.s3
def test_a_listing_with_tags_is_the_same_as_without(s3: str) -> None:
    for name in ("a.png", "b/c.png", "b/d e%.png", "x.partial"):
        storage.write_bytes(f"{s3}/images/{name}", b"12")
    for uri in (s3, f"{s3}/images", f"{s3}/images/", f"{s3}/nothing", f"{s3}/images/a.png"):
        for recursive in (True, False):
            tagged = storage.list_folder(uri, recursive, tags=True)
            plain = storage.list_folder(uri, recursive)
            assert {name: version._replace(tag="") for name, version in tagged.files.items()} == plain.files
            assert all(version.tag for version in tagged.files.values())
    assert len(storage.list_folder(s3, tags=True).files) == 3


@pytest.mark.s3
@pytest.mark.usefixtures("without_ray")
def test_an_image_in_s3_replaced_within_a_second_is_predicted_again(made: MadeRun, tmp_path: Path, s3: str) -> None:
    before, after = (
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)) for seed in (0, 1)
    )
    images = f"{s3}/images"

    def put(picture: Image.Image) -> storage.Version:
        file = io.BytesIO()
        picture.save(file, "bmp")  # without compression both have the same size
        storage.write_bytes(f"{images}/a.bmp", file.getvalue())
        return storage.list_folder(images, tags=True).files[f"{images}/a.bmp"]

    asked = job(made, tmp_path, images=images)
    put(before)
    assert predict(asked, COMPUTE, QUIET).made == 1
    assert predict(asked, COMPUTE, QUIET).found == 1
    now = put(after)
    # S3's clock may have gone on since: the record gets the time that a replacement within the second would have had.
    out = str(tmp_path / "out")
    records, _ = predicted.read(out)
    (name, record), *_ = records.items()
    assert record.image.tag != now.tag != ""
    assert record.image.size == now.size
    same_second = replace(record, image=record.image._replace(changed=now.changed))
    predicted.write(out, {name: same_second})
    assert predict(asked, COMPUTE, QUIET).made == 1
    expected = Segmenter.load(made.run.uri).predict(after)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "masks" / "a.png")), expected)
    # A record of an earlier version has no tags.
    table = pa.Table.from_pylist([{"name": name, "mask": "a", "size": now.size, "changed": now.changed}])
    parquet.write_table(f"{out}/{predicted.RECORD}", table)
    assert predict(asked, COMPUTE, QUIET).found == 1


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"overlays": True}, marks=pytest.mark.long),
        pytest.param({"format": "parquet"}, marks=pytest.mark.long),
        {"tile": 48, "overlap": 16},
    ],
)
def test_few_images_are_the_same_with_and_without_ray(
    how: dict[str, Any], made: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", NAMES[2:3] if "tile" in how else NAMES[:12])
    predict(job(made, tmp_path, **how, out=str(tmp_path / "by Ray")), COMPUTE, QUIET)
    monkeypatch.setattr(connect, "works_here", lambda: True)
    monkeypatch.setattr(prediction, "plan", lambda *_: pytest.fail("Ray was asked"))
    predict(job(made, tmp_path, **how, out=str(tmp_path / "here")), COMPUTE, QUIET)
    for kind in ("masks", "overlays"):
        assert files(tmp_path / "here" / kind) == files(tmp_path / "by Ray" / kind)
    assert files(tmp_path / "here" / "masks")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_masks_are_the_segmenters_and_only_what_lacks_is_made(made: MadeRun, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    asked = job(made, tmp_path, overlays=True)
    done = predict(asked, COMPUTE, QUIET)
    assert (done.images, done.found, done.made) == (40, 0, 38)
    assert [(x.name, x.reason) for x in done.left_out] == [
        ("a/003.png", "truncated image"),
        ("a/040.png", "unreadable image"),
    ]
    made_first = files(tmp_path / "out")
    assert sum(name.startswith("masks/") for name in made_first) == 38
    assert sum(name.startswith("overlays/") for name in made_first) == 38
    segmenter = Segmenter.load(made.run.uri)
    for name, mask in (("a/005.jpg", "a/005"), ("b/001.jpg", "b/001.jpg"), ("b/001.png", "b/001.png"), ("c.bmp", "c")):
        found = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{mask}.png"))
        expected = segmenter.predict(folder / name)
        assert found.shape == expected.shape
        assert (found == expected).mean() > 0.999  # another batch may round otherwise
        assert Image.open(tmp_path / "out" / "overlays" / f"{mask}.jpg").size == found.shape[::-1]

    # Again: bad ones are tried again, and nothing else; what is gone is made as it was; what is mended is made.
    (tmp_path / "out" / "masks" / "c.png").unlink()
    Image.fromarray(picture(3)).save(folder / "a" / "003.png")
    done = predict(asked, COMPUTE, QUIET)
    assert [x.name for x in done.left_out] == ["a/040.png"]
    made_again = files(tmp_path / "out")
    assert set(made_again) - set(made_first) == {"masks/a/003.png", "overlays/a/003.jpg"}
    same = [name for name in made_first if name.startswith(("masks/", "overlays/"))]
    assert all(made_again[name] == made_first[name] for name in same)


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", [pytest.param("png", marks=pytest.mark.ci_long), "parquet"])
def test_masks_of_other_versions_are_made_again(made: MadeRun, tmp_path: Path, kind: prediction.Format) -> None:
    folder = write_images(tmp_path / "images", ["a/004.jpg", "photo.jpg", "same.jpg", "gone.jpg", "spoilt.jpg"])
    asked = job(made, tmp_path, format=kind)
    assert predict(asked, COMPUTE, QUIET).made == 5
    assert predict(asked, COMPUTE, QUIET).found == 5
    before = (folder / "a" / "004.jpg").stat()
    other = picture(9)[:21]
    Image.fromarray(other).save(folder / "a" / "004.jpg")  # another picture, and older than its mask
    os.utime(folder / "a" / "004.jpg", ns=(before.st_atime_ns, before.st_mtime_ns - 10**9))
    (folder / "gone.jpg").unlink()
    (folder / "spoilt.jpg").write_bytes(b"no picture any more")
    Image.fromarray(picture(10)).save(folder / "photo.png")  # beside photo.jpg
    done = predict(asked, COMPUTE, QUIET)
    assert (done.images, [x.name for x in done.left_out]) == (5, ["spoilt.jpg"])
    assert done.orphans == 1
    masks = tmp_path / "out" / "masks"
    if kind == "png":
        shapes = {str(p.relative_to(masks)): np.asarray(Image.open(p)).shape for p in masks.rglob("*.png")}
        assert sorted(shapes) == ["a/004.png", "gone.png", "photo.jpg.png", "photo.png.png", "same.png"]
        assert shapes["a/004.png"] == other.shape[:2]
        (masks / "same.png").write_bytes(b"")
        assert predict(asked, COMPUTE, QUIET).made >= 1
        assert (masks / "same.png").stat().st_size > 67
    else:
        rows = [row for p in sorted(masks.iterdir()) for row in pq.read_table(p).to_pylist()]
        assert sorted(row["name"] for row in rows) == ["a/004.jpg", "photo.jpg", "photo.png", "same.jpg"]
        assert {row["name"]: row["height"] for row in rows}["a/004.jpg"] == 21
    assert predict(asked, COMPUTE, QUIET).found == 4


def test_masks_without_records_are_done_if_they_are_younger(made: MadeRun, tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["old.jpg", "new.jpg", "empty.jpg"])
    masks = tmp_path / "out" / "masks"
    masks.mkdir(parents=True)
    for name in ("old", "new", "empty", "other"):
        (masks / f"{name}.png").write_bytes(bytes(100 if name != "empty" else 0))
    os.utime(tmp_path / "images" / "new.jpg", (4e9, 4e9))  # changed after its mask was made
    asked = job(made, tmp_path)
    table = prediction.named_samples(find_images(asked.images, recursive=True))
    there = prediction.earlier_masks(asked, table)
    assert (there.done, there.orphans) == ({"old.jpg"}, 1)


def test_a_link_from_images_to_masks_is_refused(made: MadeRun, tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a.jpg"])
    (tmp_path / "out" / "masks").mkdir(parents=True)
    Image.fromarray(picture(1)).save(tmp_path / "out" / "masks" / "a.png")
    (tmp_path / "link").symlink_to("images")
    with refused("folders-nested"):
        prediction.preflight(job(made, tmp_path, out=str(tmp_path / "link" / "masks")))
    (tmp_path / "images" / "results").symlink_to("../out")
    with refused("folders-nested"):
        prediction.preflight(job(made, tmp_path))


@pytest.mark.long
@pytest.mark.ci_long
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_parquet_holds_each_image_once(made: MadeRun, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    asked = job(made, tmp_path, format="parquet")
    predict(asked, COMPUTE, QUIET)
    Image.fromarray(picture(3)).save(folder / "a" / "003.png")
    Image.fromarray(picture(4)).save(folder / "0.jpg")  # sorted first, so parts begin elsewhere
    done = predict(asked, COMPUTE, QUIET)
    assert (done.images, done.found, done.made, len(done.left_out)) == (41, 38, 2, 1)
    table = pa.concat_tables(pq.read_table(p) for p in sorted((tmp_path / "out" / "masks").iterdir()))
    assert sorted(table["name"].to_pylist()) == sorted({"0.jpg", *NAMES} - {"a/040.png"})
    row = table.to_pylist()[7]
    mask = np.frombuffer(row["mask"], np.uint8).reshape(row["height"], row["width"])
    assert (mask == Segmenter.load(made.run.uri).predict(folder / row["name"])).mean() > 0.999


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_operators_have_readable_names(made: MadeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = samples("a.jpg").append_column("height", pa.array([1]))
    prediction.plan(job(made, tmp_path), [table], (64, 64), COMPUTE).explain()
    shown = capsys.readouterr().out
    for name in ("ReadPhotos", "PredictMasks", "WriteMasks"):
        assert name in shown


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_has_the_cores_of_its_node(made: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(capacity.NODES, '[{"count": 8, "CPU": 8}]')
    table = samples("a.jpg").append_column("height", pa.array([1]))
    planned = prediction.plan(job(made, tmp_path), [table], (64, 64), ComputeRecipe(actors=9))
    operator: Any = planned._logical_plan.dag.input_dependencies[0]
    assert "PredictMasks" in operator.name
    assert operator.fn_constructor_kwargs["processes"] == 1  # nine actors, on eight nodes and this one


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.long
def test_200_images_through_s3_while_an_actor_is_killed(made: MadeRun, tmp_path: Path, s3: str) -> None:
    names = [f"{n % 3}/{n:04d}.jpg" for n in range(200)]
    folder = write_images(tmp_path / "images", names)
    for name in names:
        storage.write_bytes(storage.join(s3, "images", name), (folder / name).read_bytes())
    for file, data in files(Path(made.run.uri)).items():  # the model too comes from the bucket
        storage.write_bytes(storage.join(s3, "run", file), data)

    def start(out: str) -> "subprocess.Popen[str]":
        words = ["--run", f"{s3}/run", "--images", f"{s3}/images", "--out", f"{s3}/{out}", "--actors", "2"]
        command = [sys.executable, "jobs/predict.py", *words]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    calm = start("calm")
    said, complained = calm.communicate(timeout=300)
    assert calm.returncode == 0, complained
    assert said.startswith("200 masks made: ")

    disturbed, killed = start("disturbed"), 0
    while disturbed.poll() is None and not killed:
        # As soon as the first masks are there, and others are not.
        if storage.list_files(f"{s3}/disturbed/masks"):
            actors: list[psutil.Process] = []
            with contextlib.suppress(psutil.NoSuchProcess):  # one may end meanwhile: look again
                descendants = psutil.Process(disturbed.pid).children(recursive=True)
                actors = [p for p in descendants if "MapWorker" in " ".join(p.cmdline())]
            if actors:
                actors[0].send_signal(signal.SIGKILL)
                killed = len(storage.list_files(f"{s3}/disturbed/masks"))
        time.sleep(0.05)
    said, complained = disturbed.communicate(timeout=300)
    assert disturbed.returncode == 0, complained
    assert 0 < killed < 200, f"an actor should have been killed in the middle, not after {killed} masks"
    assert said.startswith("200 masks made: ")

    masks = {how: storage.list_files(f"{s3}/{how}/masks") for how in ("calm", "disturbed")}
    relative = {how: [uri.partition(f"/{how}/")[2] for uri in uris] for how, uris in masks.items()}
    assert relative["disturbed"] == relative["calm"]
    assert len(set(relative["disturbed"])) == 200
    for one, other in zip(masks["calm"], masks["disturbed"], strict=True):
        assert storage.read_bytes(one) == storage.read_bytes(other)
