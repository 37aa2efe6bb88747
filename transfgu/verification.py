"""Read every file of a run's folder, and report damaged files and their repair.

Files are read completely: Parquet files to the last row, with counts compared to their stage's manifest, checkpoints
with their digests, weights with a check for numbers that are not finite. Nothing is written.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from transfgu import formats
from transfgu.datasets import images
from transfgu.errors import BadInput, UserError
from transfgu.methods import STAGES, TRANSFGU
from transfgu.recipe import Recipe
from transfgu.sharing import names
from transfgu.store import parquet, storage
from transfgu.store.artifacts import MODEL, Artifact, Manifest, Run
from transfgu.store.weights import read_weights
from transfgu.training import checkpoints

T = TypeVar("T")
_PARTS = ("features", "pseudo_labels")  # stages with one file per block of images
_WITHOUT = "images without windows"  # a count in parts of features that is not a number of rows
_FOOTER = b"transfgu"  # a part's summary in its Parquet metadata


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A file or a stage that differs from what was written."""

    file: str
    """URI."""
    reason: str
    remedy: str
    """Files to delete, and the command that computes them again."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """Result of a check."""

    files: int
    """Number of files read."""
    stages: tuple[str, ...]
    """Complete stages; missing or unfinished stages are not damage."""
    damage: tuple[Damage, ...]


def verify(run: Run) -> Verified:
    """Check all files of a run.

    Args:
        run: its folder, on any storage.

    Raises:
        UserError: the folder is not that of a run, its recipe can't be read, or the storage fails.
    """
    recipe = run.recipe()
    files = storage.list_files(run.uri)
    again = _command(recipe, run)
    damage: list[Damage] = []
    complete: list[str] = []
    for stage in STAGES:
        artifact = run.artifact(stage)
        taken = stage in run.reused()
        if taken:
            files += storage.list_files(artifact.uri)
        own = [file for file in files if file.startswith(storage.absolute(artifact.uri) + "/")]
        remedy = (
            f"run transfgu check {storage.shown(artifact.uri.rpartition('/')[0])}, from which it is taken"
            if taken
            else f"delete the folder {storage.shown(artifact.uri)}, and run {again}"
        )
        manifest = _attempt(damage, artifact.file("manifest.json"), remedy, artifact.manifest)
        if taken and not own:
            damage.append(Damage(file=artifact.uri, reason="missing", remedy=f"give {again} --reuse RUN"))
        if manifest is not None:
            complete.append(stage)
            _attempt(damage, artifact.file("manifest.json"), remedy, lambda a=artifact: a.check(recipe))  # type: ignore[misc]
        for file in own:
            _attempt(damage, file, _part_remedy(file, stage, remedy, again), lambda f=file: _read(f))  # type: ignore[misc]
        bad = {found.file for found in damage}
        if manifest is not None and not bad & set(own):
            damage += _counted(artifact, manifest, own, remedy)
    retrain = (
        f"delete {storage.shown(run.file('training'))} and {storage.shown(run.file('evaluation'))}, and run {again}"
    )
    if "training" in complete:
        if storage.absolute(run.file(MODEL)) not in files:
            damage.append(Damage(file=run.file(MODEL), reason="missing", remedy=retrain))
        _attempt(damage, run.artifact("training").file("history.json"), retrain, run.history)
    if "evaluation" in complete:
        remedy = f"delete the folder {storage.shown(run.file('evaluation'))}, and run {again}"
        _attempt(damage, run.file("evaluation/scores.json"), remedy, run.scores)
    for file in files:
        if file == storage.absolute(run.file(MODEL)):
            _attempt(damage, file, retrain, lambda f=file: _read(f))  # type: ignore[misc]
        elif file == storage.absolute(run.file("metrics.json")):
            _attempt(damage, file, f"delete it, and run {again}", lambda f=file: _read(f))  # type: ignore[misc]
    _attempt(damage, run.file(names.FILE), "delete it, and name the classes again", lambda: names.read(run))
    for folder in sorted({file.rpartition("/")[0] for file in files if file.endswith(f"/{checkpoints.DIGESTS}")}):
        if not checkpoints.is_whole(folder):
            damage.append(
                Damage(
                    file=folder,
                    reason="a checkpoint whose files have changed",
                    remedy=f"delete that folder; training continues from the one before with {again}",
                )
            )
    return Verified(files=len(files), stages=tuple(complete), damage=tuple(_first_of_each(damage)))


def _command(recipe: Recipe, run: Run) -> str:
    given = [
        f"--{name} {storage.shown(uri)}" for name, uri in (("data", recipe.data), ("labels", recipe.labels)) if uri
    ]
    method = [] if recipe.method == TRANSFGU else [f"--method {recipe.method}"]
    return " ".join(["transfgu train", recipe.preset, *method, *given, f"--run {storage.shown(run.uri)}"])


def _part_remedy(file: str, stage: str, remedy: str, again: str) -> str:
    if stage in _PARTS and file.endswith(".parquet") and remedy.startswith("delete"):
        return f"delete it and its folder's manifest.json, and run {again}"
    return remedy


def _attempt(damage: list[Damage], file: str, remedy: str, read: Callable[[], T]) -> T | None:
    """Return the result of `read`; damage is recorded."""
    try:
        return read()
    except UserError as error:
        if error.code == "storage-failed":
            raise
        damage.append(Damage(file=file, reason=str(error), remedy=remedy))
    except (BadInput, ValueError) as error:
        damage.append(Damage(file=file, reason=str(error), remedy=remedy))
    return None


def _read(file: str) -> None:
    """Read one file by its kind. Raises UserError, BadInput or ValueError if it is damaged."""
    kind = file.rpartition(".")[2]
    if kind in ("parquet", "table"):
        parquet.read(file)
    elif kind == "safetensors":
        read_weights(file)  # also checks the numbers
    elif kind == "json":
        with formats.damage(storage.shown(file), "compute it again"):
            json.loads(storage.read_bytes(file))
    elif kind == "png":
        images.read_image(file)


def _counted(artifact: Artifact, manifest: Manifest, files: list[str], remedy: str) -> Iterator[Damage]:
    """Compare a complete stage's parts with its manifest."""
    if artifact.stage not in _PARTS:
        return
    covered = 0
    for file in files:
        if not file.rpartition("/")[2].startswith("part-"):
            continue
        with parquet.opened(file) as opened:
            metadata = opened.metadata
        try:
            summary = json.loads((metadata.metadata or {})[_FOOTER])
            covered += summary["images"]
            rows = summary["images"] - len(summary["left_out"])
            if artifact.stage == "features":
                rows = sum(count for name, count in summary["counts"].items() if name != _WITHOUT)
        except (ValueError, KeyError, TypeError):
            yield Damage(file=file, reason="no summary of a part", remedy=remedy)
            continue
        if metadata.num_rows != rows:
            yield Damage(file=file, reason=f"{metadata.num_rows} rows, but its summary has {rows}", remedy=remedy)
    if covered != manifest.outcome.items:
        yield Damage(
            file=artifact.uri,
            reason=f"parts of {covered} images, but manifest.json has {manifest.outcome.items}",
            remedy=f"delete the manifest.json there, and run again: {remedy.partition('and run ')[2]}",
        )


def _first_of_each(damage: list[Damage]) -> Iterator[Damage]:
    seen: set[str] = set()
    for found in damage:
        if storage.absolute(found.file) not in seen:
            seen.add(storage.absolute(found.file))
            yield found
