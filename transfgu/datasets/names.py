"""Assign labels and outputs to images by name; names are compared in Unicode's composed form.

A file system may store an accent as one code point (NFC) or as two (NFD), and may treat `A.jpg` and `a.jpg` as one
name. So labels are found by the composed form, and outputs differ even if case is ignored.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from transfgu.errors import UserError
from transfgu.store import storage

LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".gif", ".bmp", ".pgm", ".ppm")
"""Suffixes of lossless formats for labels."""


def stem(relative: str) -> str:
    """Return a path without its extension."""
    folder, slash, file = relative.rpartition("/")
    return f"{folder}{slash}{file.rpartition('.')[0] or file}"


def composed(name: str) -> str:
    """Return a name in Unicode's composed form, NFC."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """Return a form that is equal for names which some file systems treat as one."""
    return unicodedata.normalize("NFC", composed(name).casefold())


def output_names(images: Sequence[str]) -> list[str]:
    """Name an output file for each image, without an extension; no two share one on any file system.

    The name is the image's path without its extension; if images share that, with the extension; if they still differ
    only in case or in the form of an accent, with eight digits of the path's SHA-256 added.

    Args:
        images: relative paths, all different.

    Returns:
        A name for each image.
    """
    kinds = (stem, str, lambda name: f"{name}.{hashlib.sha256(name.encode()).hexdigest()[:8]}")
    level = [0] * len(images)
    found = [stem(name) for name in images]
    while True:
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(found):
            groups.setdefault(folded(name), []).append(i)
        # `a.png`, the mask of a.jpg, must not have the path of a folder `a.png`.
        folders = {key[: at.start()] for key in groups for at in re.finditer("/", key)}
        clashing: list[int] = []
        for key, group in groups.items():
            if len(group) > 1 or not folders.isdisjoint({f"{key}.png", f"{key}.jpg"}):
                least = min(level[i] for i in group)
                clashing += [i for i in group if level[i] == least < len(kinds) - 1]
        if not clashing:
            return found
        for i in clashing:
            level[i] += 1
            found[i] = kinds[level[i]](images[i])


def labels_of(images: Iterable[str], labels: Mapping[str, str]) -> dict[str, str]:
    """Find each image's label: named after its full path (`a.jpg.png`), or after its path without extension.

    If several files have one name, lossless formats are preferred.

    Args:
        images: relative paths.
        labels: URI by path relative to the labels' folder.

    Returns:
        The label's URI by the image's relative path; images without one are missing.

    Raises:
        UserError: two files could be an image's label, or two images have one label.
    """
    by_stem: dict[str, list[str]] = {}
    for name in labels:
        by_stem.setdefault(composed(stem(name)), []).append(name)
    found: dict[str, str] = {}
    owners: dict[str, str] = {}
    for image in sorted(images):
        key = composed(image)
        candidates = by_stem.get(key) or by_stem.get(stem(key)) or []
        if len(candidates) > 1:
            candidates = [n for n in candidates if n.lower().endswith(LABEL_SUFFIXES)] or candidates
        if len(candidates) > 1:
            one, other = (storage.shown(labels[name]) for name in sorted(candidates)[:2])
            raise UserError(
                f"{one} and {other} could both be the label of {image}: remove one of them", code="names-collide"
            )
        for label in candidates:
            if label in owners:
                raise UserError(
                    f"{storage.shown(labels[label])} could be the label of {owners[label]} and of {image}: name labels "
                    f"by full names, such as {owners[label]}.png",
                    code="names-collide",
                )
            owners[label] = image
            found[image] = labels[label]
    return found


def stems(files: Mapping[str, str], suffix: str = "") -> dict[str, str]:
    """Key files by their names alone, composed, without extension and `suffix`; skip files without `suffix`.

    Raises:
        UserError: two files have one name.
    """
    found: dict[str, str] = {}
    for relative, uri in files.items():
        name = composed(stem(relative).rpartition("/")[2])
        if not name.endswith(suffix):
            continue
        name = name.removesuffix(suffix)
        if name in found:
            raise UserError(
                f"{storage.shown(found[name])} and {storage.shown(uri)} would both be sample {name}: remove one of "
                "them",
                code="names-collide",
            )
        found[name] = uri
    return found
