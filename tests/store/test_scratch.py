"""Arrays on disk: they keep their content, use no memory when released, and leave nothing behind."""

import errno
import gc
from pathlib import Path

import numpy as np
import pytest

from transfgu.store.scratch import Scratch, available_memory


def mapped_memory() -> int:
    """Return the bytes of files that are mapped into this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(s.split()[1]) for s in lines if s.startswith(("RssFile", "RssShmem")))


def test_arrays_are_what_was_written_before_and_after_a_release(tmp_path: Path) -> None:
    room, generator = Scratch(str(tmp_path / "new")), np.random.default_rng(0)
    arrays = [generator.standard_normal((n, 96), np.float32) for n in (1, 1000, 0, 17, 5000)]
    kept = [room.keep(a) for a in arrays]
    blank = room.empty((300, 96))
    assert not blank.any()
    blank[:] = arrays[4][:300]
    for array in (*kept, blank, kept[4][100:1100], kept[4][::1][4999:]):
        room.release(array)
    assert (blank == arrays[4][:300]).all()
    for array, copy in zip(arrays, kept, strict=True):
        np.testing.assert_array_equal(array, copy)
    room.keep(arrays[3])[:] = 0  # writing to one touches no other
    np.testing.assert_array_equal(arrays[3], kept[3])
    assert not list((tmp_path / "new").iterdir())


def test_a_released_array_takes_no_memory(tmp_path: Path) -> None:
    room = Scratch(str(tmp_path))
    kept = [room.keep(np.full((25_000, 100), i, np.float32)) for i in range(10)]  # 10 MB each
    gc.collect()
    before = mapped_memory()
    for array in kept:
        array.sum()
    assert mapped_memory() > before + (90 << 20)
    for array in kept:
        room.release(array)
    assert mapped_memory() < before + (10 << 20)


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Scratch(str(tmp_path))
    with pytest.raises(OSError) as refused:  # noqa: PT011 - its number is looked at
        Scratch(str(tmp_path), 1 << 60)
    assert refused.value.errno == errno.ENOSPC
    room.spare = 1 << 60
    with pytest.raises(OSError) as full:  # noqa: PT011
        room.keep(np.ones((4, 4), np.float32))
    assert full.value.errno == errno.ENOSPC


def test_available_memory_is_told() -> None:
    total = next(s for s in Path("/proc/meminfo").read_text().splitlines() if s.startswith("MemTotal"))
    assert 1 << 20 < available_memory() <= 1024 * int(total.split()[1])
