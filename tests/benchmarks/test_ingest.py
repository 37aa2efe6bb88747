"""Files read per sample during ingest, counted in the process and at an S3 server; speed is not tested."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from tests.gateway import Gateway
from tests.store.test_storage import faults
from transfgu.benchmarks import ingest
from transfgu.datasets import map_files
from transfgu.recipe import ComputeRecipe, preset
from transfgu.runtime import parts as blocks
from transfgu.store import storage
from transfgu.training.batches import VERSIONS, Share, open_cache
from transfgu.training.order import Order

__all__ = ["faults"]  # the fixture

IMAGES = 70  # three parts: 32, 32 and 6


def test_the_first_epoch_reads_each_file_once_and_later_ones_none(tmp_path: Path) -> None:
    recipe = preset("coco-stuff-27").with_fields(
        {"image_size": (32, 32), "training_size": (32, 32), "compute.cache_folder": str(tmp_path)}
    )
    found = ingest.measure(recipe, IMAGES)
    assert found.first_epoch_requests_per_sample == (IMAGES + 3) / IMAGES
    assert found.requests_per_sample == 0
    assert found.bytes_per_sample == 3 * 32 * 32 + 2 * 29 * 4 * 4
    assert found.samples_per_second_per_core > 0
    assert f'"images": {IMAGES}' in found.to_json()


@pytest.mark.s3
def test_requests_at_the_server(s3: str, faults: Gateway, tmp_path: Path) -> None:
    size = (32, 32)
    recipe = preset("coco-stuff-27").with_fields({"image_size": size, "training_size": size})
    local = ingest.made_rows(recipe, IMAGES, tmp_path)
    parts = sorted(set(local["part"].to_pylist()))
    index = str(Path(parts[0]).parent / map_files.INDEX)
    for uri in [*parts, index, *local["image"].to_pylist()]:
        storage.write_bytes(f"{s3}/{Path(uri).name}", Path(uri).read_bytes())

    faults.asked.clear()
    rows = map_files.index_maps([f"{s3}/{Path(uri).name}" for uri in parts])
    assert len(faults.asked) == 1  # for any number of parts
    assert rows["index"].to_pylist() == list(range(IMAGES))

    faults.asked.clear()
    some = map_files.read_maps(rows.take([40, 3]))
    assert len(faults.asked) == 2  # a range of each part
    assert (map_files.read_maps(local.take([40, 3])) == some).all()

    images = [f"{s3}/{Path(uri).name}" for uri in local["image"].to_pylist()]
    rows = rows.drop_columns("index").append_column("image", pa.array(images))
    rows = rows.replace_schema_metadata({VERSIONS: b"one"})
    compute = ComputeRecipe(cache_folder=str(tmp_path / "cache"))
    sources = []
    for rank in range(2):  # two workers of a node
        order = Order(images=IMAGES, passes=1, batch_size=16, seed=0)
        share = Share(order=order, rows=rows, size=size, maps=(29, 4, 4), rank=rank, world=2)
        source = open_cache(share, compute, epochs=3, threads=4)
        assert source
        sources.append(source)
    faults.asked.clear()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source: list(source.epoch(0)), sources))
    for source in sources:
        source.settle()
    lines = [asked.line for asked in faults.asked]
    assert len(lines) == len(set(lines)) == IMAGES + len(parts)
    assert all(line.startswith("GET ") for line in lines)
    for source in sources:
        assert len(list(source.epoch(1))) == IMAGES // 16
    assert len(faults.asked) == IMAGES + len(parts)


@pytest.mark.s3
def test_a_stage_asks_for_each_image_once(s3: str, faults: Gateway, tmp_path: Path) -> None:
    files = ingest.write_photographs(tmp_path / "images", 20)
    for i, file in enumerate(files):
        storage.write_bytes(f"{s3}/{i:02d}.jpg", Path(file).read_bytes())
    uris = [f"{s3}/{i:02d}.jpg" for i in range(20)]
    listed = pa.table({"index": pa.array(range(20), pa.int32()), "name": uris, "image": uris})
    faults.asked.clear()
    block = blocks.ReadImages(size=(32, 32), interpolation="bilinear")(listed)
    assert block["reason"].null_count == 20
    assert sorted(asked.line.partition("/")[0] for asked in faults.asked) == ["GET "] * 20
