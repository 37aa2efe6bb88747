"""List a local folder: each folder within it once, whatever links lead there.

A link to a folder above it would list its files again at every depth. Real folders come first, so that a file has its
plain path where there is one.
"""

import os
import stat
from dataclasses import dataclass, field


@dataclass
class Walked:
    """What lies below a folder."""

    files: dict[str, os.stat_result] = field(default_factory=dict)
    """Regular files, and links to such, by path."""
    dangling: list[str] = field(default_factory=list)
    """Paths of links that lead nowhere, as git-annex and DVC leave them where they have not fetched a file."""
    unnamed: list[str] = field(default_factory=list)
    """Paths that are not UTF-8, with a question mark for each byte that can't be read."""


def walk(root: str, *, recursive: bool = True) -> Walked:
    """List what lies below a folder; nothing where there is no such folder.

    Args:
        root: absolute path.
        recursive: also list the folders within it.

    Raises:
        OSError: a folder can't be read.
    """
    found = Walked()
    seen: set[tuple[int, int]] = set()
    folders, links = [root], list[str]()
    while folders or links:
        if not folders:
            links.sort(reverse=True)
            folders.append(links.pop())
        folder = folders.pop()
        try:
            about = os.stat(folder)  # noqa: PTH116 - as os.scandir, for paths of any bytes
            entries = os.scandir(folder)
        except (FileNotFoundError, NotADirectoryError):
            continue
        with entries:
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            for entry in entries:
                if not _is_text(entry.name):
                    found.unnamed.append(os.fsencode(entry.path).decode(errors="replace").replace("\ufffd", "?"))
                    continue
                try:
                    about = entry.stat()
                except OSError:  # gone meanwhile, or a link to nowhere or to itself
                    if entry.is_symlink():
                        found.dangling.append(entry.path)
                    continue
                if stat.S_ISREG(about.st_mode):
                    found.files[entry.path] = about
                elif stat.S_ISDIR(about.st_mode) and recursive:
                    (links if entry.is_symlink() else folders).append(entry.path)
    return found


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a byte that Python kept as a surrogate
        return False
    return True
