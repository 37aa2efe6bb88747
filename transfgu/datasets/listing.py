"""Combine images and labels of a data set to a list of names and URIs, without opening any file.

Each layout provides images by name, labels by name, and the names of each split. Images without a label are kept for
training, which needs none, and left out of the score.
"""

import bisect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from transfgu.datasets import images
from transfgu.datasets.names import composed, stem, stems
from transfgu.errors import LeftOut, UserError
from transfgu.recipe import Recipe
from transfgu.store import storage

SPLITS = ("train", "validation")

SCHEMA = pa.schema(
    [
        pa.field("index", pa.int32(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("image", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("curated", pa.bool_(), nullable=False),
    ]
)

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2"),
)


_KINDS = 8  # number of suffixes counted separately


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The samples of one split.

    Args:
        table: rows of `SCHEMA`, sorted by name; `index` is the row's position.
        left_out: unusable samples of the split, because a file is missing.
        notes: counts for the report, such as images without an annotation.
    """

    table: pa.Table
    left_out: tuple[LeftOut, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One benchmark's folder layout.

    Args:
        expected: the layout as text, for a message.
        needed: folders and files below the data set's folder that this layout requires.
        listing: lists a split ("train" or "validation") of a recipe's data.
    """

    expected: str
    needed: tuple[str, ...]
    listing: Callable[[Recipe, str], Listing]

    def missing(self, data: str) -> list[str]:
        """Return the entries of `needed` that are missing below `data`."""
        with ThreadPoolExecutor(len(self.needed) or 1) as pool:
            there = pool.map(lambda n: storage.exists(storage.join(data, n)), self.needed)
            return [n for n, found in zip(self.needed, there, strict=True) if not found]


@dataclass(frozen=True, kw_only=True)
class Images:
    """The images below a folder."""

    files: Mapping[str, str]
    """URI by path relative to the folder, sorted."""
    versions: Mapping[str, storage.Version]
    """Size and modification time by the same paths; broken links have none."""
    passed: Mapping[str, int]
    """Numbers of other files, by suffix or reason, largest first."""

    def notes(self, what: str = "") -> dict[str, int]:
        """Return the numbers of unread files as notes of a listing: "files not read (.mp4)"; `what` comes before."""
        return {f"{what}files not read ({kind})": count for kind, count in self.passed.items()}

    @property
    def passed_text(self) -> str:
        """Return the unread files as text, such as `3 .mp4, 1 hidden`; empty if there are none."""
        return ", ".join(f"{count} {kind}" for kind, count in self.passed.items())


def images_in(folder: str, *, recursive: bool = False) -> dict[str, str]:
    """Return the image files below `folder`: URI by path relative to it; see :func:`find_images`."""
    return dict(find_images(folder, recursive=recursive).files)


def find_images(folder: str, *, recursive: bool = False, tags: bool = False) -> Images:
    """Find the image files below `folder`: by suffix, and files without a suffix by their first bytes.

    Hidden files and folders are skipped. A broken link with the name of an image counts as an image, so that it is
    reported as missing.

    Args:
        folder: URI.
        recursive: include subfolders.
        tags: include entity tags in the versions (`storage.list_folder`).

    Raises:
        UserError: the storage can't be read.
    """
    folder = storage.absolute(folder)
    listed = storage.list_folder(folder, recursive, tags=tags)
    files: dict[str, str] = {}
    unnamed: list[str] = []
    passed: Counter[str] = Counter({"unusable name": len(listed.unnamed)} if listed.unnamed else {})
    for uri in [*listed.files, *listed.dangling]:
        relative = uri[len(folder) :].lstrip("/")
        file = relative.rpartition("/")[2]
        if any(part.startswith((".", "__MACOSX")) for part in relative.split("/")):
            passed["hidden"] += 1
        elif file.lower().endswith(IMAGE_SUFFIXES):
            files[relative] = uri
        elif "." not in file and uri in listed.files:
            unnamed.append(relative)
        else:
            passed["." + file.lower().rpartition(".")[2] if "." in file else "link to nothing"] += 1
    with ThreadPoolExecutor(storage.IN_FLIGHT) as pool:
        heads = pool.map(lambda name: storage.read_range(storage.join(folder, name), 0, images.HEAD), unnamed)
        for relative, head in zip(unnamed, heads, strict=True):
            if images.is_image(head or b""):
                files[relative] = storage.join(folder, relative)
            else:
                passed["without a suffix"] += 1
    most = passed.most_common()
    kinds = dict(most[:_KINDS])
    if rest := sum(count for _, count in most[_KINDS:]):
        kinds["of other kinds"] = rest
    return Images(
        files=dict(sorted(files.items())),
        versions={name: listed.files[uri] for name, uri in files.items() if uri in listed.files},
        passed=kinds,
    )


def two_folders(
    images: str, labels: str, suffixes: tuple[str, str] = ("", ""), *, recursive: bool = False
) -> tuple[dict[str, str], dict[str, str], dict[str, int]]:
    """List a benchmark's folders of images and labels, which wait for the storage at the same time.

    Args:
        images: URI of the folder.
        labels: URI of the folder.
        suffixes: ends of the names of images and of labels that are no part of a sample's name.
        recursive: also list sub-folders.

    Returns:
        The images and the labels, URI by sample, and the numbers of files that are not read, as notes of a listing.

    Raises:
        UserError: the storage can't be read, or two files of a folder are one sample.
    """
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda folder: find_images(folder, recursive=recursive), (images, labels)))
    one, other = (stems(listed.files, suffix) for listed, suffix in zip(found, suffixes, strict=True))
    others = {"images of other names": len(found[0].files) - len(one)}
    return one, other, {**{n: c for n, c in others.items() if c}, **found[0].notes(), **found[1].notes("labels' ")}


