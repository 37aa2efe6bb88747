"""Unpack images from image columns of Parquet files and Lance data sets, and from tar shards (WebDataset), once.

Training reads images in random order, and a row of Parquet can't be read without its whole row group. So the samples
stage copies every image's bytes to a file, one row group, range of rows or stretch of a shard at a time; later stages
read them like any other folder.
"""

import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from transfgu.datasets import lance_sets
from transfgu.datasets.listing import IMAGE_SUFFIXES
from transfgu.errors import LeftOut, UserError
from transfgu.store import parquet, storage

_FILES = (".parquet", ".tar")
SUFFIXES = (*_FILES, lance_sets.SUFFIX)
COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
"""Names of an image column, in order of preference."""

_REMEDY = "download it again"
STRETCH = 64 * 2**20
"""Number of bytes of a tar shard that are read at a time."""
ROWS = 256
"""Number of rows of a Lance data set per unit."""
_SPLIT = re.compile(r"(train|validation|valid|val|test)(?![A-Za-z])")
_MAGIC = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG", ".png"),
    (b"RIFF", ".webp"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\x00", ".tif"),
    (b"MM\x00*", ".tif"),
)


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One file of several images, or a Lance data set.

    Args:
        uri: URI of the file, or of the data set's folder.
        stem: its path below the data, without its extension.
        split: "train", "val", or "" if its name contains none.
    """

    uri: str
    stem: str
    split: str


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The images unpacked at a time: a row group, a range of rows of a Lance data set, or a stretch of a tar shard.

    Args:
        pack: the file.
        number: number of the unit in the file.
        first: number of its first image in the file.
        count: number of its images.
        members: for a tar shard: name, offset and size in bytes of each image.
        version: for a Lance data set: number of its version.
    """

    pack: Pack
    number: int
    first: int
    count: int
    members: tuple[tuple[str, int, int], ...] = field(default=(), repr=False)
    version: int = 0

    @property
    def name(self) -> str:
        """Name of its record, unique among units."""
        return f"{self.pack.stem}-{self.number:06d}"


def is_pack(uri: str) -> bool:
    """Return True if this is the URI of a file of images, or of a Lance data set, rather than of a folder of images."""
    return uri.lower().endswith(SUFFIXES)


def check(uri: str) -> None:
    """Check a Lance data set before work starts; of Parquet files and tar shards, nothing is read.

    Raises:
        UserError: pylance is not installed, this is no Lance data set, or it has no image column.
    """
    if _is_lance(uri):
        image_column(lance_sets.opened(storage.absolute(uri)).schema, uri)


def _is_lance(uri: str) -> bool:
    return uri.lower().endswith(lance_sets.SUFFIX)


def packs(data: str) -> list[Pack]:
    """List the files of images, and the Lance data sets, that `data` is or contains, by name.

    Files with the name of a split, or in a folder with its name (`train-00000.parquet`, `val/0.tar`), belong to it.
    Those of `test` are the validation split if there is no other, and otherwise left out.

    Args:
        data: URI of a file or a folder.
    """
    root = storage.absolute(data)
    inside = [] if is_pack(root) else storage.list_files(root)
    files = [root] if is_pack(root) else sorted({_pack_of(uri, root) for uri in inside} - {""})
    found = []
    for uri in files:
        relative = uri.rpartition("/")[2] if is_pack(root) else uri[len(root) :].lstrip("/")
        if any(part.startswith(".") for part in relative.split("/")):
            continue
        named = [m[1] for part in reversed(relative.split("/")) if (m := _SPLIT.match(part))]
        found.append((uri, relative.rpartition(".")[0], named[0] if named else ""))
    names = {split for _, _, split in found}
    has_validation = bool(names & {"validation", "valid", "val"})
    of = {"train": "train", "validation": "val", "valid": "val", "val": "val", "": ""}
    of |= {} if has_validation else {"test": "val"}
    return [Pack(uri=uri, stem=stem, split=of[split]) for uri, stem, split in found if split in of]


def _pack_of(uri: str, root: str) -> str:
    """Return the URI of the Lance data set that a file is in, or of the file if it holds images, or nothing."""
    folders = uri[len(root) :].split("/")[:-1]
    for depth, name in enumerate(folders, start=1):
        if name.lower().endswith(lance_sets.SUFFIX):
            return root + "/".join(folders[:depth])
    return uri if uri.lower().endswith(_FILES) else ""


def units(data: str, limit: int = 0, stretch: int = STRETCH) -> list[Unit]:
    """List the units to unpack; only footers and headers of the files are read.

    Args:
        data: URI of a file or a folder.
        limit: sufficient number of images per split; 0: all.
        stretch: maximum number of bytes of a tar shard in one unit, unless a single image is larger.

    Raises:
        UserError: a damaged file, or one without an image column.
    """
    found = packs(data)
    with ThreadPoolExecutor(storage.IN_FLIGHT) as pool:
        each = list(pool.map(partial(_units, stretch=stretch), found))
    kept: list[Unit] = []
    counted: dict[str, int] = {}
    for of_pack in each:
        for unit in of_pack:
            split = unit.pack.split
            if not limit or counted.get(split, 0) < limit:
                counted[split] = counted.get(split, 0) + unit.count
                kept.append(unit)
    return kept


