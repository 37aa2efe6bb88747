"""Seal checkpoints with digests of their files, and find the newest complete one to resume from.

The folder itself shows which checkpoint that is. Ray's own account of checkpoints is written later, and not in one
piece. So a truncated file, or a driver killed between the two, costs at most one epoch and needs no manual repair.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transfgu import formats
from transfgu.store import storage

HISTORY = "history.json"
DIGESTS = "digests.json"
_RAYS_ACCOUNT = "checkpoint_manager_snapshot.json"


class Found(NamedTuple):
    """A complete checkpoint."""

    uri: str
    history: list[dict[str, Any]]
    """One row for each epoch that is done in it."""


def seal(folder: Path) -> None:
    """Write the digests of the folder's files, after all of them."""
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    (folder / DIGESTS).write_text(json.dumps(formats.stamp({"files": digests})))


def newest(uri: str, say: Callable[[str], object] = lambda _: None) -> Found | None:
    """Return the complete checkpoint with the most epochs in the folder `uri`, or None; `say` reports damaged ones."""
    files: dict[str, set[str]] = {}
    for file in storage.list_files(uri):
        folder, _, name = file.rpartition("/")
        files.setdefault(folder, set()).add(name)
    found = [Found(folder, _history(folder)) for folder, names in files.items() if DIGESTS in names]
    # Unreadable ones come first, so that they are reported and skipped.
    for checkpoint in sorted(found, key=lambda c: (not c.history, len(c.history), c.uri), reverse=True):
        if checkpoint.history and is_whole(checkpoint.uri):
            return checkpoint
        say(f"checkpoint {checkpoint.uri.rpartition('/')[2]} is damaged: continuing from the previous one")
    return None


def download(uri: str, folder: Path) -> None:
    """Copy a checkpoint's files to a local folder."""
    for file in storage.list_files(uri, recursive=False):
        (folder / file.rpartition("/")[2]).write_bytes(storage.read_bytes(file))


def mend_account(uri: str) -> None:
    """Remove Ray's record of the checkpoints in `uri` if it is truncated or names a missing checkpoint.

    Ray would fail on such a record, and does not need one.
    """
    account = storage.join(uri, _RAYS_ACCOUNT)
    data = storage.read_bytes_or_none(account)
    if data is None:
        return
    try:
        named = [result["checkpoint_dir_name"] for result in json.loads(data)["checkpoint_results"]]
        if all(storage.exists(storage.join(uri, name)) for name in named):
            return
    except (ValueError, TypeError, KeyError):
        pass
    storage.delete(account)


def _history(folder: str) -> list[dict[str, Any]]:
    try:
        history = json.loads(storage.read_bytes_or_none(storage.join(folder, HISTORY)) or b"")
        return history if all("epoch" in row for row in history) else []
    except (ValueError, TypeError):
        return []


def is_whole(folder: str) -> bool:
    """Return True if every file of the checkpoint in `folder` (URI) has the digest that was written down."""
    try:
        tree = json.loads(storage.read_bytes(storage.join(folder, DIGESTS)))
        number = formats.check(tree.get(formats.KEY), f"checkpoint {storage.shown(folder)}")
        digests = tree if number == 1 else tree["files"]
        return all(
            hashlib.sha256(storage.read_bytes_or_none(storage.join(folder, name)) or b"").hexdigest() == digest
            for name, digest in digests.items()
        )
    except (ValueError, AttributeError, KeyError):
        return False


def merit(row: Mapping[str, Any]) -> float:
    """Return the criterion of the best epoch: mIoU + accuracy; below zero without a score."""
    return -1.0 if row["mean_iou"] is None else float(row["mean_iou"] + row["pixel_accuracy"])