def pair(
    recipe: Recipe,
    split: str,
    names: Iterable[str],
    images: Mapping[str, str],
    labels: Mapping[str, str] | None,
    *,
    curated: Callable[[str], bool] | None = None,
    notes: Mapping[str, int] | None = None,
) -> Listing:
    """Return the listing of a split from the content of its folders.

    `recipe.limit` keeps the first usable samples by name; left-out samples after them are not counted. With
    `recipe.dataset.curated` the validation split has only the curated samples, and a limit takes curated ones first.

    Args:
        recipe: recipe with the data.
        split: "train" or "validation".
        names: samples that belong to the split.
        images: URIs by name.
        labels: URIs by name; None if the data set has no labels.
        curated: returns True for names in the curated subset; None: the layout has no such subset.
        notes: for the listing.
    """
    is_curated = curated or (lambda _: True)
    ordered = sorted(set(names))
    if recipe.dataset.curated and split == "validation":
        ordered = [n for n in ordered if is_curated(n)]
    left_out, kept = [], []
    for name in ordered:
        if name not in images:
            left_out.append(LeftOut(name=name, reason="missing image"))
        elif split == "validation" and labels is not None and name not in labels:
            left_out.append(LeftOut(name=name, reason="missing label"))
        else:
            kept.append(name)
    if recipe.limit and len(kept) > recipe.limit:
        if recipe.dataset.curated:
            kept.sort(key=lambda n: not is_curated(n))
        kept = sorted(kept[: recipe.limit])
        beyond = bisect.bisect_right([x.name for x in left_out], kept[-1])
        left_out = left_out[:beyond]
    return Listing(
        table=table(kept, images, labels or {}, is_curated), left_out=tuple(left_out), notes=dict(notes or {})
    )


def table(
    names: list[str], images: Mapping[str, str], labels: Mapping[str, str], curated: Callable[[str], bool]
) -> pa.Table:
    """Return a table of `SCHEMA` with samples in the order of `names`."""
    return pa.table(
        [
            pa.array(range(len(names)), pa.int32()),
            pa.array(names, pa.string()),
            pa.array([images[n] for n in names], pa.string()),
            pa.array([labels.get(n) for n in names], pa.string()),
            pa.array([curated(n) for n in names], pa.bool_()),
        ],
        schema=SCHEMA,
    )


def read_names(uri: str, known: Mapping[str, str]) -> list[str]:
    """Read the samples of a list file: one per line, in any of the usual forms.

    A line is a sample's name, or a path to its image, with or without its suffix, and may have further columns. The
    whole line is tried first, because names may contain spaces, then its first column.

    Args:
        uri: URI of the list, in UTF-8 or UTF-16, with or without a byte order mark.
        known: images by name.

    Returns:
        The names; for a line without an image, its first column without folders and suffix.

    Raises:
        UserError: the file is missing, is not text, or names nothing.
    """
    data = storage.read_bytes(uri)
    try:
        text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
        if "\0" in text:
            raise ValueError
    except ValueError:
        raise UserError(
            f"{storage.shown(uri)} is not a text file of names: download it again, or save it as UTF-8",
            code="list-damaged",
        ) from None
    names = [name for line in text.splitlines() if (name := _named(composed(line.strip()), known))]
    if not names:
        raise UserError(f"{storage.shown(uri)} names no image: download it again", code="list-damaged")
    return names


def _named(line: str, known: Mapping[str, str]) -> str:
    """Return the sample that a line of a list names; empty if there is none."""
    first = re.split(r"[\t,;]|\s+", line)[0]
    for text in dict.fromkeys((line, first)):
        file = text.replace("\\", "/").rpartition("/")[2]
        plain = stem(file) if file.lower().endswith(IMAGE_SUFFIXES) else file
        for name in (text, file, plain):
            if name in known:
                return name
    return plain
