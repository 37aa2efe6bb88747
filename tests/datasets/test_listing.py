"""Layouts: the samples of each benchmark's official folders, on a local tree and on S3, and the effect of a limit."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.datasets.test_class_lists import PUBLISHED, published_map
from tests.refusals import refused
from transfgu import datasets
from transfgu.datasets import coco, images
from transfgu.recipe import Recipe, preset
from transfgu.store import storage

FOLDERS = {"coco": "coco", "pasc": "voc", "city": "cityscapes", "lip-": "lip"}


def on_samples(name: str, samples: Path) -> Recipe:
    return preset(name).with_fields({"data": str(samples / FOLDERS[name[:4]])})


def touch(root: str, *names: str, data: bytes = b"") -> None:
    for name in names:
        storage.write_bytes(storage.join(root, name), data)


def names(recipe: Recipe, split: str) -> list[str]:
    found: list[str] = datasets.list_samples(recipe, split)["name"].to_pylist()
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_labels_counted_by_hand(name: str, samples: Path) -> None:
    recipe = on_samples(name, samples)
    datasets.preflight(recipe)
    tables = [datasets.list_samples(recipe, split).to_pylist() for split in datasets.SPLITS]
    values = published_map(name)
    for row in [*tables[0][:2], *tables[1]][:2]:
        counted: dict[int, int] = {}
        with Image.open(row["label"]) as picture:
            width, height = picture.size
            for value, count in enumerate(picture.histogram()[:256]):
                if count:
                    counted[values[value]] = counted.get(values[value], 0) + count
        image = images.read_image(row["image"])
        label = images.read_label(row["label"], datasets.classes(recipe), image.shape[:2])
        assert label.shape == (height, width)
        found, counts = np.unique(label, return_counts=True)
        assert dict(zip(found.tolist(), counts.tolist(), strict=True)) == counted


def test_a_folders_real_labels_counted_by_hand(samples: Path) -> None:
    voc = samples / "voc"
    recipe = folder(voc / "JPEGImages", labels=str(voc / "SegmentationClass"), things=20, stuff=0, groups="foreground")
    datasets.preflight(recipe)
    rows = datasets.list_samples(recipe, "validation").to_pylist()
    for row in (rows[0], rows[-1]):
        with Image.open(row["label"]) as picture:
            values = picture.histogram()[:256]
        counted = {-1 if value == 255 else value: count for value, count in enumerate(values) if count}
        found, counts = np.unique(images.read_label(row["label"], datasets.classes(recipe)), return_counts=True)
        assert dict(zip(found.tolist(), counts.tolist(), strict=True)) == counted


@pytest.mark.parametrize(
    ("name", "train", "validation", "first"),
    [
        ("coco-stuff-27", 98, 100, "000000000009"),  # two of the hundred have no instance annotation
        ("coco-stuff-27-curated", 98, 36, "000000000009"),
        ("pascal-voc", 40, 20, "2007_001917"),
        ("cityscapes", 2, 1, "aachen_000000_000019"),
        ("lip-16", 1, 1, "684_2150041"),
    ],
)
def test_real_folders(name: str, train: int, validation: int, first: str, samples: Path) -> None:
    recipe = on_samples(name, samples)
    table = datasets.list_samples(recipe, "train")
    assert table.schema.equals(datasets.SCHEMA)
    assert table["index"].to_pylist() == list(range(train))
    assert len(set(table["name"].to_pylist())) == train
    assert table["name"].to_pylist() == sorted(table["name"].to_pylist())
    assert table["name"][0].as_py() == first
    for row in table.to_pylist() + datasets.list_samples(recipe, "validation").to_pylist():
        assert Path(row["image"]).is_file()
        assert Path(row["label"]).is_file()
    assert datasets.list_samples(recipe, "validation").num_rows == validation


def test_curated_lists_are_the_published_ones() -> None:
    for split, file in {"train": "train", "validation": "val"}.items():
        text = (Path(__file__).parents[1] / "reference" / f"coco_stuff_curated_{file}.txt").read_text()
        assert coco.curated_names(split) == set(text.split())


def coco_tree(root: str, train: list[str], validation: list[str]) -> Recipe:
    for folder, stems in {"train2017": train, "val2017": validation}.items():
        touch(root, *(f"images/{folder}/{s}.jpg" for s in stems), *(f"annotations/{folder}/{s}.png" for s in stems))
    return preset("coco-stuff-27").with_fields({"data": root})


def test_limit_keeps_the_first_and_prefers_the_curated(tmp_path: Path) -> None:
    ids = [f"{i:012d}" for i in (9, 25, 30, 34, 36, 42)]  # 25, 30 and 42 are curated
    recipe = coco_tree(str(tmp_path), ids, [f"{i:012d}" for i in (139, 285, 724)])
    assert names(recipe.with_fields({"limit": 2}), "train") == ids[:2]
    curated = recipe.with_fields({"dataset.curated": True})
    assert names(curated, "train") == ids
    assert datasets.list_samples(curated, "train")["curated"].to_pylist() == [False, True, True, False, False, True]
    assert names(curated.with_fields({"limit": 2}), "train") == [ids[1], ids[2]]
    assert names(curated.with_fields({"limit": 4}), "train") == [ids[0], ids[1], ids[2], ids[5]]
    assert names(curated, "validation") == ["000000000139", "000000000724"]


def test_instances_json_decides_and_missing_files_are_named(tmp_path: Path) -> None:
    ids = [f"{i:012d}" for i in (1, 2, 34567, 5)]
    recipe = coco_tree(str(tmp_path), ids, ids)
    tree = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (1, 2, 5, 34567, 7)],
        "annotations": [{"id": 2, "image_id": i} for i in (1, 34567, 7, 1)],
        "categories": [],
    }
    text = json.dumps(tree, indent=1)
    file = tmp_path / "annotations" / "instances_train2017.json"
    file.write_text(text)
    for chunk in (7, 64, 1 << 20):  # a number cut by the end of a chunk is still one number
        assert coco.annotated_names(str(file), chunk) == {ids[0], ids[2], "000000000007"}
    listing = datasets.listing(recipe, "train")
    assert listing.table["name"].to_pylist() == [ids[0], ids[2]]
    assert [(x.name, x.reason) for x in listing.left_out] == [("000000000007", "missing image")]
    assert listing.notes == {"unannotated": 2}
    assert names(recipe, "validation") == sorted(ids)


def test_training_needs_no_label_and_validation_does(tmp_path: Path) -> None:
    recipe = coco_tree(str(tmp_path), ["1", "2", "3"], ["1", "2", "3"])
    for folder in ("train2017", "val2017"):
        (tmp_path / "annotations" / folder / "2.png").unlink()
    table = datasets.list_samples(recipe, "train")
    assert [label is None for label in table["label"].to_pylist()] == [False, True, False]
    listing = datasets.listing(recipe, "validation")
    assert listing.table["name"].to_pylist() == ["1", "3"]
    assert [(x.name, x.reason) for x in listing.left_out] == [("2", "missing label")]
    # What lies beyond the last sample that a limit keeps is not looked at.
    assert datasets.listing(recipe.with_fields({"limit": 1}), "validation").left_out == ()


def test_cityscapes_takes_label_ids_alone(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for stem in ("a/a_1_2", "b/b_1_2"):
            touch(str(tmp_path), f"leftImg8bit/{split}/{stem}_leftImg8bit.png")
            touch(
                str(tmp_path), *(f"gtFine/{split}/{stem}_gtFine_{k}.png" for k in ("color", "instanceIds", "labelIds"))
            )
    table = datasets.list_samples(preset("cityscapes").with_fields({"data": str(tmp_path)}), "validation")
    assert table["name"].to_pylist() == ["a_1_2", "b_1_2"]
    assert table["label"][1].as_py() == str(tmp_path / "gtFine/val/b/b_1_2_gtFine_labelIds.png")


def test_benchmarks_count_what_they_do_not_read(tmp_path: Path) -> None:
    coco_tree(str(tmp_path / "coco"), ["1"], ["2"])
    voc = ("JPEGImages/a.jpg", "JPEGImages/b.jpg", "SegmentationClass/a.png", "SegmentationClass/b.png")
    touch(str(tmp_path / "voc"), *voc, "JPEGImages/film.mp4", "SegmentationClass/a.mat")
    lists = tmp_path / "voc" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    ends = ("leftImg8bit/{}/x/x_1_leftImg8bit", "leftImg8bit/{}/x/x_1_other", "gtFine/{}/x/x_1_gtFine_labelIds")
    scapes = [f"{end.format(split)}.png" for split in ("train", "val") for end in ends]
    touch(str(tmp_path / "cityscapes"), *scapes, "gtFine/val/x/x_1_gtFine_polygons.json", "gtFine/val/x/x.txt")
    lip = [f"{split}_{kind}" for split in ("train", "val") for kind in ("images/1.jpg", "segmentations/1.png")]
    touch(str(tmp_path / "lip"), *lip, "train_images/.1.jpg")
    touch(str(tmp_path / "coco"), "images/train2017/film.mp4", "images/train2017/x.dcm", "annotations/val2017/y.npy")
    for file in (lists / "train.txt", lists / "val.txt", tmp_path / "lip/train_id.txt", tmp_path / "lip/val_id.txt"):
        file.write_text("1" if "lip" in file.parts else file.stem.replace("train", "a").replace("val", "b"))
    found = {
        name: [
            dict(datasets.listing(preset(of).with_fields({"data": str(tmp_path / name)}), s).notes)
            for s in datasets.SPLITS
        ]
        for name, of in (("coco", "coco-80"), ("voc", "pascal-voc"), ("cityscapes", "cityscapes"), ("lip", "lip-5"))
    }
    assert found == {
        "coco": [{"files not read (.mp4)": 1, "files not read (.dcm)": 1}, {"labels' files not read (.npy)": 1}],
        "voc": [{"files not read (.mp4)": 1, "labels' files not read (.mat)": 1}, {}],
        "cityscapes": [{"images of other names": 1}, {"images of other names": 1, "labels' files not read (.txt)": 1}],
        "lip": [{"files not read (hidden)": 1}, {}],
    }


def folder(root: Path, **fields: object) -> Recipe:
    return preset("folder").with_fields({"data": str(root), **fields})


def test_folder_without_splits_is_both(tmp_path: Path) -> None:
    touch(str(tmp_path), "b.JPG", "a/deep/1.png", "a/1.jpg", "a/1.png", "notes.txt", ".hidden/x.png", "a/._1.jpg")
    expected = ["a/1.jpg", "a/1.png", "a/deep/1.png", "b.JPG"]
    for split in datasets.SPLITS:
        assert names(folder(tmp_path), split) == expected
        assert datasets.list_samples(folder(tmp_path), split)["label"].null_count == 4
    assert names(folder(tmp_path, limit=2), "train") == expected[:2]


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_folder_with_splits(tmp_path: Path, validation: str) -> None:
    touch(str(tmp_path), "train/1.jpg", "train/2.jpg", f"{validation}/3.jpg", f"{validation}/4.jpg", "other/5.jpg")
    assert names(folder(tmp_path), "train") == ["train/1.jpg", "train/2.jpg"]
    assert names(folder(tmp_path), "validation") == [f"{validation}/3.jpg", f"{validation}/4.jpg"]
    touch(str(tmp_path), f"labels/{validation}/4.png")
    recipe = folder(tmp_path, labels=str(tmp_path / "labels"))
    listing = datasets.listing(recipe, "validation")
    assert listing.table["label"].to_pylist() == [str(tmp_path / "labels" / validation / "4.png")]
    assert [(x.name, x.reason) for x in listing.left_out] == [(f"{validation}/3.jpg", "missing label")]
    assert datasets.list_samples(recipe, "train")["label"].null_count == 2


def test_folder_scores_the_labelled_images_of_a_single_tree(tmp_path: Path) -> None:
    touch(str(tmp_path), "1.jpg", "x/2.jpeg", "x/3.jpg", "truth/x/2.png")
    recipe = folder(tmp_path, labels=str(tmp_path / "truth"))
    assert names(recipe, "train") == ["1.jpg", "x/2.jpeg", "x/3.jpg"]
    listing = datasets.listing(recipe, "validation")
    assert listing.table["name"].to_pylist() == ["x/2.jpeg"]
    assert listing.notes == {"unlabelled": 2}


@pytest.mark.s3
def test_s3_lists_as_a_local_tree(s3: str, tmp_path: Path) -> None:
    ids = [f"{i:012d}" for i in (9, 25, 139)]
    local, remote = coco_tree(str(tmp_path), ids, ids), coco_tree(f"{s3}/coco", ids, ids)
    datasets.preflight(remote)
    for split in datasets.SPLITS:
        here, there = (datasets.list_samples(r, split).to_pylist() for r in (local, remote))
        assert there == [
            {k: v.replace(str(tmp_path), f"{s3}/coco") if isinstance(v, str) else v for k, v in row.items()}
            for row in here
        ]
    with refused("bucket-missing absent-bucket"):
        datasets.preflight(remote.with_fields({"data": "s3://absent-bucket/coco"}))
    with refused(f"data-layout {s3}/coco JPEGImages coco-stuff-27"):
        datasets.preflight(preset("pascal-voc").with_fields({"data": f"{s3}/coco"}))
