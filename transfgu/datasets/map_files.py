"""An image's maps are read by their place in the pseudo labels' part files, one row group at a time.

So a shuffled order costs one request per image, and nothing is searched for.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int16

from transfgu.errors import UserError
from transfgu.store import parquet, storage

_OPEN_FILES = 16  # part files a reading process keeps open; a footer takes some 50 KB


def index_maps(parts: list[str]) -> pa.Table:
    """Where each image's maps lie: `index` (of the sample) int32, `part` (URI) string, `row` (within it) int32."""

    def read(part: str) -> pa.Table:
        with parquet.opened(part) as file:
            index = file.read(columns=["index"]).column("index").cast(pa.int32())
        return pa.table(
            {
                "index": index,
                "part": pa.array([part] * len(index), pa.string()),
                "row": pa.array(np.arange(len(index), dtype=np.int32)),
            }
        )

    # A part's footer and one small column: requests, not bytes, are what takes time.
    with ThreadPoolExecutor(16) as pool:
        return pa.concat_tables(pool.map(read, parts))


def maps_shape(rows: pa.Table) -> tuple[int, int, int]:
    """Return planes, h and w of the images' packed maps, as the first of the rows has them."""
    planes, h, w = read_maps(rows.slice(0, 1)).shape[1:]
    return planes, h, w


def read_maps(rows: pa.Table) -> Int16[np.ndarray, "n planes h w"]:
    """Packed maps of the images whose places `part` and `row` say; each row group is read once."""
    wanted: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for i, (part, row) in enumerate(zip(rows["part"].to_pylist(), rows["row"].to_pylist(), strict=True)):
        group, offset = _place(part, row)
        wanted.setdefault((part, group), []).append((i, offset))
    found: dict[int, np.ndarray] = {}
    for (part, group), places in sorted(wanted.items()):
        table = _cached(part).read_row_group(group, columns=["maps", "h", "w"])
        for i, offset in places:
            h, w = table["h"][offset].as_py(), table["w"][offset].as_py()
            found[i] = np.frombuffer(table["maps"][offset].as_buffer(), np.int16).reshape(-1, h, w)
    return np.stack([found[i] for i in range(len(rows))])


def _place(part: str, row: int) -> tuple[int, int]:
    """The row group that holds a row, and the row's place in it."""
    metadata = _cached(part).metadata
    for group in range(metadata.num_row_groups):
        if row < (rows := metadata.row_group(group).num_rows):
            return group, row
        row -= rows
    raise UserError(
        f"{storage.shown(part)} is shorter than it was: delete the pseudo labels' folder to make them anew",
        code="artifact-damaged",
    )


@functools.lru_cache(maxsize=_OPEN_FILES)
def _cached(part: str) -> pq.ParquetFile:
    return parquet.opened(part)
