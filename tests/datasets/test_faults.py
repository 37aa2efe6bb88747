"""Bad input of every kind that data sets have, each made here and answered with one line; good neighbours survive."""

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfgu import datasets, progress
from transfgu.artifacts import Run
from transfgu.datasets import images
from transfgu.errors import BadInput, UserError
from transfgu.recipe import Recipe, preset
from transfgu.stages import samples as stage

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
    "a bomb": (png_of_size(60_000, 60_000), "image of more than 178 million pixels"),
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
    "out of range": (encode(GREY + 1), "label value 21, which is no class"),
    "16 bits out of range": (encode(GREY.astype(np.uint16) * 200), "label value 51000, which is no class"),
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
    """Whatever a decoder makes of damage, it is a picture or a reason."""
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
    "no --data": (nothing, {"data": ""}, "preset pascal-voc needs --data, a folder with JPEGImages/*.jpg"),
    "data not there": (
        nothing,
        {"data": "{root}/nowhere"},
        "there is no file or folder {root}/nowhere: check the path",
    ),
    "data a file": (nothing, {"data": "{root}/JPEGImages/00.jpg"}, "{root}/JPEGImages/00.jpg is a file, not a folder"),
    "data empty": (emptied, {}, "the folder {root} is empty: put the images there, or check the path"),
    "a folder too deep": (nothing, {"data": "{root}/JPEGImages"}, "{root}/JPEGImages has no JPEGImages and no Segm"),
    "another preset's data": (
        nothing,
        {"preset": "cityscapes"},
        "{root} has no leftImg8bit/train and no leftImg8bit/val and no gtFine/val: preset cityscapes expects "
        "leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and gtFine/{train,val}/<city>/*_gtFine_labelIds.png; "
        "it looks like the data of preset pascal-voc",
    ),
    "no labels": (remove("SegmentationClass"), {}, "{root} has no SegmentationClass: preset pascal-voc expects"),
    "no list": (remove(f"{LISTS}/val.txt"), {}, f"{{root}} has no {LISTS}/val.txt: preset pascal-voc expects"),
    "empty list": (
        replace(f"{LISTS}/train.txt", b"\n"),
        {},
        f"{{root}}/{LISTS}/train.txt names no image: fetch it again",
    ),
    "list not text": (
        replace(f"{LISTS}/train.txt", JPEG),
        {},
        f"{{root}}/{LISTS}/train.txt is not a text file of names",
    ),
    "a list of others": (
        replace(f"{LISTS}/train.txt", b"a\nb\n"),
        {},
        "{root} has no usable train image (2 samples, the first with a missing image): preset pascal-voc expects",
    ),
    "images lost": (
        remove("JPEGImages/03.jpg", "JPEGImages/07.jpg"),
        {},
        "2 of 10 train samples can't be used, such as 03 (missing image): complete the data set, or raise "
        "--dataset.max_bad_share from 0.1",
    ),
    "labels lost": (
        remove("SegmentationClass/13.png", "SegmentationClass/14.png"),
        {},
        "2 of 10 validation samples can't be used, such as 13 (missing label): complete the data set",
    ),
    "JSON cut off": (
        instances('{"annotations": [{"image_id": 1}, {"image'),
        {"preset": "coco-stuff-27"},
        "{root}/annotations/instances_train2017.json is cut off or annotates no image: fetch it again, or remove it",
    ),
    "JSON of something else": (
        instances("{}"),
        {"preset": "coco-stuff-27"},
        "{root}/annotations/instances_train2017.json is cut off or annotates no image",
    ),
    "labels of a benchmark": (nothing, {"labels": "{root}"}, "--labels is for preset folder; preset pascal-voc finds"),
    "labels not there": (
        nothing,
        {"preset": "folder", "labels": "{root}/masks"},
        "there is no file or folder {root}/masks: check the path",
    ),
    "labels of other images": (
        nothing,
        {"preset": "folder", "labels": "{root}/SegmentationClass"},
        "no label below {root}/SegmentationClass has the relative name of an image below {root}: name them alike",
    ),
    "no images, other files": (
        notes_alone,
        {"preset": "folder"},
        "{root} has no usable train image: preset folder expects images (.jpg, .png, ...) at any depth",
    ),
    "curated without COCO": (nothing, {"dataset.curated": True}, "--dataset.curated names COCO-Stuff ids"),
    "data for the demonstration": (
        nothing,
        {"preset": "shapes"},
        "preset shapes draws its own images: leave out --data",
    ),
    "concepts not classes": (
        nothing,
        {"things": 21},
        "the class list pascal_voc has 21 classes, background included, but",
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
    with pytest.raises(UserError) as caught:
        attempt(recipe.with_fields(given), tmp_path / "run")
    assert str(caught.value).startswith(expected.replace("{root}", str(root)))
    assert "\n" not in str(caught.value)


def test_a_few_losses_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    recipe = voc_tree(tmp_path / "data")
    remove("JPEGImages/03.jpg", "SegmentationClass/04.png", "SegmentationClass/14.png")(tmp_path / "data")
    run = Run(str(tmp_path / "run"))
    outcome = stage.run(recipe, run, progress.Progress("samples", quiet=True))
    assert [(x.name, x.reason) for x in outcome.left_out] == [("03", "missing image"), ("14", "missing label")]
    assert outcome.items == 18
    assert outcome.details == {"train images": 9, "validation images": 9, "validation labels": 9}
    train = stage.load(run, "train")
    assert train["name"].to_pylist() == ["00", "01", "02", "04", "05", "06", "07", "08", "09"]
    assert train["label"].null_count == 1  # 04 needs none to be learned from
