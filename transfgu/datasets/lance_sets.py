"""Read an image column of Lance data sets, a few rows at a time.

A Lance data set is a folder of files in versions. Rows are read by their numbers in one version, so rows that are added
meanwhile change nothing. Lance has its own clients of object stores; they get the credentials of :mod:`storage`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from transfgu.errors import UserError
from transfgu.store import storage

SUFFIX = ".lance"
_BATCH = 8  # rows in memory at a time


def opened(uri: str, version: int | None = None) -> Any:
    """Open a data set; only the list of its fragments is read.

    Args:
        uri: of its folder, on a disk or in S3.
        version: number of the version; None: the latest.

    Returns:
        A `lance.LanceDataset`.

    Raises:
        UserError: pylance is not installed, or there is no such data set or version, or it is damaged.
    """
    if storage.scheme(uri) not in ("file", "s3"):
        raise UserError(
            f"{storage.shown(uri)} can't be read: Lance data sets must be on a disk or in s3://, so copy it there",
            code="lance-scheme",
        )
    try:
        import lance
    except ImportError:
        raise UserError(
            "Lance data sets require pylance: pip install 'transfgu[lance]'", code="package-missing"
        ) from None
    with _one_line(uri):
        return lance.dataset(uri, version=version, storage_options=storage.object_store_options(uri))


def batches(data: Any, uri: str, column: str, first: int, count: int) -> Iterator[pa.Array]:
    """Yield a column's values of consecutive rows, in their order.

    Args:
        data: what :func:`opened` returned.
        uri: of its folder, for errors.
        column: name of the column; blobs are read as bytes.
        first: number of the first row; deleted rows have none.
        count: number of rows.

    Raises:
        UserError: a file of the data set is missing or damaged, or the storage fails.
    """
    with _one_line(uri):
        scanner = data.scanner(
            columns=[column],
            offset=first,
            limit=count,
            batch_size=_BATCH,
            batch_readahead=1,
            scan_in_order=True,
            blob_handling="all_binary",
        )
        for batch in scanner.to_batches():
            yield batch.column(0)


@contextlib.contextmanager
def _one_line(uri: str) -> Iterator[None]:
    """Turn Lance's errors into one line; it raises ValueError and OSError for most kinds of trouble."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if "was not found" in text:
            raise UserError(
                f"{storage.shown(uri)} is not a Lance data set, or has lost a version: check the path",
                code="lance-invalid",
            ) from None
        if "S3 error" in text or "error sending request" in text:
            raise UserError(
                f"can't read {storage.shown(uri)}: the storage fails: check the network and the key's permissions",
                code="storage-failed",
            ) from None
        raise UserError(f"{storage.shown(uri)} is damaged: download it again", code="file-damaged") from None
