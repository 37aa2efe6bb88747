"""Cache training's images, decoded and resized, and their packed maps, in one file on the node's disk.

All samples of a data set have the same size, so a sample is found by its position: one read copies it from the file, or
from the system's page cache. Workers of a node, and the trials of a search, share the file. The process that first
needs a sample writes it, under a lock that is released when the process dies.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

logger = logging.getLogger(__name__)

_FORMAT = 1
_STRIPES = 256  # number of lock files, shared by samples and parts
_SPARE = 1 << 30  # bytes of the disk that stay free
_IMAGE, _MAPS = 0, 1


FOLDER = "TRANSFGU_CACHE"
"""Environment variable for the folder of a node's caches; each node may set its own."""


def default_folder() -> str:
    """Return this node's folder for caches: `TRANSFGU_CACHE`, or `transfgu-cache-UID` among temporary files."""
    if os.environ.get(FOLDER):
        return os.environ[FOLDER]
    user = os.getuid() if hasattr(os, "getuid") else "all"
    return os.path.join(tempfile.gettempdir(), f"transfgu-cache-{user}")  # noqa: PTH118


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Description of a cache's content."""

    key: str
    """Digest of everything that the samples' bytes depend on."""
    samples: int
    image_bytes: int
    maps_bytes: int

    @property
    def sample_bytes(self) -> int:
        """Bytes of an image and its maps."""
        return self.image_bytes + self.maps_bytes

    @property
    def name(self) -> str:
        """Name of the cache's folder."""
        told = json.dumps([_FORMAT, self.key, self.samples, self.image_bytes, self.maps_bytes])
        return hashlib.sha256(told.encode()).hexdigest()[:24]


