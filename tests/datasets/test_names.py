"""Similar names: labels and masks of each image, found before work starts, on any file system."""

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.refusals import refused
from transfgu import datasets
from transfgu.datasets import names
from transfgu.datasets.listing import find_images, read_names
from transfgu.datasets.mask_files import find_masks
from transfgu.recipe import Recipe, preset
from transfgu.store import storage

NFC, NFD = (unicodedata.normalize(form, "\u00e9t\u00e9") for form in ("NFC", "NFD"))
PNG = b"\x89PNG\r\n\x1a\n" + bytes(60)


def touch(root: Path, *files: str, data: bytes = b"x") -> None:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def folder(data: Path, **fields: object) -> Recipe:
    return preset("folder").with_fields({"data": str(data), **fields})


@pytest.mark.parametrize(
    ("images", "outputs"),
    [
        (["a.jpg", "b/a.jpg"], ["a", "b/a"]),
        (["photo.jpg", "photo.png"], ["photo.jpg", "photo.png"]),
        # The mask of photo.jpg.webp would be photo.jpg, too.
        (["photo.jpg", "photo.png", "photo.jpg.webp"], ["photo.jpg", "photo.png", "photo.jpg.webp"]),
        (["x", "x.jpg"], ["x", "x.jpg"]),
        (["A.jpg", "a.jpg"], ["A.jpg.c88c8fca", "a.jpg.509b0d46"]),  # printf A.jpg | sha256sum
        # A mask `a.png` and a folder `a.png` can't lie in one place.
        (["a.jpg", "a.png/b.jpg"], ["a.jpg", "a.png/b"]),
    ],
)
def test_outputs_are_named_after_images(images: list[str], outputs: list[str]) -> None:
    assert names.output_names(images) == outputs


def test_outputs_of_both_unicode_forms_differ_in_either() -> None:
    found = names.output_names([f"{NFC}.jpg", f"{NFD}.jpg"])
    assert len({unicodedata.normalize("NFC", name) for name in found}) == 2
    assert names.output_names([f"{NFD}.jpg"]) == [NFD]


@given(st.sets(st.text("aAb./\u00e9e\u0301", min_size=1, max_size=6).filter(lambda n: n.strip("./")), max_size=8))
def test_no_two_outputs_are_one_where_case_is_ignored(images: set[str]) -> None:
    found = names.output_names(sorted(images))
    assert len({names.folded(name) for name in found}) == len(images)


@pytest.mark.parametrize(("path", "wanted"), [("a.b/c", "a.b/c"), ("a.b/c.d.e", "a.b/c.d"), (".x", ".x"), ("f", "f")])
def test_a_stem_is_of_the_file_alone(path: str, wanted: str) -> None:
    assert names.stem(path) == wanted


def test_labels_of_alike_images(tmp_path: Path) -> None:
    touch(tmp_path, "i/a.jpg", "i/a.png", "i/b.jpg", f"i/{NFC}.jpg", "l/a.jpg.png", "l/a.png", "l/b.png", "l/b.jpg")
    touch(tmp_path, f"l/{NFD}.png")
    found = datasets.list_samples(folder(tmp_path / "i", labels=str(tmp_path / "l")), "validation").to_pylist()
    assert {row["name"]: Path(row["label"]).name for row in found} == {
        "a.jpg": "a.jpg.png",
        "a.png": "a.png",
        "b.jpg": "b.png",  # the JPEG can be no label
        f"{NFC}.jpg": f"{NFD}.png",
    }


@pytest.mark.parametrize(
    ("files", "refusal"),
    [
        (("i/a.jpg", "i/a.png", "l/a.png"), "names-collide l/a.png a.jpg a.png a.jpg.png"),
        (("i/a.jpg", "l/a.png", "l/a.tif"), "names-collide l/a.png l/a.tif a.jpg"),
    ],
)
def test_labels_that_are_anybodys_are_refused(tmp_path: Path, files: tuple[str, ...], refusal: str) -> None:
    touch(tmp_path, *files)
    with refused(refusal):
        datasets.listing(folder(tmp_path / "i", labels=str(tmp_path / "l")), "validation")


def test_a_benchmark_with_two_files_of_one_sample_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "JPEGImages/a.jpg", "JPEGImages/a.png", "SegmentationClass/a.png")
    for split in ("train", "val"):
        touch(tmp_path, f"ImageSets/Segmentation/{split}.txt", data=b"a\n")
    with refused("names-collide JPEGImages/a.jpg JPEGImages/a.png a"):
        datasets.listing(preset("pascal-voc").with_fields({"data": str(tmp_path)}), "train")


def test_a_mask_of_two_images_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "i/x/1.jpg", "i/y/1.jpg", "m/1.png")
    rows = datasets.list_samples(folder(tmp_path / "i"), "train")
    with refused("masks-ambiguous m/1.png x/1.jpg y/1.jpg"):
        find_masks(rows, str(tmp_path / "m"))


# What is listed.


def test_a_folder_is_listed_once_whatever_links_lead_there(tmp_path: Path) -> None:
    touch(tmp_path, "data/a/1.jpg", "elsewhere/2.jpg")
    for link, to in {"data/self": ".", "data/a/up": "..", "data/b": "a", "data/out": "../elsewhere"}.items():
        (tmp_path / link).symlink_to(to)
    assert list(find_images(str(tmp_path / "data"), recursive=True).files) == ["a/1.jpg", "out/2.jpg"]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "there").symlink_to(tmp_path / "elsewhere")
    assert not storage.is_empty(str(tmp_path / "only"))


