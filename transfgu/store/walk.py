"""List a local folder: each folder in it once, with links resolved.

A link to a parent folder would list its files again at every depth. Real folders come first, so that a file gets its
plain path if there is one.
"""

import os
import stat
from dataclasses import dataclass, field


@dataclass
class Walked:
    """Content of a folder."""

    files: dict[str, os.stat_result] = field(default_factory=dict)
    """Regular files, and links to files, by path."""
    dangling: list[str] = field(default_factory=list)
    """Paths of broken links, as left by git-annex and DVC for files that were not fetched."""
    unnamed: list[str] = field(default_factory=list)
    """Paths that are not UTF-8, with a question mark for each unreadable byte."""


def walk(root: str, *, recursive: bool = True) -> Walked:
    """List the content of a folder; empty if there is no such folder.

    Args:
        root: absolute path.
        recursive: also list subfolders.

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
                except OSError:  # deleted meanwhile, or a broken or circular link
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
