"""Images inside Parquet files, Lance data sets and tar shards: the same bytes, with names that keep their order."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.refusals import refused
from transfgu import datasets
from transfgu.datasets import packed
from transfgu.datasets.listing import images_in
from transfgu.errors import LeftOut
from transfgu.recipe import preset
from transfgu.store import storage


def encoded(number: int, kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (4, 5, 3), np.uint8)).save(sink, kind)
    return sink.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w:") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as shard:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))


def write_parquet(path: Path, column: pa.Array, name: str = "image", rows: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"label": pa.array(range(len(column)), pa.int64()), name: column})
    pq.write_table(table, path, row_group_size=rows)


def unpacked(
    data: Path, folder: Path, limit: int = 0, stretch: int = packed.STRETCH
) -> tuple[dict[str, bytes], list[LeftOut]]:
    """Return files by relative name, and the left-out images."""
    left_out = [x for unit in packed.units(str(data), limit, stretch) for x in packed.unpack(unit, str(folder))]
    return {name: Path(uri).read_bytes() for name, uri in images_in(str(folder), recursive=True).items()}, left_out


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_column_of_bytes(tmp_path: Path, kind: pa.DataType) -> None:
    images = [encoded(0), encoded(1, "JPEG"), encoded(2, "WEBP"), None, encoded(4, "TIFF")]
    write_parquet(tmp_path / "data" / "some.parquet", pa.array(images, kind))
    files, left_out = unpacked(tmp_path / "data", tmp_path / "out")
    assert files == {
        "some/00000000.png": images[0],
        "some/00000001.jpg": images[1],
        "some/00000002.webp": images[2],
        "some/00000004.tif": images[4],
    }
    assert left_out == [LeftOut(name="some/00000003", reason="missing image")]


def test_the_struct_of_hugging_face(tmp_path: Path) -> None:
    rows = [{"bytes": encoded(0), "path": "cat.png"}, None, {"bytes": encoded(2), "path": None}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / "data" / f"{name}.parquet", pa.array(rows, kind))
    files, left_out = unpacked(tmp_path / "data", tmp_path / "out")
    assert sorted(files) == [
        *(f"train/train-0000{part}-of-00002/0000000{row}.png" for part in (0, 1) for row in (0, 2)),
        *(f"val/test-00000-of-00001/0000000{row}.png" for row in (0, 2)),
    ]
    assert files["train/train-00001-of-00002/00000002.png"] == encoded(2)
    assert len(left_out) == 3
    recipe = preset("folder").with_fields({"data": str(tmp_path / "out")})
    assert [len(datasets.list_samples(recipe, split)) for split in datasets.SPLITS] == [4, 2]


def test_tar_shards_keep_their_names(tmp_path: Path) -> None:
    members = {"b/1.png": encoded(1), "b/1.json": b"{}", "./a.JPG": encoded(2, "JPEG"), ".hidden.png": encoded(3)}
    write_tar(tmp_path / "shards" / "000.tar", {**members, "../out.png": encoded(4), "long" * 40 + ".png": encoded(5)})
    write_tar(tmp_path / "shards" / "001.tar", {"b/1.png": encoded(6)})
    files, _ = unpacked(tmp_path / "shards", tmp_path / "out")
    assert files == {
        "000/a.JPG": encoded(2, "JPEG"),
        "000/b/1.png": encoded(1),
        f"000/{'long' * 40}.png": encoded(5),
        "001/b/1.png": encoded(6),
    }


def test_long_shards_are_read_in_stretches(tmp_path: Path) -> None:
    images = {f"{i}.png": encoded(i) + bytes(600) for i in range(5)}  # some 1,500 bytes with their headers
    write_tar(tmp_path / "x.tar", images)
    units = packed.units(str(tmp_path / "x.tar"), stretch=2000)
    assert [(unit.first, unit.count) for unit in units] == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)]
    assert unpacked(tmp_path / "x.tar", tmp_path / "out", stretch=2000)[0] == {
        f"x/{name}": data for name, data in images.items()
    }


def test_splits_are_told_by_file_or_folder(tmp_path: Path) -> None:
    for name in ("train/0.tar", "validation/0.tar", "test-0.tar", "trainer.tar", ".cache/1.tar"):
        write_tar(tmp_path / name, {"a.png": encoded(0)})
    found = {pack.stem: pack.split for pack in packed.packs(str(tmp_path))}
    assert found == {"train/0": "train", "validation/0": "val", "trainer": ""}


def test_a_limit_reads_no_more_units_than_it_needs(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pa.array([encoded(i) for i in range(6)]), rows=2)
    write_parquet(tmp_path / "b.parquet", pa.array([encoded(i) for i in range(6)]), rows=2)
    assert [unit.name for unit in packed.units(str(tmp_path), 3)] == ["a-000000", "a-000001"]
    assert len(packed.units(str(tmp_path))) == 6


def test_the_image_column(tmp_path: Path) -> None:
    schema = pa.schema([("thumb", pa.binary()), ("png", pa.binary()), ("id", pa.int64())])
    assert packed.image_column(schema, "x") == "png"
    assert packed.image_column(schema.remove(1), "x") == "thumb"
    for wrong in (pa.schema([("id", pa.int64())]), pa.schema([("a", pa.binary()), ("b", pa.binary())])):
        with refused("image-column-missing x.parquet"):
            packed.image_column(wrong, "x.parquet")


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.tar"):
        (tmp_path / name).write_bytes(b"neither" * 200)
        with refused(f"file-damaged {name}"):
            packed.units(str(tmp_path / name))


@pytest.mark.usefixtures("no_ray")
def test_the_data_may_be_such_a_file(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.png": encoded(0)})
    datasets.preflight(preset("folder").with_fields({"data": str(tmp_path / "x.tar"), "things": 2, "stuff": 2}))
    with refused("file-missing y.tar"):
        datasets.preflight(preset("folder").with_fields({"data": str(tmp_path / "y.tar"), "things": 2, "stuff": 2}))


def write_lance(path: Path, column: pa.Array, name: str = "image", rows: int = 2) -> None:
    lance = pytest.importorskip("lance")
    table = pa.table({"label": pa.array(range(len(column)), pa.int64()), name: column})
    lance.write_dataset(table, str(path), max_rows_per_file=rows)


HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), HUGGING_FACE])
def test_columns_of_lance(tmp_path: Path, kind: pa.DataType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "ROWS", 3)
    images = [encoded(0), encoded(1, "JPEG"), None, encoded(3, "WEBP"), encoded(4, "TIFF")]
    rows = images if kind != HUGGING_FACE else [None if x is None else {"bytes": x, "path": ""} for x in images]
    write_lance(tmp_path / "data" / "train.lance", pa.array(rows, kind))
    units = packed.units(str(tmp_path / "data"))
    assert [(unit.first, unit.count) for unit in units] == [(0, 3), (3, 2)]
    files, left_out = unpacked(tmp_path / "data", tmp_path / "out")
    assert files == {
        "train/train/00000000.png": images[0],
        "train/train/00000001.jpg": images[1],
        "train/train/00000003.webp": images[3],
        "train/train/00000004.tif": images[4],
    }
    assert left_out == [LeftOut(name="train/train/00000002", reason="missing image")]


def test_blobs_of_lance_are_bytes(tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    schema = pa.schema([pa.field("image", pa.large_binary(), metadata={"lance-encoding:blob": "true"})])
    table = pa.table({"image": [encoded(0), encoded(1)]}, schema)
    lance.write_dataset(table, str(tmp_path / "x.lance"), data_storage_version="2.0")
    files, _ = unpacked(tmp_path / "x.lance", tmp_path / "out")
    assert list(files.values()) == [encoded(0), encoded(1)]


def test_rows_added_meanwhile_are_not_read(tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    write_lance(tmp_path / "x.lance", pa.array([encoded(0)]))
    (unit,) = packed.units(str(tmp_path / "x.lance"))
    lance.write_dataset(pa.table({"label": [1], "image": [encoded(1)]}), str(tmp_path / "x.lance"), mode="overwrite")
    packed.unpack(unit, str(tmp_path / "out"))
    assert [Path(uri).read_bytes() for uri in images_in(str(tmp_path / "out"), recursive=True).values()] == [encoded(0)]


@pytest.mark.usefixtures("no_ray")
def test_mistakes_with_lance_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lance(tmp_path / "x.lance", pa.array([encoded(0)]))
    write_lance(tmp_path / "columns.lance", pa.array(["no bytes"]))
    (tmp_path / "none.lance" / "data").mkdir(parents=True)
    write_lance(tmp_path / "damaged.lance", pa.array([encoded(0)]))
    for file in (tmp_path / "damaged.lance" / "data").iterdir():
        file.write_bytes(b"neither" * 200)

    def check(name: str) -> None:
        fields = {"data": str(tmp_path / name), "things": 2, "stuff": 2}
        datasets.preflight(preset("folder").with_fields(fields))

    check("x.lance")
    with refused("image-column-missing columns.lance label image"):
        check("columns.lance")
    with refused("lance-invalid none.lance"):
        check("none.lance")
    with refused("file-damaged damaged.lance"):
        unpacked(tmp_path / "damaged.lance", tmp_path / "out")
    with refused("lance-scheme gs://bucket/x.lance"):
        packed.units("gs://bucket/x.lance")
    monkeypatch.setitem(sys.modules, "lance", None)
    with refused("package-missing transfgu[lance]"):
        check("x.lance")


@pytest.mark.s3
def test_lance_in_a_bucket(s3: str, tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    table = pa.table({"image": [encoded(i) for i in range(3)]})
    options = storage.object_store_options(s3)
    lance.write_dataset(table, f"{s3}/data/birds.lance", max_rows_per_file=2, storage_options=options)
    for data in (f"{s3}/data", f"{s3}/data/birds.lance"):
        (unit,) = packed.units(data)
        assert packed.unpack(unit, str(tmp_path / "out")) == []
    files = images_in(str(tmp_path / "out"), recursive=True)
    assert {name: Path(uri).read_bytes() for name, uri in files.items()} == {
        f"birds/0000000{i}.png": encoded(i) for i in range(3)
    }
    with refused("lance-invalid nothing.lance"):
        packed.units(f"{s3}/nothing.lance")
