"""Combine images and labels of a data set to a list of names and URIs, without opening any file.

Each layout provides images by name, labels by name, and the names of each split. Images without a label are kept for
training, which needs none, and left out of the score.
"""

import bisect
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

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

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The samples of one split.

    Args:
        table: rows of `SCHEMA`, sorted by name; `index` is the row's position.
        left_out: what belongs to the split and can't be used, for a file that is not there.
        notes: counts for the report, such as images that no annotation names.
    """

    table: pa.Table
    left_out: tuple[LeftOut, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One benchmark's folder layout.

    Args:
        expected: the layout in words, for a message.
        needed: folders and files below the data set's, without which it is not this layout.
        listing: lists a split ("train" or "validation") of a recipe's data.
    """

    expected: str
    needed: tuple[str, ...]
    listing: Callable[[Recipe, str], Listing]

    def missing(self, data: str) -> list[str]:
        """Those of `needed` that are not below `data`."""
        with ThreadPoolExecutor(len(self.needed) or 1) as pool:
            there = pool.map(lambda n: storage.exists(storage.join(data, n)), self.needed)
            return [n for n, found in zip(self.needed, there, strict=True) if not found]


def images_in(folder: str, *, recursive: bool = False) -> dict[str, str]:
    """Image files below `folder`: URI by path relative to it. Hidden files and folders are skipped."""
    folder = storage.absolute(folder)
    found = {}
    for uri in storage.list_files(folder, recursive):
        relative = uri[len(folder) :].lstrip("/")
        hidden = any(part.startswith((".", "__MACOSX")) for part in relative.split("/"))
        if not hidden and relative.lower().endswith(IMAGE_SUFFIXES):
            found[relative] = uri
    return found


def stems(files: Mapping[str, str], suffix: str = "") -> dict[str, str]:
    """`files` by file name alone, without its extension and `suffix`; files that do not end in `suffix` are dropped."""
    named = ((stem(relative).rpartition("/")[2], uri) for relative, uri in files.items())
    return {name.removesuffix(suffix): uri for name, uri in named if name.endswith(suffix)}


def stem(relative: str) -> str:
    """A path without its extension."""
    return relative.rpartition(".")[0]


def in_parallel(*tasks: Callable[[], dict[str, str]]) -> list[dict[str, str]]:
    """The results of independent listings, which wait for the storage at the same time."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        return [f.result() for f in [pool.submit(t) for t in tasks]]


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
    """The listing of a split from what its folders hold.

    `recipe.limit` keeps the first usable samples by name; what is left out beyond them is not counted. With
    `recipe.dataset.curated` the validation split is the curated samples alone, and a limit takes curated ones first.

    Args:
        recipe: whose data it is.
        split: "train" or "validation".
        names: samples that belong to the split.
        images: URIs by name.
        labels: URIs by name; None where the data set has no labels at all.
        curated: whether a name is in the curated subset; None: the layout has none, all are.
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
    """A table of `SCHEMA` of samples in the order of `names`."""
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


def read_names(uri: str) -> list[str]:
    """The lines of a list file, without blanks.

    Raises:
        UserError: it is not there, is no text, or names nothing.
    """
    try:
        names = storage.read_bytes(uri).decode().split()
    except UnicodeDecodeError:
        raise UserError(
            f"{storage.shown(uri)} is not a text file of names: fetch it again", code="list-damaged"
        ) from None
    if not names:
        raise UserError(f"{storage.shown(uri)} names no image: fetch it again", code="list-damaged")
    return names
