"""Store arrays in a file on this machine's disk and map them into memory.

The system keeps as much of the file in memory as there is room for, so an array is as fast as one in memory if it fits,
and slower, but possible, if it does not. The file has no name, so it disappears when the process ends for any reason.
"""

import bisect
import contextlib
import errno
import math
import mmap
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

SPARE = 1 << 30
"""Bytes of the disk that stay free."""


class Scratch:
    """A file for arrays on disk; safe to use from several threads."""

    def __init__(self, folder: str, size: int = 0) -> None:
        """Open the file in `folder`, which is created if necessary.

        Raises:
            OSError: the folder can't be written, or its disk has no space for `size` bytes.
        """
        root = Path(folder).expanduser()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder, self.spare = root, SPARE
        self._check(size)
        self._file = tempfile.TemporaryFile(dir=root, buffering=0)  # noqa: SIM115 - open as long as its arrays
        self._end = 0
        self._lock = threading.Lock()
        self._starts: list[int] = []  # addresses of the arrays, ascending
        self._maps: list[Any] = []

    def _check(self, size: int) -> None:
        if shutil.disk_usage(self._folder).free < size + self.spare:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))

    def empty(self, shape: tuple[int, int]) -> Float32[ndarray, "n d"]:
        """Return a new array of zeros in the file.

        Raises:
            OSError: the disk is full.
        """
        return self._mapped(shape, b"")

    def keep(self, array: Float32[ndarray, "n d"]) -> Float32[ndarray, "n d"]:
        """Return a copy of an array in the file.

        Raises:
            OSError: the disk is full.
        """
        return self._mapped(
            (array.shape[0], array.shape[1]), np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        )

    def _mapped(self, shape: tuple[int, int], content: Any) -> Float32[ndarray, "n d"]:
        size = 4 * shape[0] * shape[1]
        if not size:
            return np.zeros(shape, np.float32)
        with self._lock:
            self._check(size)  # otherwise touching a page that can't be written would end the process
            offset = self._end
            self._end += -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            os.posix_fallocate(self._file.fileno(), offset, self._end - offset)
            done = 0
            while done < len(content):
                done += os.pwrite(self._file.fileno(), content[done:], offset + done)
            mapped = mmap.mmap(self._file.fileno(), size, offset=offset)
            array: ndarray = np.frombuffer(mapped, np.float32).reshape(shape)
            place = bisect.bisect(self._starts, _address(array))
            self._starts.insert(place, _address(array))
            self._maps.insert(place, mapped)
        return array

    def release(self, array: Float32[ndarray, "n d"]) -> None:
        """Release the memory of an array, or of a slice of its rows; it is mapped again on the next access.

        The content stays in the file, and in the system's memory as long as there is room.
        """
        if not array.size:
            return
        with self._lock:
            place = bisect.bisect(self._starts, _address(array)) - 1
            start, mapped = self._starts[place], self._maps[place]
        first = _address(array) - start
        first, end = (-(-byte // mmap.PAGESIZE) * mmap.PAGESIZE for byte in (first, first + array.nbytes))
        if end > first:
            mapped.madvise(mmap.MADV_DONTNEED, first, min(end, len(mapped)) - first)


def _address(array: ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def available_memory() -> float:
    """Return the bytes of memory still available to this process; infinite if the system does not report it."""
    found = [math.inf]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024.0 * int(next(s for s in lines if s.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # a container's limit; memory of cached files counts as free
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        found.append(limit - used + float(stat["file"]))
    return min(found)
