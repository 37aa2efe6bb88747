"""Name the classes of a finished run and of its masks, without training or predicting again.

The masks before merging are kept in `unnamed/`, so names can be changed or removed.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import yaml
from jaxtyping import Integer
from PIL import Image

from transfgu import formats, pipeline
from transfgu.datasets.class_lists import index_type
from transfgu.errors import UserError
from transfgu.pipeline import Report
from transfgu.sharing import names
from transfgu.sharing.names import ClassTable
from transfgu.stages.prediction import CLAIM, masks_file, png, read_claim
from transfgu.store import parquet, storage
from transfgu.store.artifacts import Run
from transfgu.store.lock import hold

UNNAMED = "unnamed"
"""Folder of the original masks, next to the folder `masks`."""
_FILES = 8  # masks processed at a time


@dataclass(frozen=True, kw_only=True)
class Reindexed:
    """Changes in a folder of masks."""

    files: int
    """Number of rewritten files, which now have the named classes."""
    removed: int
    """Number of removed files: they were predicted with other names, so their unnamed classes are unknown, and the same
    prediction predicts them again."""


def name_classes(
    run: Run, given: Mapping[int, str], report: Report | None = None, say: Callable[[str], None] = print
) -> ClassTable:
    """Store names, and merges, of a run's classes; rewrite its `metrics.json` and report.

    Args:
        run: an evaluated run, or a folder with a model, which has no metrics and no report.
        given: names by index of the unnamed class (`transfgu.sharing.names.parse`); empty: remove existing names.
        report: writes the report (`transfgu.report.page.write`); None: the report is unchanged.
        say: called with the report's place, and with the reason for waiting.

    Returns:
        The new classes of the run's predictions.

    Raises:
        UserError: the run has no model yet, or another process works on it.
    """
    recipe = run.recipe()
    if not storage.exists(run.model()):
        raise UserError(
            f"{storage.shown(run.uri)} has no model yet: finish its training with the same command",
            code="model-missing",
        )
    with hold(run.uri, say):
        names.write(run, given)
        uri = run.file("metrics.json")
        text = storage.read_bytes_or_none(uri)
        manifests = {stage: run.artifact(stage).manifest() for stage in recipe.stages}
        complete = {stage: manifest for stage, manifest in manifests.items() if manifest is not None}
        if text is not None and len(complete) == len(recipe.stages):
            metrics = formats.read_json(text, storage.shown(uri), "delete it, and train again to restore it")
            metrics = formats.stamp({**metrics, **pipeline.scores_of(recipe, run)})
            storage.write_bytes(uri, json.dumps(metrics, indent=1).encode())
            if report:
                say(f"report: {report(recipe, run, complete, metrics)}")
    return pipeline.class_table(recipe, run)


def reindex(out: str, run: Run) -> Reindexed:
    """Rewrite the masks in a folder of `predict` with the present names of the run's classes.

    If it is interrupted, the next call continues.

    Args:
        out: URI of the folder: the `--out` of `predict`.
        run: the run whose model predicted them.

    Returns:
        Number of rewritten and of removed files.

    Raises:
        UserError: the folder has no masks of this run's model.
    """
    claim_uri, claim = storage.join(out, CLAIM), read_claim(out)
    if claim["model"] != hashlib.sha256(storage.read_bytes(run.model())).hexdigest():
        raise UserError(
            f"{storage.shown(out)} has masks of another model than that of {storage.shown(run.uri)}: give the run "
            "of that model",
            code="masks-of-another-model",
        )
    recipe = run.recipe()
    unnamed, table = pipeline.class_table(recipe, run, named=False), pipeline.class_table(recipe, run)
    held = [found["name"] for found in claim["classes"]]
    was_merged = len(held) != len(unnamed.names) or held[-1] == names.IGNORE
    masks, before = storage.join(out, "masks"), storage.join(out, UNNAMED)
    found = storage.list_files(masks) if storage.exists(masks) else []
    relative = [uri.removeprefix(storage.absolute(masks) + "/") for uri in found]

    def rewrite(name: str) -> bool:
        original, mask = storage.join(before, name), storage.join(masks, name)
        if not storage.exists(original):
            if was_merged:
                storage.delete(mask)
                return False
            if table.merged:
                storage.write_bytes(original, storage.read_bytes(mask))
            else:
                original = mask
        storage.write_bytes(mask, _renamed(original, unnamed, table))
        return True

    with ThreadPoolExecutor(_FILES) as pool:
        done = list(pool.map(rewrite, relative))
    colours = zip(table.names, table.colours, strict=True)
    classes = [{"index": i, "name": name, "colour": list(colour)} for i, (name, colour) in enumerate(colours)]
    claim = formats.stamp({**claim, "classes": classes})
    storage.write_bytes(claim_uri, json.dumps(claim, indent=1).encode())
    if not table.merged:
        storage.delete(before)
    return Reindexed(files=sum(done), removed=len(done) - sum(done))


def _renamed(uri: str, unnamed: ClassTable, table: ClassTable) -> bytes:
    """Rewrite a file of masks from unnamed to named classes."""
    kind = index_type(len(table.names))
    if uri.endswith(".parquet"):
        rows = parquet.read(uri, remedy="delete it, and predict again")
        held = index_type(len(unnamed.names))
        return masks_file(
            (name, height, width, table.index_of[np.frombuffer(mask, held)].astype(kind).tobytes())
            for name, height, width, mask in zip(
                *(rows[column].to_pylist() for column in ("name", "height", "width", "mask")), strict=True
            )
        )
    indices: Integer[np.ndarray, "H W"] = np.asarray(Image.open(io.BytesIO(storage.read_bytes(uri))))
    return png(table.index_of[indices].astype(np.uint8), np.array(table.colours, np.uint8))


def as_yaml(table: ClassTable) -> str:
    """Return names for a user to edit: one line per unnamed class."""
    return yaml.safe_dump({i: table.names[index] for i, index in enumerate(table.index_of)}, allow_unicode=True)