class SampleCache:
    """A cache in use; it can't be removed until it is closed or its process ends."""

    def __init__(self, folder: str, layout: Layout, limit: int, *, boot: str | None = None) -> None:
        """Open the cache, or create an empty one after removing the least recently used ones that are not in use.

        Args:
            folder: folder of all caches of the node.
            layout: content of this one.
            limit: maximum size of all caches in `folder`, bytes. If the rest of it, or of the disk, is too small for
                all samples, only the first ones are stored.
            boot: identifies the time since the machine started; None: from the system.

        Raises:
            OSError: the folder can't be written.
        """
        root = Path(folder).expanduser()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)  # the images may be private
        self.layout, self._folder = layout, root / layout.name
        self._boot = boot_id() if boot is None else boot
        self._stripes: list[Path] = [self._folder / "locks" / f"{i:03d}" for i in range(_STRIPES)]
        with _locked(root / "lock"):
            self._use = _take(self._folder)
            try:
                self.kept = self._ready(root, limit)
            except BaseException:
                os.close(self._use)
                raise
            self._file = os.open(self._folder / "samples.bin", os.O_RDWR)
        self._flags = np.memmap(self._folder / "flags", np.uint8, "r+", shape=(2, layout.samples))
        self._full = False

    def _ready(self, root: Path, limit: int) -> int:
        """Create the cache's files unless they exist; returns the maximum number of samples in them."""
        layout, about = self.layout, _about(self._folder)
        if about and (about["boot"] == self._boot or (self._folder / "whole").exists()):
            os.utime(self._folder / "use")
            return int(about["kept"])
        # If a cache was incomplete when the machine stopped, it is unknown which data reached the disk.
        for file in ("samples.bin", "flags", "whole"):
            (self._folder / file).unlink(missing_ok=True)
        room = _make_room(root, self._folder, layout.samples * layout.sample_bytes, limit)
        kept = max(0, min(layout.samples, room // layout.sample_bytes))
        (self._folder / "locks").mkdir(exist_ok=True)
        for name, size in (("samples.bin", kept * layout.sample_bytes), ("flags", 2 * layout.samples)):
            with (self._folder / name).open("wb") as empty:
                empty.truncate(size)
        told = {"format": _FORMAT, "kept": kept, "bytes": kept * layout.sample_bytes, "boot": self._boot}
        partial = self._folder / "about.partial"
        partial.write_text(json.dumps(told))
        partial.replace(self._folder / "about.json")
        os.utime(self._folder / "use")
        return kept

    def has(self, positions: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Return True for samples that are stored, image and maps."""
        images, maps = (self._flags[which, positions] != 0 for which in (_IMAGE, _MAPS))
        return np.asarray(images & maps)

    def read(self, position: int, image: Any, maps: Any) -> None:
        """Copy a stored sample into two contiguous writable arrays of its image and its maps.

        Raises:
            OSError: the file can't be read.
        """
        buffers = [_bytes(image), _bytes(maps)]
        buffers = [buffer for buffer in buffers if len(buffer)]
        size = sum(map(len, buffers))
        if os.preadv(self._file, buffers, position * self.layout.sample_bytes) != size:
            raise OSError(errno.EIO, f"{self._folder / 'samples.bin'} is shorter than before")

    def image(self, position: int, out: Any, make: Callable[[], Any]) -> None:
        """Copy a sample's image into the array `out`; if it is not stored yet, `make` returns it."""
        view = _bytes(out)
        if position >= self.kept:
            view[:] = _bytes(make())
            return
        with self.lock(position):
            if self._flags[_IMAGE, position]:
                os.preadv(self._file, [view], position * self.layout.sample_bytes)
                return
            view[:] = _bytes(make())
            self._write(_IMAGE, position, view)

    def maps(self, position: int, out: Any, part: int, others: Int[np.ndarray, " m"], make: Callable[[], Any]) -> None:
        """Copy a sample's maps into the array `out`; if they are not stored yet, those of its whole part are read.

        Args:
            position: position of the sample.
            out: array for its maps.
            part: number of the part.
            others: positions of the part's samples, including this one.
            make: returns the maps of all of `others`.
        """
        view = _bytes(out)
        if not len(view):
            if position < self.kept:
                self._flags[_MAPS, position] = 1
            return
        offset = position * self.layout.sample_bytes + self.layout.image_bytes
        if position < self.kept and self._flags[_MAPS, position]:
            os.preadv(self._file, [view], offset)
            return
        with self.lock(part + self.layout.samples):
            if position < self.kept and self._flags[_MAPS, position]:
                os.preadv(self._file, [view], offset)
                return
            for other, made in zip(others.tolist(), make(), strict=True):
                if other < self.kept:
                    self._write(_MAPS, other, _bytes(made))
                if other == position:
                    view[:] = _bytes(made)

    def _write(self, which: int, position: int, data: Any) -> None:
        """Store an image or maps; once the disk is full, no more are stored."""
        if self._full:
            return
        offset = position * self.layout.sample_bytes + (self.layout.image_bytes if which == _MAPS else 0)
        try:
            if os.pwrite(self._file, data, offset) == len(data):
                self._flags[which, position] = 1
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._full = True
            logger.warning("%s is full: images that are not in the cache are read again in every epoch", self._folder)

    def seal(self) -> None:
        """Write everything to the disk if every sample is stored, so that the cache survives a restart."""
        os.utime(self._folder / "use")
        whole = self._folder / "whole"
        if self.kept == self.layout.samples and not whole.exists() and self._flags.all():
            os.fsync(self._file)
            self._flags.flush()
            whole.touch()

    def close(self) -> None:
        """Close the cache."""
        os.close(self._file)
        os.close(self._use)

    @contextlib.contextmanager
    def lock(self, number: int) -> Iterator[None]:
        """Hold the lock of a sample or of a part (its number plus the number of all samples), among all processes."""
        # Mix the bits, so that neighbours in a part have different locks.
        with _locked(self._stripes[number * 2654435761 % 2**32 * _STRIPES >> 32]):
            yield


def _bytes(array: Any) -> memoryview:
    """Return the bytes of a contiguous array, which may be empty."""
    return memoryview(array.reshape(-1).view(np.uint8))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, among threads as well as processes: each call opens the file again."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _take(folder: Path) -> int:
    """Mark a cache as in use, for as long as the returned file is open."""
    folder.mkdir(exist_ok=True)
    handle = os.open(folder / "use", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def _about(folder: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((folder / "about.json").read_text())
        return found if found.get("format") == _FORMAT else None
    except (OSError, ValueError):
        return None


def boot_id() -> str:
    """Return an identifier of the time since the machine started; empty if the system does not provide one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _make_room(root: Path, own: Path, needed: int, limit: int) -> int:
    """Remove least recently used caches in `root` until `needed` bytes fit; returns the number of bytes that fit."""
    others = [p for p in root.iterdir() if p.is_dir() and p != own]
    used = {folder: int((_about(folder) or {"bytes": 0})["bytes"]) for folder in others}

    def room() -> int:
        # Bytes that others may still write count as written.
        promised = sum(max(0, size - _on_disk(folder / "samples.bin")) for folder, size in used.items())
        return min(limit - sum(used.values()), shutil.disk_usage(root).free - promised - _SPARE)

    for folder in sorted(used, key=_last_use):
        if room() >= needed:
            break
        if _remove(folder):
            del used[folder]
    return room()


def _on_disk(file: Path) -> int:
    try:
        return file.stat().st_blocks * 512
    except OSError:
        return 0


def _last_use(folder: Path) -> float:
    try:
        return (folder / "use").stat().st_mtime
    except OSError:
        return 0.0


def _remove(folder: Path) -> bool:
    """Remove a cache unless it is in use; returns True if it was removed. The lock of all caches must be held."""
    handle = os.open(folder / "use", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        gone = folder.with_name(f".{uuid.uuid4().hex}")
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        return True
    finally:
        os.close(handle)
