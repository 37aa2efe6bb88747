"""Create a folder of images, and a recipe whose whole run takes seconds."""

import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.made_run import write_encoder
from transfgu.recipe import Recipe, preset

SIDE = 64
IMAGES = 6


def photographs(folder: Path, labels: bool = True) -> None:
    """Draw bright discs on noise, with their labels."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE]
    for i in range(IMAGES):
        disc = (x - random.integers(16, 48)) ** 2 + (y - random.integers(16, 48)) ** 2 < 14**2
        image = random.integers(0, 90, (SIDE, SIDE, 3), np.uint8)
        image[disc] += 150
        for name, pixels in (("images", image), *([("labels", disc.astype(np.uint8))] if labels else [])):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def pack(folder: Path) -> None:
    """Write the photographs also to one tar shard, `shard.tar`, and to Parquet row groups of four, in `rows`."""
    files = sorted((folder / "images").iterdir())
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for file in files:
            shard.add(file, file.name)
    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    (folder / "rows").mkdir()
    pq.write_table(pa.table({"image": rows}), folder / "rows" / "0.parquet", row_group_size=4)


def small(folder: Path, **fields: object) -> Recipe:
    """Return a folder's recipe of a few seconds, with a random encoder stored in the folder."""
    square = (SIDE, SIDE)
    if not (folder / "encoder.safetensors").exists():
        write_encoder(folder / "encoder.safetensors")
    return preset("folder").with_fields(
        {
            "data": str(folder / "images"),
            "labels": str(folder / "labels"),
            "things": 0,
            "stuff": 2,
            "encoder.name": "tiny",
            "encoder.weights": str(folder / "encoder.safetensors"),
            "groups": "all",
            "windows.size": (32, 32),
            **{f"dataset.{kind}_size": square for kind in ("image", "feature", "training")},
            "epochs": 2,
            "training.batch_size": 4,
            **fields,
        }
    )


def pack_lance(folder: Path) -> str:
    """Write the photographs also to a Lance data set of two fragments, one row deleted; returns its path."""
    lance = pytest.importorskip("lance")
    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted((folder / "images").iterdir())]
    rows.insert(4, {"bytes": b"deleted", "path": "deleted"})
    table = pa.table({"number": range(len(rows)), "image": rows})
    lance.write_dataset(table, folder / "set.lance", max_rows_per_file=4).delete("number = 4")
    return str(folder / "set.lance")
