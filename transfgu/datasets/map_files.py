"""Read an image's maps from the part files of the pseudo labels, by one range of bytes.

A small index next to the parts holds the places, so a shuffled order needs one request per image and no footers.
"""

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int16

from transfgu.errors import UserError
from transfgu.store import parquet, storage

INDEX = "index.table"
"""File name of the index; not `.parquet`, which is for parts."""
PLACE = ("part", "row", "offset", "bytes", "h", "w")
"""Columns of a table of images that hold the places of their maps."""

_OPEN_FILES = 16  # open part files per reading process; a footer takes about 50 KB
_WHOLE = 4  # from this number of images, the part is read as a whole
_SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("part", pa.string()),
        ("row", pa.int32()),
        ("offset", pa.int64()),
        ("bytes", pa.int32()),
        ("h", pa.int16()),
        ("w", pa.int16()),
    ]
)


def places(data: bytes) -> dict[str, list[int]]:
    """Find the maps in a part file's bytes.

    Returns:
        For each row `index`, `h`, `w`, and `offset` and `bytes` of its maps; `offset` is -1 if maps are compressed or
            share a row group.

    Raises:
        UserError: the bytes are not a Parquet file with plain columns.
    """
    file = parquet.parsed(data, "a part of the pseudo labels")
    table = file.read(columns=["index", "h", "w", "maps"])
    found = {name: table[name].to_pylist() for name in ("index", "h", "w")}
    groups = file.metadata.num_row_groups
    column = file.schema_arrow.get_field_index("maps")
    offsets, lengths = [], []
    for row, value in enumerate(table["maps"]):
        maps = value.as_buffer()
        offset = -1
        if groups == len(table):
            chunk = file.metadata.row_group(row).column(column)
            # The last page of a row group of one row ends with the value's length, four bytes, and the value.
            start = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
            offset = start + chunk.total_compressed_size - maps.size
        if offset < 4 or data[offset - 4 : offset + maps.size] != maps.size.to_bytes(4, "little") + bytes(maps):
            offset = -1
        offsets.append(offset)
        lengths.append(maps.size)
    return {**found, "offset": offsets, "bytes": lengths}


def write_index(folder: str, parts: Mapping[str, tuple[int, Mapping[str, Sequence[int]]]]) -> None:
    """Write the index of the parts in `folder`.

    Args:
        folder: URI.
        parts: file name to its size in bytes and its :func:`places`.
    """
    tables = [_table(name, found) for name, (_, found) in parts.items()]
    sizes = {name: str(size) for name, (size, _) in parts.items()}
    table = pa.concat_tables([_SCHEMA.empty_table(), *tables])
    parquet.write_table(storage.join(folder, INDEX), table.replace_schema_metadata(sizes))


def _table(part: str, found: Mapping[str, Sequence[int]]) -> pa.Table:
    count = len(found["index"])
    columns: dict[str, Any] = {**found, "part": [part] * count, "row": range(count)}
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in _SCHEMA}, _SCHEMA)


def index_maps(parts: list[str], sizes: Sequence[int] | None = None) -> pa.Table:
    """Return the places of the images' maps, from the index next to the parts; parts missing there are opened.

    Args:
        parts: URIs of part files in one folder.
        sizes: sizes of the files in bytes, if known: a part with another size than in the index is opened.

    Returns:
        `index` (of the sample) int32, `part` (URI) string, `row` (within it) int32, `offset` and `bytes` of the maps
            (-1 if they are not one range of bytes), their `h` and `w` (0 if unknown).
    """
    folder = parts[0].rpartition("/")[0] if parts else ""
    known = _indexed(folder)
    wanted = {part.rpartition("/")[2]: size for part, size in zip(parts, sizes or [-1] * len(parts), strict=True)}
    fresh = {n for n, size in wanted.items() if n in known and (size < 0 or size == known[n][0])}

    def table(part: str) -> pa.Table:
        name = part.rpartition("/")[2]
        found = known[name][1] if name in fresh else _opened(part)
        return found.set_column(1, "part", pa.array([part] * len(found), pa.string()))

    with ThreadPoolExecutor(16) as pool:
        return pa.concat_tables([_SCHEMA.empty_table(), *pool.map(table, parts)])


