"""The node's cache of samples: filled once by the first reader, shared by processes and threads, limited in size."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from transfgu.datasets.sample_cache import Layout, SampleCache

ROOM = 1 << 40


def layout(key: str = "one", samples: int = 6) -> Layout:
    return Layout(key=key, samples=samples, image_bytes=12, maps_bytes=8)


def image(position: int) -> np.ndarray:
    return np.full(12, position, np.uint8)


def maps(position: int) -> np.ndarray:
    return np.full(4, -position, np.int16)


class Reader:
    """Reads samples through a cache and counts the decoded ones; parts have three samples each."""

    def __init__(self, cache: SampleCache) -> None:
        self.cache, self.images, self.parts = cache, list[int](), list[int]()

    def read(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        found, planes = np.empty(12, np.uint8), np.empty(4, np.int16)
        self.cache.image(position, found, lambda: self._image(position))
        others = np.arange(position // 3 * 3, position // 3 * 3 + 3)
        self.cache.maps(position, planes, position // 3, others, lambda: self._part(others))
        return found, planes

    def _image(self, position: int) -> np.ndarray:
        self.images.append(position)
        return image(position)

    def _part(self, others: np.ndarray) -> list[np.ndarray]:
        self.parts.append(int(others[0]))
        return [maps(other) for other in others.tolist()]


def check(found: tuple[np.ndarray, np.ndarray], position: int) -> None:
    np.testing.assert_array_equal(found[0], image(position))
    np.testing.assert_array_equal(found[1], maps(position))


def test_a_sample_is_made_once_and_a_part_once(tmp_path: Path) -> None:
    cache = SampleCache(str(tmp_path), layout(), ROOM)
    reader = Reader(cache)
    for position in (4, 0, 4, 5, 1, 0):
        check(reader.read(position), position)
    assert reader.images == [4, 0, 5, 1]
    assert reader.parts == [3, 0]
    assert cache.has(np.arange(6)).tolist() == [True, True, False, False, True, True]
    cache.close()
    again = SampleCache(str(tmp_path), layout(), ROOM)
    found, planes = np.empty(12, np.uint8), np.empty(4, np.int16)
    again.read(4, found, planes)
    check((found, planes), 4)
    again.close()


def test_threads_and_caches_opened_twice_share_one_fill(tmp_path: Path) -> None:
    readers = [Reader(SampleCache(str(tmp_path), layout(samples=60), ROOM)) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        jobs = [(reader, position) for position in range(60) for reader in readers]
        for found, (_, position) in zip(pool.map(lambda job: job[0].read(job[1]), jobs), jobs, strict=True):
            check(found, position)
    assert sorted(readers[0].images + readers[1].images) == list(range(60))
    assert sorted(readers[0].parts + readers[1].parts) == list(range(0, 60, 3))


def test_other_versions_are_another_cache(tmp_path: Path) -> None:
    first = SampleCache(str(tmp_path), layout("one"), ROOM)
    Reader(first).read(2)
    second = SampleCache(str(tmp_path), layout("two"), ROOM)
    assert not second.has(np.arange(6)).any()


def test_the_least_recently_used_goes_first_and_none_in_use(tmp_path: Path) -> None:
    limit = 3 * 6 * 20  # three of them
    caches = [SampleCache(str(tmp_path), layout(key), limit) for key in ("a", "b", "c")]
    caches[0].close()
    caches[2].close()
    SampleCache(str(tmp_path), layout("a"), limit).close()  # used again: "c" is the oldest that is idle
    SampleCache(str(tmp_path), layout("d"), limit).close()
    names = {folder.name for folder in tmp_path.iterdir() if folder.is_dir()}
    assert names == {layout(key).name for key in ("a", "b", "d")}
    # "b" stays, as it is in use, and leaves room for two thirds of this one.
    large = SampleCache(str(tmp_path), layout("e", samples=18), limit)
    assert large.kept == 12
    assert {folder.name for folder in tmp_path.iterdir() if folder.is_dir()} == {
        layout("b").name,
        layout("e", 18).name,
    }
    reader = Reader(large)
    for _ in range(2):
        for position in (11, 12):
            check(reader.read(position), position)
    assert reader.images == [11, 12, 12]  # what has no room is made each time


def test_a_full_disk_costs_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(SampleCache(str(tmp_path), layout(), ROOM))
    with monkeypatch.context() as patch:

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "pwrite", full)
        for position in (1, 1):
            check(reader.read(position), position)
    assert reader.images == [1, 1]


def test_a_restart_of_the_machine_keeps_whole_caches_alone(tmp_path: Path) -> None:
    for key, count in (("whole", 6), ("begun", 5)):
        cache = SampleCache(str(tmp_path), layout(key), ROOM)
        reader = Reader(cache)
        for position in range(count):
            reader.read(position)
        cache.seal()
        cache.close()
    assert SampleCache(str(tmp_path), layout("whole"), ROOM, boot="another").has(np.arange(6)).all()
    assert not SampleCache(str(tmp_path), layout("begun"), ROOM, boot="another").has(np.arange(6)).any()


@pytest.mark.processes
def test_a_process_that_dies_gives_its_cache_up(tmp_path: Path) -> None:
    code = f"""
import os
from transfgu.datasets.sample_cache import Layout, SampleCache
cache = SampleCache({str(tmp_path)!r}, Layout(key="one", samples=6, image_bytes=12, maps_bytes=8), 1 << 40)
with cache.lock(0):
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    reader = Reader(SampleCache(str(tmp_path), layout(), ROOM))
    check(reader.read(0), 0)
    reader.cache.close()
    SampleCache(str(tmp_path), layout("other"), 6 * 20).close()
    assert not (tmp_path / layout().name).exists()


def test_methods_without_maps(tmp_path: Path) -> None:
    cache = SampleCache(str(tmp_path), Layout(key="one", samples=2, image_bytes=12, maps_bytes=0), ROOM)
    found, planes = np.empty(12, np.uint8), np.empty((0, 0, 0), np.int16)
    cache.image(1, found, lambda: image(1))
    cache.maps(1, planes, 0, np.empty(0, int), lambda: [])
    assert cache.has(np.arange(2)).tolist() == [False, True]
    found[:] = 0
    cache.read(1, found, planes)
    np.testing.assert_array_equal(found, image(1))
