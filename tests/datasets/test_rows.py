from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DistributedSampler, TensorDataset

from tests.refusals import refused
from transfgu.datasets import map_files
from transfgu.datasets.rows import read_labelled_rows, read_training_rows, usable
from transfgu.recipe import preset
from transfgu.store import storage
from transfgu.training.order import Order

RECIPE = preset("shapes").with_fields({"image_size": (16, 16)})


def order(images: int, passes: int = 1, batch_size: int = 4, seed: int = 0) -> Order:
    return Order(images=images, passes=passes, batch_size=batch_size, seed=seed)


def test_an_epoch_is_cut_into_whole_batches() -> None:
    assert order(10).epoch(0).shape == (2, 4)  # two images wait for another epoch's shuffle
    assert order(10, passes=3).epoch(0).shape == (7, 4)
    assert order(3, batch_size=256).epoch(0).shape == (1, 3)
    assert order(3, passes=2, batch_size=5).epoch(0).shape == (1, 5)


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 9), st.integers(0, 50), st.integers(1, 11))
def test_any_number_of_workers_shares_the_same_batches(
    images: int, passes: int, batch_size: int, epoch: int, world: int
) -> None:
    whole = order(images, passes, batch_size)
    batches = whole.epoch(epoch)
    shares = [whole.share(epoch, rank, world) for rank in range(world)]
    for step, batch in enumerate(batches):
        assert sorted(np.concatenate([share[step] for share in shares])) == sorted(batch)
    rows = [share.shape[1] for share in shares]
    assert max(rows) - min(rows) <= 1
    assert len(np.unique(batches)) == batches.size
    assert batches.max() < images * passes


def test_order_follows_seed_and_epoch() -> None:
    first = order(50).epoch(3)
    np.testing.assert_array_equal(first, order(50).epoch(3))
    assert (first != order(50).epoch(4)).any()
    assert (first != order(50, seed=1).epoch(3)).any()


def write_parts(folder: Path, maps: np.ndarray, *, group: int) -> list[str]:
    """Maps of images 10, 11 ... in parts of three."""
    uris = []
    for start in range(0, len(maps), 3):
        some = maps[start : start + 3]
        column = pa.array([m.tobytes() for m in some], pa.binary())
        index = pa.array(range(10 + start, 10 + start + len(some)), pa.int32())
        sides = {n: pa.array([some.shape[axis]] * len(some), pa.int16()) for n, axis in (("h", 2), ("w", 3))}
        uris.append(str(folder / f"part-{start:08d}.parquet"))
        pq.write_table(pa.table({"index": index, "maps": column, **sides}), uris[-1], row_group_size=group)
    return uris


@pytest.mark.parametrize("group", [1, 2, 3])
def test_maps_are_found_in_any_order(tmp_path: Path, group: int) -> None:
    maps = np.random.default_rng(0).integers(-9, 9, (7, 2, 3, 4), np.int16)
    places = map_files.index_maps(write_parts(tmp_path, maps, group=group))
    assert places["index"].to_pylist() == list(range(10, 17))
    chosen = [5, 0, 6, 5, 2]
    np.testing.assert_array_equal(map_files.read_maps(places.take(chosen)), maps[chosen])


def test_a_part_that_became_another_is_named(tmp_path: Path) -> None:
    maps = np.zeros((2, 2, 3, 4), np.int16)
    places = map_files.index_maps(write_parts(tmp_path, maps, group=1))
    longer = places.set_column(2, "row", pa.array([0, 5], pa.int32()))
    with refused("artifact-damaged part-00000000.parquet"):
        map_files.read_maps(longer)


def plain_parts(folder: Path, maps: np.ndarray) -> list[str]:
    """The same as `write_parts`, written and indexed by the pseudo labels' stage."""
    made: dict[str, tuple[int, dict[str, list[int]]]] = {}
    for uri in write_parts(folder, maps, group=1):
        table = pq.read_table(uri)
        pq.write_table(table, uri, row_group_size=1, use_dictionary=False, compression="none")
        data = Path(uri).read_bytes()
        made[Path(uri).name] = (len(data), map_files.places(data))
    map_files.write_index(str(folder), made)
    return [str(folder / name) for name in made]


