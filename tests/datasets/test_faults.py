"""Bad input of every kind in data sets, each made here and reported in one line; good images next to it are used."""

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.made_run import write_encoder
from tests.refusals import refused
from transfgu import datasets, pipeline
from transfgu.datasets import images
from transfgu.datasets.rows import read_labelled_rows, usable
from transfgu.errors import BadInput
from transfgu.recipe import Recipe, preset
from transfgu.runtime import progress
from transfgu.stages import samples as stage
from transfgu.store.artifacts import Run

RANDOM = np.random.default_rng(0)
NOISE = RANDOM.integers(0, 256, (40, 30, 3), dtype=np.uint8)


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A few bytes that claim to be a picture of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


JPEG, PNG = encode(NOISE, "JPEG"), encode(NOISE)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"

IMAGES: dict[str, tuple[bytes | None, str]] = {
    "not there": (None, "missing image"),
    "empty": (b"", "empty image"),
    "text": (b"this is no picture", "unreadable image"),
    "an error page": (b"<!DOCTYPE html><html>404 Not Found</html>", "unreadable image"),
    "a program": (POSTSCRIPT, "unreadable image"),
    "zeros": (bytes(5000), "unreadable image"),
    "JPEG cut off": (JPEG[: len(JPEG) // 2], "truncated image"),
    "JPEG header alone": (JPEG[:4], "unreadable image"),
    "PNG cut off": (PNG[: len(PNG) // 2], "truncated image"),
    "PNG header alone": (PNG[:33], "unreadable image"),
    "PNG with a flipped header": (flipped(PNG, 18), "unreadable image"),
    "PNG with flipped pixels": (flipped(PNG, len(PNG) // 2), "damaged image"),
    "TIFF cut off": (encode(NOISE, "TIFF")[:500], "truncated image"),
    "a bomb": (png_of_size(60_000, 60_000), "image of more than 178956970 pixels"),
    "one pixel": (encode(NOISE[:1, :1]), "image of 1 x 1 pixels"),
    "one column": (encode(NOISE[:, :1]), "image of 40 x 1 pixels"),
    "floating point": (encode(NOISE[..., 0].astype(np.float32), "TIFF"), "image of floating-point numbers"),
    "32 bits": (
        encode(NOISE[..., 0].astype(np.int32) << 20, "TIFF"),
        "image of more than 16 bits a channel",
    ),
}

GREY = np.array([[0, 5, 255], [20, 20, 1]], np.uint8)
LABELS: dict[str, tuple[bytes | None, str]] = {
    "not there": (None, "missing label"),
    "empty": (b"", "empty label"),
    "text": (b"0 1 2", "unreadable label"),
    "cut off": (PNG[: len(PNG) // 2], "truncated label"),
    "too small": (encode(GREY[:1]), "label of 1 x 3 pixels for an image of 2 x 3"),
    "on its side": (encode(np.ascontiguousarray(GREY.T)), "label of 3 x 2 pixels for an image of 2 x 3"),
    "out of range": (encode(GREY + 1), "label value 21, which is not a class"),
    "16 bits out of range": (encode(GREY.astype(np.uint16) * 200), "label value 51000, which is not a class"),
    "colours": (encode(np.repeat(GREY[..., None], 3, 2)), "label of mode RGB, not one channel of class indices"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_image(kind: str, tmp_path: Path) -> None:
    data, reason = IMAGES[kind]
    if data is not None:
        (tmp_path / "x").write_bytes(data)
    with pytest.raises(BadInput) as caught:
        images.read_image(str(tmp_path / "x"))
    assert str(caught.value) == reason


@pytest.mark.parametrize("kind", LABELS)
def test_label(kind: str, tmp_path: Path) -> None:
    data, reason = LABELS[kind]
    if data is not None:
        (tmp_path / "x").write_bytes(data)
    with pytest.raises(BadInput) as caught:
        images.read_label(str(tmp_path / "x"), datasets.classes(preset("pascal-voc")), (2, 3))
    assert str(caught.value) == reason
    if data is None:
        with pytest.raises(BadInput, match="missing label"):
            images.read_label(None, datasets.classes(preset("pascal-voc")))


def test_no_flipped_byte_escapes(tmp_path: Path) -> None:
    """A decoder's result for damage is either a picture or a reason."""
    for data in (JPEG, PNG, encode(NOISE, "TIFF"), encode(NOISE, "GIF"), encode(NOISE, "WEBP"), encode(NOISE, "BMP")):
        for at in RANDOM.integers(0, min(len(data), 400), 25):
            with contextlib.suppress(BadInput):
                assert images.decode_image(flipped(data, int(at))).ndim == 3


def voc_tree(root: Path) -> Recipe:
    """Ten images of each split with their labels."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split, first in (("train", 0), ("val", 10)):
        names = [f"{first + i:02d}" for i in range(10)]
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            (root / f"JPEGImages/{name}.jpg").write_bytes(JPEG)
            (root / f"SegmentationClass/{name}.png").write_bytes(encode(np.zeros((40, 30), np.uint8)))
    return preset("pascal-voc").with_fields({"data": str(root)})


def remove(*names: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for name in names:
            path = root / name
            path.rename(path.with_name(path.name + ".away"))

    return change


def replace(name: str, data: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).write_bytes(data)

    return change


def nothing(root: Path) -> None:
    pass


def emptied(root: Path) -> None:
    for path in [p for p in root.rglob("*") if p.is_file()]:
        path.unlink()


def notes_alone(root: Path) -> None:
    emptied(root)
    (root / "notes.txt").write_text("x")


def instances(text: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for folder in ("images/train2017", "images/val2017", "annotations/train2017", "annotations/val2017"):
            (root / folder).mkdir(parents=True)
            (root / folder / ("1.png" if "annotations" in folder else "1.jpg")).write_bytes(b"x")
        (root / "annotations/instances_train2017.json").write_text(text)

    return change


LISTS = "ImageSets/Segmentation"
DATA: dict[str, tuple[Callable[[Path], None], dict[str, object], str]] = {
    "no --data": (nothing, {"data": ""}, "data-missing pascal-voc --data JPEGImages/*.jpg"),
    "data not there": (
        nothing,
        {"data": "{root}/nowhere"},
        "file-missing {root}/nowhere",
    ),
    "data a file": (nothing, {"data": "{root}/JPEGImages/00.jpg"}, "folder-expected {root}/JPEGImages/00.jpg"),
    "data empty": (emptied, {}, "folder-empty {root}"),
    "a folder too deep": (nothing, {"data": "{root}/JPEGImages"}, "data-layout {root}/JPEGImages SegmentationClass"),
    "another preset's data": (
        nothing,
        {"preset": "cityscapes"},
        "data-layout {root} leftImg8bit/train leftImg8bit/val gtFine/val cityscapes "
        "leftImg8bit/{train,val}/<city>/*_leftImg8bit.png pascal-voc",
    ),
    "no labels": (remove("SegmentationClass"), {}, "data-layout {root} SegmentationClass pascal-voc"),
    "no list": (remove(f"{LISTS}/val.txt"), {}, f"data-layout {{root}} {LISTS}/val.txt pascal-voc"),
    "empty list": (
        replace(f"{LISTS}/train.txt", b"\n"),
        {},
        f"list-damaged {{root}}/{LISTS}/train.txt",
    ),
    "list not text": (
        replace(f"{LISTS}/train.txt", JPEG),
        {},
        f"list-damaged {{root}}/{LISTS}/train.txt",
    ),
    "a list of others": (
        replace(f"{LISTS}/train.txt", b"a\nb\n"),
        {},
        "images-missing {root} train 2 pascal-voc",
    ),
    "images lost": (
        remove("JPEGImages/03.jpg", "JPEGImages/07.jpg"),
        {},
        "images-bad 2 10 train 03 --dataset.max_bad_share 0.1",
    ),
    "labels lost": (
        remove("SegmentationClass/13.png", "SegmentationClass/14.png"),
        {},
        "images-bad 2 10 validation 13",
    ),
    "JSON cut off": (
        instances('{"annotations": [{"image_id": 1}, {"image'),
        {"preset": "coco-stuff-27"},
        "annotations-damaged {root}/annotations/instances_train2017.json",
    ),
    "JSON of something else": (
        instances("{}"),
        {"preset": "coco-stuff-27"},
        "annotations-damaged {root}/annotations/instances_train2017.json",
    ),
    "labels of a benchmark": (nothing, {"labels": "{root}"}, "labels-unsupported --labels pascal-voc"),
    "labels not there": (
        nothing,
        {"preset": "folder", "labels": "{root}/masks"},
        "file-missing {root}/masks",
    ),
    "labels of other images": (
        nothing,
        {"preset": "folder", "labels": "{root}/SegmentationClass"},
        "labels-missing {root}/SegmentationClass {root}",
    ),
    "no images, other files": (
        notes_alone,
        {"preset": "folder"},
        "images-missing {root} train folder",
    ),
    "curated without COCO": (nothing, {"dataset.curated": True}, "curated-unsupported --dataset.curated"),
    "data for the demonstration": (
        nothing,
        {"preset": "shapes"},
        "data-unsupported shapes --data",
    ),
    "concepts not classes": (
        nothing,
        {"things": 21},
        "classes-mismatch pascal_voc 21",
    ),
}


def attempt(recipe: Recipe, run: Path) -> None:
    datasets.preflight(recipe)
    stage.run(recipe, Run(str(run)), progress.Progress("samples", quiet=True))


@pytest.mark.parametrize("kind", DATA)
def test_data_set(kind: str, tmp_path: Path) -> None:
    change, fields, expected = DATA[kind]
    root = tmp_path / "data"
    recipe = voc_tree(root)
    change(root)
    given = {k: v.replace("{root}", str(root)) if isinstance(v, str) else v for k, v in fields.items()}
    if "preset" in given:
        recipe = preset(str(given.pop("preset"))).with_fields({"data": str(root)})
    with refused(expected.replace("{root}", str(root))):
        attempt(recipe.with_fields(given), tmp_path / "run")


TREES: dict[str, tuple[str, str, str]] = {
    # Preset, images and labels; {s} is train or val, {n} a sample's name.
    "coco": ("coco-stuff-27", "images/{s}2017/{n}.jpg", "annotations/{s}2017/{n}.png"),
    "voc": ("pascal-voc", "JPEGImages/{n}.jpg", "SegmentationClass/{n}.png"),
    "cityscapes": (
        "cityscapes",
        "leftImg8bit/{s}/town/{n}_leftImg8bit.png",
        "gtFine/{s}/town/{n}_gtFine_labelIds.png",
    ),
    "lip": ("lip-16", "{s}_images/{n}.jpg", "{s}_segmentations/{n}.png"),
    "folder": ("folder", "{s}/{n}.jpg", "labels/{s}/{n}.png"),
}
LIST_FILES = {"voc": LISTS + "/{s}.txt", "lip": "{s}_id.txt"}


def tree_of(layout: str, root: Path) -> Recipe:
    """Four images of each split, a0 to a3 and b0 to b3, with labels."""
    name, image, label = TREES[layout]
    for split, letter in (("train", "a"), ("val", "b")):
        stems = [f"{letter}{i}" for i in range(4)]
        for stem in stems:
            for pattern, data in ((image, JPEG), (label, encode(np.zeros((40, 30), np.uint8)))):
                path = root / pattern.format(s=split, n=stem)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        if layout in LIST_FILES:
            path = root / LIST_FILES[layout].format(s=split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(stems))
    labels = {"labels": str(root / "labels")} if layout == "folder" else {}
    return preset(name).with_fields({"data": str(root), "max_bad_share": 0.5, **labels})


@pytest.mark.parametrize("layout", TREES)
def test_every_layout_names_what_is_bad_and_keeps_the_rest(layout: str, tmp_path: Path) -> None:
    recipe = tree_of(layout, tmp_path)
    _, image, label = TREES[layout]
    (tmp_path / image.format(s="train", n="a1")).unlink()
    (tmp_path / image.format(s="val", n="b0")).write_bytes(JPEG[: len(JPEG) // 2])
    (tmp_path / label.format(s="val", n="b1")).unlink()
    (tmp_path / label.format(s="val", n="b2")).write_bytes(encode(np.full((40, 30), 77, np.uint8)))
    train, validation = (datasets.listing(recipe, split) for split in datasets.SPLITS)
    # Layouts with lists know what is not there; elsewhere an image is what lies in the folder.
    assert [(x.name, x.reason) for x in train.left_out] == ([("a1", "missing image")] if layout in LIST_FILES else [])
    assert len(train.table) == 3
    suffix = ".jpg" if layout == "folder" else ""
    folder = "val/" if layout == "folder" else ""
    assert [(x.name, x.reason) for x in validation.left_out] == [(f"{folder}b1{suffix}", "missing label")]
    found = read_labelled_rows(validation.table, recipe=recipe)
    unknown = 77 if layout != "coco" else None  # of COCO's values, 77 is the microwave
    assert found["reason"].tolist() == [
        "truncated image",
        "" if unknown is None else "label value 77, which is not a class",
        "",
    ]


@pytest.mark.parametrize("layout", [layout for layout in TREES if layout != "folder"])
def test_every_layout_says_what_it_lacks(layout: str, tmp_path: Path) -> None:
    recipe = tree_of(layout, tmp_path)
    for needed in datasets.LAYOUTS[layout].needed:
        remove(needed)(tmp_path)
        with refused(f"data-layout {tmp_path} {needed} {recipe.preset}"):
            datasets.preflight(recipe)
        (tmp_path / f"{needed}.away").rename(tmp_path / needed)
    datasets.preflight(recipe)


def test_a_few_losses_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    recipe = voc_tree(tmp_path / "data")
    remove("JPEGImages/03.jpg", "SegmentationClass/04.png", "SegmentationClass/14.png")(tmp_path / "data")
    run = Run(str(tmp_path / "run"))
    outcome = stage.run(recipe, run, progress.Progress("samples", quiet=True))
    assert [(x.name, x.reason) for x in outcome.left_out] == [("03", "missing image"), ("14", "missing label")]
    assert outcome.items == 18
    counted = {"train images": 9, "validation images": 9, "validation labels": 9}
    unread = {"train files not read (.away)": 1, "train labels' files not read (.away)": 2}
    assert outcome.details == counted | unread
    train = stage.load(run, "train")
    assert train["name"].to_pylist() == ["00", "01", "02", "04", "05", "06", "07", "08", "09"]
    assert train["label"].null_count == 1  # 04 needs none to be learned from


def spoilt_tree(root: Path, bad: bool) -> Recipe:
    """VOC: twelve good training images, in every usable form, and between them all the bad ones of `IMAGES`."""
    recipe = voc_tree(root)
    good = {f"{i:02d}": encode(np.ascontiguousarray(np.roll(NOISE, i, 0)), "PNG") for i in range(9)}
    good |= {
        "grey": encode(NOISE[..., 0]),
        "sixteen bits": encode(NOISE[..., 0].astype(np.uint16) * 257),
        "cmyk": cmyk(NOISE),
    }
    files: dict[str, bytes | None] = {**good, **({f"bad {n}": data for n, (data, _) in IMAGES.items()} if bad else {})}
    for name, data in files.items():
        if data is not None:
            (root / "JPEGImages" / f"{name.replace(' ', '_')}.jpg").write_bytes(data)
    (root / LISTS / "train.txt").write_text("\n".join(name.replace(" ", "_") for name in files))
    write_encoder(root / "encoder.safetensors")
    fields = {
        **{"encoder.name": "tiny", "encoder.weights": str(root / "encoder.safetensors"), "max_bad_share": 0.7},
        **{"image_size": (64, 64), "feature_size": (64, 64), "training_size": (64, 64), "windows.size": (32, 32)},
    }
    return recipe.with_fields({**fields, "min_foreground": 0.1})


def cmyk(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(sink, "JPEG")
    return sink.getvalue()


@pytest.mark.ci_long
@pytest.mark.long
@pytest.mark.ray
def test_good_images_features_are_the_same_to_the_last_bit_with_every_bad_one_beside_them(
    tmp_path: Path, ray_cluster: None
) -> None:
    features = []
    for folder, bad in (("spoilt", True), ("sound", False)):
        (tmp_path / folder).mkdir()
        torch.manual_seed(0)
        recipe, run = spoilt_tree(tmp_path / folder, bad), Run(str(tmp_path / folder / "run"))
        metrics = pipeline.run_stages(recipe, run, until="features", quiet=True)
        assert {(x["name"], x["reason"]) for x in metrics["left_out"]} == (
            {(f"bad_{n.replace(' ', '_')}", reason) for n, (_, reason) in IMAGES.items()} if bad else set()
        )
        listed = stage.load(run, "train")["name"].to_pylist()
        rows = pa.concat_tables(pq.read_table(p) for p in sorted(Path(run.file("features")).glob("*.parquet")))
        found: dict[str, list[object]] = {}
        for row in rows.to_pylist():
            found.setdefault(listed[row.pop("index")], []).append(row)
        features.append(found)
    spoilt, sound = features
    assert len(sound) == 12  # each has windows
    assert spoilt == sound


def test_good_labels_are_the_same_with_every_bad_one_beside_them(tmp_path: Path) -> None:
    recipe = preset("pascal-voc").with_fields({"image_size": (16, 16)})
    picture = encode(np.zeros((2, 3, 3), np.uint8))
    rows, wanted = [], []
    for i, (name, (data, reason)) in enumerate(LABELS.items()):
        for kind, content in (("good", encode(GREY - (GREY == 1) * np.uint8(i % 2))), ("bad", data)):
            (tmp_path / f"{i} {kind}.jpg").write_bytes(picture)
            if content is not None:
                (tmp_path / f"{i} {kind}.png").write_bytes(content)
            where = {"image": str(tmp_path / f"{i} {kind}.jpg"), "label": str(tmp_path / f"{i} {kind}.png")}
            rows.append({"name": f"{name} {kind}", **where})
            wanted.append(reason if kind == "bad" else "")
    beside = read_labelled_rows(pa.Table.from_pylist(rows), recipe=recipe)
    alone = read_labelled_rows(pa.Table.from_pylist(rows[::2]), recipe=recipe)
    assert beside["reason"].tolist() == wanted
    (pixels, labels), (other_pixels, other_labels) = usable(beside), usable(alone)
    np.testing.assert_array_equal(pixels, other_pixels)
    np.testing.assert_array_equal(labels, other_labels)
    assert len(labels) == len(LABELS)
