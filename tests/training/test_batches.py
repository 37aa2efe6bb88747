import numpy as np
import pytest
import torch

from tests.made_run import SIDE, TRAIN, MadeRun, make_run
from transfgu.stages.training import training_images
from transfgu.training import batches as streams
from transfgu.training.batches import Resident, Share, Streamed
from transfgu.training.order import Order

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("streams"))


def share(made: MadeRun, rank: int, world: int, batch_size: int = 4) -> Share:
    return Share(
        order=Order(images=TRAIN, passes=2, batch_size=batch_size, seed=3),
        rows=training_images(made.run),
        size=(SIDE, SIDE),
        maps=(12, SIDE // 8, SIDE // 8),
        rank=rank,
        world=world,
    )


def test_a_stream_gives_what_memory_gives(made: MadeRun, ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_STREAM_ROWS", 10)  # two epochs of six rows a stream, then the third alone
    monkeypatch.setattr(streams, "_BLOCK_ROWS", 4)
    mine = share(made, 1, 2)
    images, maps = streams.load(mine, lambda pixels: pixels, 4)
    memory, stream = Resident(mine, images, maps), Streamed(mine, epochs=3)
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


def test_a_worker_without_images_takes_part(made: MadeRun) -> None:
    batches = list(Streamed(share(made, 2, 3, batch_size=2), epochs=2).epoch(0))
    assert len(batches) == 6
    assert {tuple(batch.inputs.shape) for batch in batches} == {(0, 3, SIDE, SIDE)}
    assert {tuple(batch.maps.shape) for batch in batches} == {(0, 12, SIDE // 8, SIDE // 8)}


def test_what_would_stay_in_memory_is_known_before(made: MadeRun, ray_cluster: None) -> None:
    mine = share(made, 0, 1)
    images, maps = streams.load(mine, lambda pixels: pixels, 4)
    assert mine.bytes == images.nbytes + maps.nbytes