def test_an_index_says_where_maps_lie(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).integers(-9, 9, (7, 2, 3, 4), np.int16)
    parts = plain_parts(tmp_path, maps)
    sizes = [Path(part).stat().st_size for part in parts]
    before = storage.reads()
    places = map_files.index_maps(parts, sizes)
    assert storage.reads() - before == 1
    assert places["index"].to_pylist() == list(range(10, 17))
    assert places["part"].to_pylist() == [parts[i // 3] for i in range(7)]
    assert min(places["offset"].to_pylist()) > 4
    for chosen in ([5, 0, 6, 5, 2], list(range(7))):
        np.testing.assert_array_equal(map_files.read_maps(places.take(chosen)), maps[chosen])
    # A part that is another one than was indexed is opened; one that changes afterwards is named.
    pq.write_table(pq.read_table(parts[1]).slice(0, 2), parts[1], row_group_size=1)
    fresh = map_files.index_maps(parts, [Path(part).stat().st_size for part in parts])
    assert fresh["index"].to_pylist() == [10, 11, 12, 13, 14, 16]
    with refused("artifact-damaged part-00000003.parquet"):
        map_files.read_maps(places.take([5]))


def picture(path: Path, values: np.ndarray) -> str:
    Image.fromarray(values.astype(np.uint8)).save(path)
    return str(path)


def test_training_rows(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).integers(-9, 9, (2, 2, 3, 4), np.int16)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3))
    images = [picture(tmp_path / f"{i}.png", p) for i, p in enumerate(pixels)]
    places = map_files.index_maps(write_parts(tmp_path, maps, group=1)).drop_columns("index")
    rows = places.append_column("image", pa.array(images)).append_column("slot", pa.array([8, 9]))
    columns = read_training_rows(rows.take([1, 0]), size=(16, 16))
    assert sorted(columns) == ["image", "maps", "slot"]
    np.testing.assert_array_equal(columns["image"], pixels[[1, 0]].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(columns["maps"], maps[[1, 0]])
    np.testing.assert_array_equal(columns["slot"], [9, 8])
    Path(images[0]).write_bytes(b"gone bad")
    with refused("image-changed 0.png"):
        read_training_rows(rows, size=(16, 16))


def test_labelled_rows_say_why_one_is_left_out(tmp_path: Path) -> None:
    pixels = np.zeros((3, 16, 24, 3)) + np.array([10, 20, 30])[:, None, None, None]
    label = np.zeros((16, 24))
    label[:, 5] = 7
    images = [picture(tmp_path / f"{i}.png", p) for i, p in enumerate(pixels)]
    labels = [picture(tmp_path / f"l{i}.png", np.minimum(label, 255)) for i in range(2)] + [None]
    picture(tmp_path / "l1.png", label[:8])
    rows = pa.table({"name": ["a", "b", "c"], "image": images, "label": pa.array(labels, pa.string())})
    own = read_labelled_rows(rows, recipe=RECIPE, protocol="label")
    assert own["reason"].tolist() == ["", "label of 8 x 24 pixels for an image of 16 x 24", "missing label"]
    assert own["name"].tolist() == ["a", "b", "c"]
    assert own["image"].shape == (3, 3, 16, 16)
    assert (own["image"][0] == 10).all()
    # A label may end in zero bytes, which an array of bytes would lose.
    kept, (truth,) = usable(own)
    np.testing.assert_array_equal(truth, label)
    np.testing.assert_array_equal(kept, own["image"][:1])
    _, (truth,) = usable(read_labelled_rows(rows, recipe=RECIPE))
    assert truth.shape == (16, 16)


def test_stego_s_centre_crop_by_hand(tmp_path: Path) -> None:
    # 32 x 48 to sides of 16: halved to 16 x 24, and columns 4 to 20 of these kept; 48 x 32 is the same on its side.
    ramp = np.broadcast_to(np.arange(48) * 5, (32, 48))
    image, label = np.repeat(ramp[..., None], 3, 2), ramp // 120  # class 0 left of column 24, and 1 from there
    rows = pa.table(
        {
            "name": ["wide", "high"],
            "image": [picture(tmp_path / f"{i}.png", p) for i, p in enumerate((image, image.transpose(1, 0, 2)))],
            "label": [picture(tmp_path / f"l{i}.png", p) for i, p in enumerate((label, label.T))],
        }
    )
    kept, truths = usable(read_labelled_rows(rows, recipe=RECIPE, protocol="stego"))
    wide = 5 * (2 * np.arange(4, 20) + 0.5)  # two neighbours' mean
    np.testing.assert_allclose(kept[0], np.broadcast_to(wide, (3, 16, 16)), atol=0.5)
    np.testing.assert_array_equal(kept[1], kept[0].transpose(0, 2, 1))
    np.testing.assert_array_equal(truths[0], np.broadcast_to(np.arange(16) >= 8, (16, 16)))
    np.testing.assert_array_equal(truths[1], truths[0].T)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_published_order_is_that_of_torchs_sampler(world: int) -> None:
    """The published code makes a new sampler in each epoch, and never tells it the epoch."""
    ours = Order(images=24, passes=2, batch_size=8, seed=5, published=True)
    for rank in range(world):
        sampler: DistributedSampler[Any] = DistributedSampler(
            TensorDataset(torch.zeros(48)), num_replicas=world, rank=rank
        )
        for epoch in (0, 1):
            assert ours.share(epoch, rank, world).ravel().tolist() == list(sampler)