def _units(pack: Pack, stretch: int) -> list[Unit]:
    if _is_lance(pack.uri):
        return _row_ranges(pack)
    return _stretches(pack, stretch) if pack.uri.lower().endswith(".tar") else _row_groups(pack)


def _row_ranges(pack: Pack) -> list[Unit]:
    data = lance_sets.opened(pack.uri)
    image_column(data.schema, pack.uri)
    total, version = data.count_rows(), data.version
    return [
        Unit(pack=pack, number=number, first=first, count=min(ROWS, total - first), version=version)
        for number, first in enumerate(range(0, total, ROWS))
    ]


def _row_groups(pack: Pack) -> list[Unit]:
    with parquet.opened(pack.uri, remedy=_REMEDY) as file:
        image_column(file.schema_arrow, pack.uri)
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return [Unit(pack=pack, number=i, first=sum(counts[:i]), count=count) for i, count in enumerate(counts) if count]


def _stretches(pack: Pack, most: int) -> list[Unit]:
    fs, path = storage.filesystem(pack.uri)
    try:
        with fs.open_input_file(path) as file, tarfile.open(fileobj=file, mode="r:") as shard:
            members = [
                (name, member.offset_data, member.size)
                for member in shard
                if member.isreg() and (name := _safe(member.name)).lower().endswith(IMAGE_SUFFIXES)
            ]
    except (tarfile.TarError, EOFError):
        raise UserError(
            f"{storage.shown(pack.uri)} is not a tar file, or is truncated: download it again", code="file-damaged"
        ) from None
    found: list[Unit] = []
    start = 0
    for end in range(1, len(members) + 1):
        stretch = members[end][1] + members[end][2] - members[start][1] if end < len(members) else most + 1
        if stretch > most:
            taken = tuple(members[start:end])
            found.append(Unit(pack=pack, number=len(found), first=start, count=len(taken), members=taken))
            start = end
    return found


def _safe(name: str) -> str:
    """Return a member's path below the shard's own folder; empty if it would lead out of it, or is hidden."""
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", ".")]
    return "" if any(part.startswith((".", "__MACOSX")) for part in parts) else "/".join(parts)


def image_column(schema: pa.Schema, uri: str) -> str:
    """Return the name of the column with encoded images: bytes, or a struct with `bytes`.

    Raises:
        UserError: there is none, or several without a known name.
    """
    fitting = [name for name, kind in zip(schema.names, schema.types, strict=True) if _holds_bytes(kind)]
    named = [name for name in COLUMNS if name in fitting]
    if named or len(fitting) == 1:
        return named[0] if named else fitting[0]
    raise UserError(
        f"{storage.shown(uri)} has {'several columns' if fitting else 'no column'} of encoded images among "
        f"{', '.join(schema.names)}: name one {COLUMNS[0]}",
        code="image-column-missing",
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def unpack(unit: Unit, folder: str) -> list[LeftOut]:
    """Write the images of a unit to files; returns the rows without an image.

    Args:
        unit: the unit.
        folder: URI of the folder; an image's path below it is split, file and name, or number, within the file.

    Raises:
        UserError: the file has changed, or can't be read.
    """
    left_out = []
    for name, data in _images(unit):
        path = "/".join(filter(None, [unit.pack.split, unit.pack.stem, name]))
        if data is None:
            left_out.append(LeftOut(name=path, reason="missing image"))
        else:
            suffix = "" if name.lower().endswith(IMAGE_SUFFIXES) else _suffix(data)
            storage.write_bytes(storage.join(folder, path + suffix), data)
    return left_out


def _images(unit: Unit) -> Iterator[tuple[str, bytes | None]]:
    """Yield name and bytes of each image; None for a row without one."""
    if unit.members:
        start = unit.members[0][1]
        last = unit.members[-1]
        data = storage.read_range(unit.pack.uri, start, last[1] + last[2] - start) or b""
        for name, offset, size in unit.members:
            yield name, data[offset - start : offset - start + size]
        return
    row = unit.first
    for column in _lance_columns(unit) if _is_lance(unit.pack.uri) else _parquet_columns(unit):
        for value in _bytes_of(column):
            yield f"{row:08d}", value.as_py() or None
            row += 1


def _parquet_columns(unit: Unit) -> Iterator[Any]:
    with parquet.opened(unit.pack.uri, remedy=_REMEDY) as file:
        name = image_column(file.schema_arrow, unit.pack.uri)
        yield file.read_row_group(unit.number, columns=[name])[name].combine_chunks()


def _lance_columns(unit: Unit) -> Iterator[Any]:
    data = lance_sets.opened(unit.pack.uri, unit.version)
    name = image_column(data.schema, unit.pack.uri)
    if parquet.is_extended(data.schema.field(name).type):  # its values might be unpickled
        raise UserError(f"{storage.shown(unit.pack.uri)} is damaged: {_REMEDY}", code="file-damaged")
    yield from lance_sets.batches(data, unit.pack.uri, name, unit.first, unit.count)


def _bytes_of(column: Any) -> Any:
    """Return a column of encoded images as values of bytes, null for a row without an image."""
    if not pa.types.is_struct(column.type):
        return column
    if not column.null_count:
        return column.field("bytes")
    return pa.array([None if row is None else row["bytes"] for row in column.to_pylist()], pa.large_binary())


def _suffix(data: bytes) -> str:
    """Return the suffix for an image's first bytes; decoding shows later whether it is one."""
    return next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), ".jpg")