def test_what_is_not_read_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.JFIF", "c.heic", "film.mp4", "film2.MP4", "scan.dcm", "x.npy", ".hidden.jpg", "README")
    touch(tmp_path, "3fa9", data=PNG)
    (tmp_path / os.fsdecode(b"\xe9t\xe9.jpg")).write_bytes(b"x")
    (tmp_path / "annexed.jpg").symlink_to(".git/annex/objects/gone")
    found = find_images(str(tmp_path), recursive=True)
    assert list(found.files) == ["3fa9", "a.jpg", "annexed.jpg", "b.JFIF", "c.heic"]
    assert "annexed.jpg" not in found.versions
    assert found.passed == {
        **{".mp4": 2, "unusable name": 1, ".dcm": 1, ".npy": 1, "hidden": 1, "without a suffix": 1},
    }
    assert found.passed_text.startswith("2 .mp4, ")
    notes = datasets.listing(folder(tmp_path), "train").notes
    assert notes["files not read (.mp4)"] == 2


@pytest.mark.s3
def test_keys_with_an_empty_part_are_counted(s3: str) -> None:
    import boto3

    client = boto3.client("s3")
    for key in ("i/a.jpg", "i/b//c.jpg"):
        client.put_object(Bucket=s3.removeprefix("s3://"), Key=key, Body=b"x")
    found = find_images(f"{s3}/i", recursive=True)
    assert (list(found.files), found.passed) == (["a.jpg"], {"unusable name": 1})
    for attempt in (storage.exists, storage.check_readable, storage.check_writable):
        with refused("storage-failed"):
            attempt(f"{s3}/i/b//c")


@pytest.mark.parametrize("path", ["a\0b", "\udce9.jpg"])
@pytest.mark.parametrize("attempt", [storage.read_bytes_or_none, storage.exists])
def test_names_that_no_system_takes_are_one_line(tmp_path: Path, path: str, attempt: Callable[[str], object]) -> None:
    with refused("storage-failed"):
        attempt(str(tmp_path / path))


# Folders of one another.


def test_labels_that_are_the_images_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "data/a.jpg", "data/a.png")
    (tmp_path / "link").symlink_to("data")
    for labels in ("data", "data/", "data/../data", "link"):
        with refused("labels-among-images --labels --data"):
            datasets.preflight(folder(tmp_path / "data", labels=f"{tmp_path}/{labels}"))


@pytest.mark.parametrize("labels", ["data/truth", "link/truth", "truth"])
def test_labels_within_the_images_are_no_images(tmp_path: Path, labels: str) -> None:
    touch(tmp_path, "data/a.jpg", "data/truth/a.png")
    (tmp_path / "link").symlink_to("data")
    (tmp_path / "truth").symlink_to("data/truth")
    table = datasets.list_samples(folder(tmp_path / "data", labels=str(tmp_path / labels)), "train")
    assert table["name"].to_pylist() == ["a.jpg"]
    assert table["label"].null_count == 0


def test_labels_around_the_images(tmp_path: Path) -> None:
    touch(tmp_path, "d/images/a.jpg", "d/a.png")
    table = datasets.list_samples(folder(tmp_path / "d" / "images", labels=str(tmp_path / "d")), "train")
    assert [Path(label).name for label in table["label"].to_pylist()] == ["a.png"]


# Splits and lists, as programs write them.


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("train", "val"),
        ("train", "valid"),
        ("Training", "Validation"),
        ("images/train", "images/val"),
        ("TRAIN", "dev"),
    ],
)
def test_splits_as_exporters_name_them(tmp_path: Path, train: str, validation: str) -> None:
    touch(tmp_path, f"d/{train}/1.jpg", f"d/{validation}/2.jpg")
    touch(tmp_path, f"l/{train.removeprefix('images/')}/1.png", f"l/{validation.removeprefix('images/')}/2.png")
    recipe = folder(tmp_path / "d", labels=str(tmp_path / "l"))
    rows = [datasets.list_samples(recipe, split).to_pylist() for split in datasets.SPLITS]
    assert [[row["name"] for row in part] for part in rows] == [[f"{train}/1.jpg"], [f"{validation}/2.jpg"]]
    assert [[Path(row["label"]).name for row in part] for part in rows] == [["1.png"], ["2.png"]]


def test_images_in_no_split_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.jpg", "valid/2.jpg", "test/3.jpg", "4.jpg")
    assert datasets.listing(folder(tmp_path), "train").notes["images in no split"] == 2


KNOWN = dict.fromkeys(["a", "my photo", "2007_000032", NFC, "x.y"], "")


@pytest.mark.parametrize(
    "data",
    [
        b"a\nmy photo\n",
        b"\xef\xbb\xbfa\r\nmy photo\r\n\r\n",
        "a\nmy photo\n".encode("utf-16"),
        b"a.jpg\nmy photo.JPG",
        b"a 1\nmy photo.jpg\tlabels/my photo.png\n",
        b"JPEGImages/a.jpg SegmentationClass/a.png\nJPEGImages/my photo.jpg\n",
        b"a.jpg,a.png\nimages\\my photo.png\n",
        b"a -1\r  my photo  \r",
    ],
)
def test_lists_of_names(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(data)
    assert read_names(str(tmp_path / "list.txt"), KNOWN) == ["a", "my photo"]


def test_lists_of_other_names(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"x.y\n{NFD}\n/JPEGImages/2007_000032.jpg /S/2007_000032.png\nlost.jpg 1\n")
    assert read_names(str(tmp_path / "list.txt"), KNOWN) == ["x.y", NFC, "2007_000032", "lost"]
    for data in (b"\n \n", b" , \n/\n", b"a\0b", b"\xff\xd8\xff\xe0"):
        (tmp_path / "list.txt").write_bytes(data)
        with refused("list-damaged list.txt"):
            read_names(str(tmp_path / "list.txt"), KNOWN)
