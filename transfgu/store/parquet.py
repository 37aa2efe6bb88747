"""Read and write Parquet files; files with extension types are refused, because reading them may run code.

Arrow lets a file name extension types for its columns, and calls the library that registered the name. Ray Data
registers a type whose values are unpickled, which runs whatever code the file's author put there. No file of this
package has an extension type, so a file with one counts as damaged and none of its values is read.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from transfgu.errors import UserError
from transfgu.store import storage

_REQUEST = "AWS|HTTP|GCS|[Cc]url|[Tt]ime"  # in errors of a remote store
_REMEDY = "delete it and its folder's manifest.json, and run again"


def read(uri: str, columns: Sequence[str] | None = None, *, remedy: str = _REMEDY) -> pa.Table:
    """Read a whole file in one request.

    Args:
        uri: of the file.
        columns: names of the columns to read; None: all.
        remedy: remedy for a damaged file, for the error message.

    Raises:
        UserError: there is no such file, it can't be read, or it is damaged.
    """
    data = storage.read_bytes(uri)
    with damage(uri, remedy):
        table = _plain(pa.BufferReader(data)).read(columns)
        return table if columns is None else table.select(columns)


def parsed(data: bytes, name: str, *, remedy: str = _REMEDY) -> pq.ParquetFile:
    """Open a file from its bytes.

    Args:
        data: the file's bytes.
        name: name of the file in error messages.
        remedy: remedy for a damaged file, for the error message.

    Raises:
        UserError: the file is damaged.
    """
    with damage(name, remedy):
        return _plain(pa.BufferReader(data))


def opened(uri: str, *, remedy: str = _REMEDY) -> pq.ParquetFile:
    """Open a file to read parts of it; only the footer is fetched.

    Args:
        uri: of the file.
        remedy: remedy for a damaged file, for the error message.

    Raises:
        UserError: the file is damaged.
    """
    file = storage.opened(uri)
    with damage(uri, remedy):
        return _plain(file)


def _plain(source: Any) -> pq.ParquetFile:
    """Open the file; raises ValueError if it has an extension type, and Arrow's errors if it is damaged."""
    file = pq.ParquetFile(source)
    if any(is_extended(field.type) for field in file.schema_arrow):
        raise ValueError("an extension type")
    return file


def is_extended(kind: pa.DataType) -> bool:
    """Return True if a type, or a type within it, is an extension type."""
    if isinstance(kind, pa.BaseExtensionType):
        return True
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):  # types without a count of fields
        return is_extended(kind.value_type)
    return any(is_extended(kind.field(i).type) for i in range(kind.num_fields))


@contextlib.contextmanager
def damage(uri: str, remedy: str = _REMEDY) -> Iterator[None]:
    """Turn whatever Arrow stumbles over in a file's bytes into one line; errors of the machine or the store pass.

    Args:
        uri: of the file.
        remedy: remedy for a damaged file, for the error message.

    Raises:
        UserError: the body found the file damaged.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, MemoryError) as error:
        # Of a header that it can't read Arrow says so by an OSError, too: without a number, and of no request.
        if isinstance(error, MemoryError) or error.errno is not None or re.search(_REQUEST, str(error)):
            raise
        raise UserError(f"{storage.shown(uri)} is damaged: {remedy}", code="file-damaged") from None
    except Exception:  # of Arrow, or of an extension type that can't parse its description
        raise UserError(f"{storage.shown(uri)} is damaged: {remedy}", code="file-damaged") from None


def encoded(table: pa.Table, **options: Any) -> bytes:
    """Return the bytes of a Parquet file.

    Args:
        table: the file's rows and metadata.
        options: those of `pyarrow.parquet.write_table`.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def encoded_groups(tables: Iterable[pa.Table], schema: pa.Schema, **options: Any) -> bytes:
    """Return the bytes of a Parquet file with a row group of each table; one table is in memory at a time.

    Args:
        tables: of the file's rows.
        schema: of each of them.
        options: those of `pyarrow.parquet.ParquetWriter`.
    """
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **options) as writer:
        for table in tables:
            writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def write_table(uri: str, table: pa.Table, **options: Any) -> None:
    """Write a Parquet file in one piece; arguments as of :func:`encoded`."""
    storage.write_bytes(uri, encoded(table, **options))
