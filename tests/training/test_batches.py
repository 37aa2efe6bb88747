import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from PIL import Image

from tests.made_run import SIDE, TRAIN, MadeRun, make_run
from transfgu.learner import Batch
from transfgu.recipe import DECODING_BYTES, ComputeRecipe
from transfgu.stages.training import training_images
from transfgu.store import storage
from transfgu.training import batches as streams
from transfgu.training.batches import Cached, Resident, Share, Streamed
from transfgu.training.order import Order

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("streams"))


def share(made: MadeRun, rank: int, world: int, batch_size: int = 4, orient: bool = False) -> Share:
    return Share(
        order=Order(images=TRAIN, passes=2, batch_size=batch_size, seed=3),
        rows=training_images(made.run),
        size=(SIDE, SIDE),
        maps=(12, SIDE // 8, SIDE // 8),
        rank=rank,
        world=world,
        orient=orient,
    )


def test_a_stream_gives_what_memory_gives(made: MadeRun, ray_cluster: None) -> None:
    """Two epochs of six rows in a stream, then the third alone."""
    mine = share(made, 1, 2)
    images, maps = streams.load(mine, lambda pixels: pixels, 4)
    memory, stream = Resident(mine, images, maps), Streamed(mine, epochs=3, stream_rows=10, block_rows=4)
    for epoch in range(3):
        slots = []
        for wanted, got in zip(memory.epoch(epoch), stream.epoch(epoch), strict=True):
            np.testing.assert_array_equal(got.slots, wanted.slots)
            assert torch.equal(got.inputs, wanted.inputs)
            assert torch.equal(got.maps, wanted.maps)
            slots.append(got.slots)
        np.testing.assert_array_equal(slots, mine.order.epoch(epoch)[:, 1::2])
    assert images.float().std() > 10
    assert maps.float().std() > 0


def test_a_stream_may_begin_anywhere(made: MadeRun, ray_cluster: None) -> None:
    mine = share(made, 0, 1)
    got = [batch.slots for batch in Streamed(mine, epochs=9).epoch(7)]
    np.testing.assert_array_equal(got, mine.order.epoch(7))


@pytest.mark.parametrize("max_pixels", [4, 20_000_000])
def test_tasks_ask_for_the_memory_of_the_largest_image(max_pixels: int, made: MadeRun, ray_cluster: None) -> None:
    def asked(rows: pa.Table) -> dict[str, Any]:  # pickled by value: no task imports this file, and torch
        memory = ray.get_runtime_context().get_assigned_resources().get("memory", 0)
        image = np.full((len(rows), 1), memory, np.int64)
        return {"slot": rows["slot"].to_numpy(), "image": image, "maps": np.empty((len(rows), 0, 0, 0), np.int16)}

    mine = replace(share(made, 0, 1), maps=(0, 0, 0), max_pixels=max_pixels, read_rows=asked)
    told = {int(memory) for batch in Streamed(mine, epochs=1, block_rows=4).epoch(0) for memory in batch.inputs[:, 0]}
    assert told == {DECODING_BYTES * max_pixels + (128 << 20)}  # two such tasks fit on any machine


def test_a_worker_without_images_takes_part(made: MadeRun) -> None:
    batches = list(Streamed(share(made, 2, 3, batch_size=2), epochs=2).epoch(0))
    assert len(batches) == 6
    assert {tuple(batch.inputs.shape) for batch in batches} == {(0, 3, SIDE, SIDE)}
    assert {tuple(batch.maps.shape) for batch in batches} == {(0, 12, SIDE // 8, SIDE // 8)}


def test_what_would_stay_in_memory_is_known_before(made: MadeRun, ray_cluster: None) -> None:
    mine = share(made, 0, 1)
    images, maps = streams.load(mine, lambda pixels: pixels, 4)
    assert mine.bytes == images.nbytes + maps.nbytes


def cached(made: MadeRun, folder: Path, rank: int, world: int, epochs: int = 3, **how: Any) -> Cached:
    share_ = share(made, rank, world, **how)
    compute = ComputeRecipe(cache_folder=str(folder))
    source = streams.open_cache(share_, compute, epochs, threads=2)
    assert source
    return source


def equal(one: Iterable[Batch], other: Iterable[Batch]) -> int:
    count = 0
    for wanted, got in zip(one, other, strict=True):
        np.testing.assert_array_equal(got.slots, wanted.slots)
        assert torch.equal(got.inputs, wanted.inputs)
        assert torch.equal(got.maps, wanted.maps)
        count += 1
    return count


def test_a_cache_gives_what_a_stream_gives(made: MadeRun, tmp_path: Path) -> None:
    for rank in range(2):
        source, stream = cached(made, tmp_path, rank, 2), Streamed(share(made, rank, 2), epochs=3)
        for epoch in (0, 1, 2, 1):  # and begun again anywhere
            assert equal(stream.epoch(epoch), source.epoch(epoch)) == 3


def test_workers_and_trials_of_a_node_read_each_file_once(made: MadeRun, tmp_path: Path) -> None:
    sources = [cached(made, tmp_path, 0, 2), cached(made, tmp_path, 1, 2), cached(made, tmp_path, 0, 1)]
    before = storage.reads()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda source: list(source.epoch(0)), sources))
    for source in sources:
        source.settle()
    assert all(source.cache.has(np.arange(TRAIN)).all() for source in sources)
    reads = storage.reads() - before
    assert reads <= TRAIN + 2 * 6  # images once; maps of these two parts lie in one row group, and are read by Arrow
    for source in sources:
        list(source.epoch(1))
    assert storage.reads() - before == reads


def test_an_edited_image_is_noticed(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    versions = [training_images(made.run).schema.metadata]
    assert versions == [training_images(made.run).schema.metadata]
    image = Path(training_images(made.run)["image"][0].as_py())
    image.write_bytes(image.read_bytes() + b"\0")
    versions.append(training_images(made.run).schema.metadata)
    part = Path(made.run.artifact("pseudo_labels").file("part-00000004.parquet"))
    os.utime(part, (1, 1))
    versions.append(training_images(made.run).schema.metadata)
    assert len({tuple(v.items()) for v in versions}) == 3


def test_without_room_or_wish_there_is_no_cache(
    made: MadeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = share(made, 0, 1)
    assert streams.open_cache(mine, ComputeRecipe(cache_folder=str(tmp_path), cache_gib=0.0), 1) is None
    assert streams.open_cache(mine, ComputeRecipe(cache_folder="/proc/none"), 1) is None
    assert "no cache of images in /proc/none" in caplog.text
    half = 3.5 * mine.bytes / TRAIN / 2**30
    source = streams.open_cache(mine, ComputeRecipe(cache_folder=str(tmp_path), cache_gib=half), 2, threads=2)
    assert source
    assert source.cache.kept == 3
    assert "room for 3 of 6 images" in caplog.text
    assert equal(Streamed(mine, epochs=2).epoch(1), source.epoch(1)) == 3


def test_a_cache_holds_images_as_the_orientation_turns_them(tmp_path: Path) -> None:
    """Orientation 6: the upper left corner of the stored image is the upper right one of the shown image."""
    (tmp_path / "run").mkdir()
    made = make_run(tmp_path / "run")
    name = training_images(made.run)["image"][0].as_py()
    stored = np.full((SIDE, SIDE, 3), 40, np.uint8)
    stored[: SIDE // 2, : SIDE // 2] = 220
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(name, "JPEG", quality=95, exif=exif)
    stream = Streamed(share(made, 0, 1, orient=True), epochs=1)
    turned = cached(made, tmp_path / "caches", 0, 1, orient=True)
    assert equal(stream.epoch(0), turned.epoch(0))
    as_stored = cached(made, tmp_path / "caches", 0, 1)
    half = SIDE // 2
    for source, light in ((turned, (slice(0, half), slice(half, SIDE))), (as_stored, (slice(0, half), slice(0, half)))):
        pixels = next(b.inputs[b.slots % TRAIN == 0][0] for b in source.epoch(0) if (b.slots % TRAIN == 0).any())
        assert abs(float(pixels[:, *light].float().mean()) - 220) < 4
        assert abs((float(pixels.float().mean()) * 4 - float(pixels[:, *light].float().mean())) / 3 - 40) < 4
