"""Record the version of the image of each predicted mask, so that masks of other versions do not count as complete.

Each task writes a record next to its masks, after them; the driver joins the records in one file at the end.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from transfgu.store import parquet, storage

RECORD = "images.parquet"
"""File in a folder of masks: rows `name` and `mask` (paths), `size` (bytes), `changed` (ns) and `tag` of the images."""
PARTS = "images"
"""Folder of the same rows, by part, while a prediction is not finished."""
SCHEMA = pa.schema(
    [("name", pa.string()), ("mask", pa.string()), ("size", pa.int64()), ("changed", pa.int64()), ("tag", pa.string())],
)
_REMEDY = "delete it, and run again"


@dataclass(frozen=True, kw_only=True)
class Made:
    """The image of a mask."""

    mask: str
    """The mask's path in its folder, without suffix."""
    image: storage.Version


def read(out: str) -> tuple[dict[str, Made], set[str]]:
    """Read the records in a folder of predicted masks.

    Returns:
        The image of each mask, by the image's name, and the paths of all masks ever recorded: an image whose mask has a
            new name has two.

    Raises:
        UserError: a record is damaged.
    """
    whole = storage.join(out, RECORD)
    parts = storage.list_files(storage.join(out, PARTS), recursive=False)
    files = [whole] * storage.is_file(whole) + [uri for uri in parts if uri.endswith(".parquet")]
    with ThreadPoolExecutor(storage.IN_FLIGHT) as pool:
        tables = list(pool.map(_rows, files))
    rows = [row for table in tables for row in table.to_pylist()]
    made = {
        row["name"]: Made(mask=row["mask"], image=storage.Version(row["size"], row["changed"], row["tag"] or ""))
        for row in rows
    }
    return made, {row["mask"] for row in rows}


def _rows(uri: str) -> pa.Table:
    table = parquet.read(uri, remedy=_REMEDY)
    if "tag" not in table.column_names:  # written before tags were recorded
        table = table.append_column("tag", pa.nulls(len(table), pa.string()))
    with parquet.damage(uri, _REMEDY):
        return table.select(SCHEMA.names)


def write_part(out: str, rows: pa.Table) -> None:
    """Record the masks of a part.

    Args:
        out: URI of the folder of predicted masks.
        rows: columns of :data:`SCHEMA`; further ones are dropped.
    """
    if len(rows):
        digest = hashlib.sha256("\n".join(rows["name"].to_pylist()).encode()).hexdigest()[:16]
        table = rows.select(SCHEMA.names).cast(SCHEMA)
        parquet.write_table(storage.join(out, PARTS, f"part-{digest}.parquet"), table)


def write(out: str, made: Mapping[str, Made]) -> None:
    """Write the record of a folder of predicted masks, replacing those of the parts."""
    rows = [{"name": name, "mask": found.mask, **found.image._asdict()} for name, found in sorted(made.items())]
    parquet.write_table(storage.join(out, RECORD), pa.Table.from_pylist(rows, schema=SCHEMA))
    storage.delete(storage.join(out, PARTS))
