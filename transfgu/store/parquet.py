"""A Parquet file may name a type that is read by unpickling: one of plain types alone runs no code.

Arrow lets a file name extension types for its columns, and asks whoever registered such a name for the values. Ray Data
registers one whose values are unpickled, which is to run whatever the file's author wrote. No file of ours has an
extension type, so one that has counts as damaged, and no value of it is looked at.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from transfgu.errors import UserError
from transfgu.store import storage

_REMEDY = "delete it and its folder's manifest.json, and run again"


def read(uri: str, columns: Sequence[str] | None = None, *, remedy: str = _REMEDY) -> pa.Table:
    """A whole file, fetched in one piece.

    Args:
        uri: of the file.
        columns: the names of those that are wanted; None: all.
        remedy: what the user is told to do about a damaged file.

    Raises:
        UserError: there is no such file, it can't be read, or it is damaged.
    """
    data = storage.read_bytes(uri)
    with _damage(uri, remedy):
        table = _plain(pa.BufferReader(data)).read(columns)
        return table if columns is None else table.select(columns)


def parsed(data: bytes, name: str, *, remedy: str = _REMEDY) -> pq.ParquetFile:
    """A file whose bytes are at hand.

    Args:
        data: the file's bytes.
        name: what an error calls the file.
        remedy: what the user is told to do about a damaged file.

    Raises:
        UserError: the file is damaged.
    """
    with _damage(name, remedy):
        return _plain(pa.BufferReader(data))


def opened(uri: str, *, remedy: str = _REMEDY) -> pq.ParquetFile:
    """A file to take pieces from, of which the footer alone is fetched.

    Args:
        uri: of the file.
        remedy: what the user is told to do about a damaged file.

    Raises:
        UserError: the file is damaged.
    """
    fs, path = storage.filesystem(uri)
    file = fs.open_input_file(path)
    with _damage(uri, remedy):
        return _plain(file)


def _plain(source: Any) -> pq.ParquetFile:
    """The file opened; raises ValueError where it has an extension type, and whatever Arrow finds damaged."""
    file = pq.ParquetFile(source)
    if any(_is_extended(field.type) for field in file.schema_arrow):
        raise ValueError("an extension type")
    return file


def _is_extended(kind: pa.DataType) -> bool:
    """Whether a type, or one within it, is an extension type."""
    if isinstance(kind, pa.BaseExtensionType):
        return True
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):  # which count no fields
        return _is_extended(kind.value_type)
    return any(_is_extended(kind.field(i).type) for i in range(kind.num_fields))


@contextlib.contextmanager
def _damage(uri: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError):
        raise  # the machine's or the store's
    except Exception:  # Arrow's, or whatever an extension type makes of a description that it did not write
        raise UserError(f"{storage.shown(uri)} is damaged: {remedy}", code="file-damaged") from None


def write_table(uri: str, table: pa.Table) -> None:
    """Write a small Parquet file in one piece."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.write_bytes(uri, sink.getvalue().to_pybytes())
