"""Folders for Ray's sockets and logs that only this user can enter, removed once their process has ended.

A folder is locked as long as its process lives, so another process removes those of killed ones: it can lock them.
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from transfgu.errors import UserError

_PREFIX = "transfgu-"
_OWNER = "owner"
_LONGEST = 41  # of 107 bytes that a socket's path may have, Ray's session and socket names take 66


class RayFolders:
    """Folders that this process has made for Ray.

    Attributes:
        paths: those to be removed when the process ends.
    """

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self._locks: list[int] = []

    def make(self, *, keep: bool = False) -> tuple[Path, str | None]:
        """Make a folder in `RAY_TMPDIR` or the system's temporary folder, and remove those of dead processes.

        Args:
            keep: leave the folder there when this process ends; the next process that starts Ray removes it.

        Returns:
            The folder, and a folder for objects that memory has no room for, if that has to be another one.

        Raises:
            UserError: no folder for temporary files can be written, or its path is too long.
        """
        asked = os.path.abspath(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())  # noqa: PTH100 - links are kept
        spill = None
        for base in dict.fromkeys((asked, "/tmp", "/var/tmp")):
            if len(os.fsencode(base)) + len(_PREFIX) + 9 > _LONGEST:
                continue
            with suppress(OSError):
                _remove_stale(Path(base))
                folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))  # of mode 700
                break
        else:
            raise UserError(
                f"Ray needs a folder for temporary files that is writable and whose path has at most "
                f"{_LONGEST - len(_PREFIX) - 9} bytes, not {asked}: set TMPDIR to one",
                code="tmpdir-unusable",
            )
        made = [folder]
        if base != asked:
            with suppress(OSError):
                spill = tempfile.mkdtemp(prefix=_PREFIX, dir=asked)
                made.append(Path(spill))
        for path in made:
            new = path / f".{_OWNER}"  # named only once it is locked
            descriptor = os.open(new, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            new.rename(path / _OWNER)
            self._locks.append(descriptor)
        if not keep:
            self.paths.extend(made)
        return folder, spill

    def remove(self) -> None:
        """Remove `paths` and release the locks."""
        while self.paths:
            shutil.rmtree(self.paths.pop(), ignore_errors=True)
        while self._locks:
            os.close(self._locks.pop())


def _remove_stale(base: Path) -> None:
    """Remove the folders in `base` whose processes were killed."""
    for path in base.glob(f"{_PREFIX}*/{_OWNER}"):
        with suppress(OSError), path.open("rb") as file:
            if path.parent.lstat().st_uid != os.getuid():
                continue
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)