def _indexed(folder: str) -> dict[str, tuple[int, pa.Table]]:
    """Return the size and the table of each part in the index of `folder`."""
    data = storage.read_bytes_or_none(storage.join(folder, INDEX)) if folder else None
    if data is None:
        return {}
    table = parquet.parsed(data, storage.shown(storage.join(folder, INDEX))).read()
    names = table["part"].to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.append(True, names[1:] != names[:-1])) if len(names) else np.empty(0, int)
    sizes = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    table = table.replace_schema_metadata(None).cast(_SCHEMA)
    ends = [*starts[1:], len(names)]
    return {names[a]: (int(sizes[names[a]]), table.slice(a, b - a)) for a, b in zip(starts, ends, strict=True)}


def _opened(part: str) -> pa.Table:
    """Return a part's rows from its footer, or from its column `index` if the footer does not list them."""
    with parquet.opened(part) as file:
        metadata = file.metadata
        column = file.schema_arrow.get_field_index("index")
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        statistics = [group.column(column).statistics for group in groups]
        if all(g.num_rows == 1 and s is not None and s.has_min_max for g, s in zip(groups, statistics, strict=True)):
            index = [s.min for s in statistics]
        else:
            index = file.read(columns=["index"])["index"].to_pylist()
    unknown, none = [-1] * len(index), [0] * len(index)
    return _table(part, {"index": index, "offset": unknown, "bytes": unknown, "h": none, "w": none})


def maps_shape(rows: pa.Table) -> tuple[int, int, int]:
    """Return planes, h and w of the images' packed maps, taken from the first row."""
    planes, h, w = read_maps(rows.slice(0, 1)).shape[1:]
    return planes, h, w


def read_maps(rows: pa.Table) -> Int16[np.ndarray, "n planes h w"]:
    """Read the packed maps of images at the places in the columns `PLACE`; only `part` and `row` are required.

    Raises:
        UserError: a part is missing, or differs from the indexed one.
    """
    columns = {name: rows[name].to_pylist() for name in PLACE if name in rows.column_names}
    found: dict[int, np.ndarray] = {}
    by_part: dict[str, list[int]] = {}
    for i, part in enumerate(columns["part"]):
        if columns.get("offset", [-1] * len(rows))[i] < 0:
            found[i] = _read_row(part, columns["row"][i])
        else:
            by_part.setdefault(part, []).append(i)

    def read(part: str) -> dict[int, np.ndarray]:
        places = [(i, *(columns[name][i] for name in PLACE[2:])) for i in by_part[part]]
        whole = None if len(places) < _WHOLE else storage.read_bytes(part)
        return {i: _read_range(part, *place, whole=whole) for i, *place in places}

    if len(by_part) == 1:
        found |= read(next(iter(by_part)))
    elif by_part:
        with ThreadPoolExecutor(min(len(by_part), storage.IN_FLIGHT)) as pool:
            for some in pool.map(read, by_part):
                found |= some
    return np.stack([found[i] for i in range(len(rows))])


def _read_range(part: str, offset: int, length: int, h: int, w: int, *, whole: bytes | None) -> Any:
    # Includes the four bytes before it, which hold its length.
    data = storage.read_range(part, offset - 4, length + 4) if whole is None else whole[offset - 4 : offset + length]
    if data is None or len(data) != length + 4 or int.from_bytes(data[:4], "little") != length:
        raise _changed(part)
    return np.frombuffer(data, np.int16, offset=4).reshape(-1, h, w)


def _read_row(part: str, row: int) -> Any:
    group, offset = _place(part, row)
    table = _cached(part).read_row_group(group, columns=["maps", "h", "w"])
    h, w = table["h"][offset].as_py(), table["w"][offset].as_py()
    return np.frombuffer(table["maps"][offset].as_buffer(), np.int16).reshape(-1, h, w)


def _place(part: str, row: int) -> tuple[int, int]:
    """Return the row group that holds a row, and the row's place in it."""
    metadata = _cached(part).metadata
    for group in range(metadata.num_row_groups):
        if row < (rows := metadata.row_group(group).num_rows):
            return group, row
        row -= rows
    raise _changed(part)


def _changed(part: str) -> UserError:
    return UserError(
        f"{storage.shown(part)} is not the file that was written: delete the folder of pseudo labels and run again",
        code="artifact-damaged",
    )


@functools.lru_cache(maxsize=_OPEN_FILES)
def _cached(part: str) -> pq.ParquetFile:
    return parquet.opened(part)
