"""The stage "training": list the images with pseudo labels, train, and write the weights of the last checkpoint.

`transfgu.training.fit` runs the training.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa

from transfgu.datasets import map_files
from transfgu.datasets.rows import read_reasons
from transfgu.errors import LeftOut, UserError
from transfgu.methods import method
from transfgu.metrics import Scores
from transfgu.recipe import Recipe
from transfgu.runtime import capacity
from transfgu.runtime.progress import Progress
from transfgu.stages import evaluation, samples
from transfgu.store import parquet, storage
from transfgu.store.artifacts import EPOCHS, LAST, MODEL, Outcome, Run
from transfgu.store.parquet import write_table
from transfgu.training import checkpoints, tracking
from transfgu.training import fit as trainer
from transfgu.training.batches import VERSIONS, cache_text, stream
from transfgu.training.board import ATTEMPTS
from transfgu.training.checkpoints import merit
from transfgu.training.image_training import ImageJob, ImageTraining
from transfgu.training.untrained import UntrainedNetwork

_CHECKED = 256  # findings that are fetched at a time


def run(recipe: Recipe, run: Run, progress: Progress) -> Outcome:
    """Train the recipe's method; writes `model.safetensors`, `training/last.safetensors`, `history.json`.

    Raises:
        UserError: no image has a pseudo label, the loss is not finite, an image is no longer there.
    """
    artifact = run.artifact("training")
    validation = samples.labelled(recipe, run)
    images, left_out = usable_images(recipe, run, artifact.file("usable.parquet"))
    for name, table in (("images", images), ("validation", validation)):
        write_table(artifact.file(f"{name}.parquet"), table)
    if text := cache_text(recipe, images):
        progress.note(text)
    trackers, pictures = tracking.Trackers(tracking.subject(recipe, run), progress.note), artifact.file("pictures")

    def tell(row: dict[str, Any]) -> None:
        trackers.epoch(row, tracking.read_picture(pictures, row["epoch"]))

    inputs = inputs_digest(recipe, run, images, validation)
    if epochs := carry_on(recipe, inputs, run):
        progress.note(f"going on after epoch {epochs} of a training of fewer epochs")
    checkpoint = fit(
        recipe,
        images=artifact.file("images.parquet"),
        validation=artifact.file("validation.parquet") if len(validation) else "",
        inputs=inputs,
        folder=run.file("ray"),
        progress=progress,
        pictures=pictures if tracking.names(recipe.compute.track) else "",
        on_epoch=tell,
    )
    trackers.close()
    storage.delete(run.artifact("evaluation").uri)  # of the model of fewer epochs, if there was one
    return replace(publish(recipe, run, checkpoint, len(images)), left_out=left_out)


def usable_images(recipe: Recipe, run: Run, kept: str) -> tuple[pa.Table, tuple[LeftOut, ...]]:
    """Return the images that a method trains on, and those that it leaves out.

    They are those that have pseudo labels, where the method has these. Otherwise each is decoded once, to find the bad
    ones, and the finding is kept.

    Args:
        recipe: says the method.
        run: with the artefacts that the method's training needs.
        kept: URI of the table in which the finding is kept.

    Returns:
        As :func:`training_images`, without `part` and `row` where there are no pseudo labels.

    Raises:
        UserError: there is no such image, or more than `dataset.max_bad_share` are bad.
    """
    if "pseudo_labels" in recipe.stages:
        images = training_images(run)
        if not len(images):
            raise UserError(
                f"{run.artifact('pseudo_labels').uri} has no pseudo labels: delete that folder and run again",
                code="pseudo-labels-missing",
            )
        return images, ()
    listed = samples.training(recipe, run)
    reasons = _found_bad(listed, kept, recipe.dataset.max_pixels)
    good = listed.filter(pa.array([not reason for reason in reasons], pa.bool_()))
    left_out = tuple(
        LeftOut(name=name, reason=reason)
        for name, reason in zip(listed["name"].to_pylist(), reasons, strict=True)
        if reason
    )
    share = recipe.dataset.bad_share
    if not len(good) or share.is_exceeded(len(left_out), len(listed)):
        raise share.error(left_out, len(listed), "training images")
    return good.select(["image"]), left_out


def _found_bad(listed: pa.Table, kept: str, max_pixels: int) -> list[str]:
    """Why each of the images is bad; empty for a good one."""
    if storage.exists(kept):
        found = parquet.read(kept)
        if found["image"].to_pylist() == listed["image"].to_pylist():
            return [str(reason) for reason in found["reason"].to_pylist()]
    reasons: list[str] = []
    read = partial(read_reasons, max_pixels=max_pixels)
    for columns in stream(listed.select(["image"]), read, _CHECKED, world=1):
        reasons += [str(reason) for reason in columns["reason"]]
    write_table(kept, pa.table({"image": listed["image"], "reason": pa.array(reasons, pa.string())}))
    return reasons


def training_images(run: Run) -> pa.Table:
    """The images that have pseudo labels, in the data set's order: `image` (URI), and columns `map_files.PLACE`.

    The table's metadata hold, under `batches.VERSIONS`, a digest of the versions that all its files have now.
    """
    listed = storage.list_versions(run.artifact("pseudo_labels").uri)
    parts = sorted(uri for uri in listed if uri.endswith(".parquet"))
    if not parts:
        return pa.table({"image": pa.array([], pa.string())})
    maps = map_files.index_maps(parts, [listed[part].size for part in parts]).sort_by("index")
    images = samples.load(run, "train")["image"].take(maps["index"])
    versions = [[part, *listed[part]] for part in parts]
    uris = images.to_pylist()
    versions += [[uri, *(version or ())] for uri, version in zip(uris, storage.versions(uris), strict=True)]
    digest = hashlib.sha256(json.dumps(versions).encode()).hexdigest()
    table = maps.append_column("image", images).drop_columns("index")
    return table.replace_schema_metadata({VERSIONS: digest})


def inputs_digest(recipe: Recipe, run: Run, images: pa.Table, validation: pa.Table) -> str:
    """Of what a run trains on: tables of :func:`usable_images` and :func:`samples.labelled`, and its concepts, if any.

    Pseudo labels follow from the images and the concepts: where their parts begin, and who made them, is left out.
    """
    digest = hashlib.sha256()
    if "concepts" in recipe.stages:
        digest.update(storage.read_bytes(run.artifact("concepts").file("concepts.safetensors")))
    names = [images["image"].to_pylist(), *(validation[name].to_pylist() for name in ("image", "label"))]
    digest.update(json.dumps(names).encode())
    return digest.hexdigest()[:12]


def carry_on(recipe: Recipe, inputs: str, run: Run) -> int:
    """Copy the last checkpoint of the same training with fewer epochs to where :func:`fit` looks for its own.

    Args:
        recipe: of the training with more epochs.
        inputs: what it trains on (:func:`inputs_digest`).
        run: its folder; those of the runs from which it takes stages are searched, too.

    Returns:
        Epochs that the checkpoint has done; 0: there is none, or this training has a checkpoint of its own.
    """
    own = storage.join(storage.absolute(run.file("ray")), _name(recipe, inputs))
    if method(recipe.method).anneals or checkpoints.newest(own):
        return 0
    wanted = {_name(recipe.with_fields({EPOCHS: n}), inputs) for n in range(1, recipe.training.epochs)}
    homes = dict.fromkeys([run.uri, *(uri.rpartition("/")[0] for uri in run.reused().values())])
    folders = [storage.absolute(storage.join(home, "ray")) for home in homes]
    there = {
        storage.join(folder, name)
        for folder in folders
        for file in storage.list_files(folder)
        if (name := file.removeprefix(f"{folder}/").partition("/")[0]) in wanted
    }
    found = [checkpoint for folder in sorted(there) if (checkpoint := checkpoints.newest(folder))]
    if not found:
        return 0
    last = max(found, key=lambda checkpoint: len(checkpoint.history))
    for file in sorted(storage.list_files(last.uri, recursive=False), key=lambda f: f.endswith(checkpoints.DIGESTS)):
        name = file.rpartition("/")[2]
        storage.write_bytes(storage.join(own, f"after-epoch-{len(last.history)}", name), storage.read_bytes(file))
    return len(last.history)


def _name(recipe: Recipe, inputs: str) -> str:
    """Name of the folder of a training's checkpoints: another recipe, or other images, must not go on from these."""
    return f"training-{recipe.digest('training')[:12]}-{inputs}"


def fit(
    recipe: Recipe,
    *,
    images: str,
    validation: str,
    inputs: str,
    folder: str,
    progress: Progress,
    pictures: str = "",
    unlabelled: str = "",
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    goes_on: Callable[[dict[str, Any]], bool] | None = None,
    attempts: int = ATTEMPTS,
    beside: int = 1,
) -> checkpoints.Found:
    """Train on Ray Train from the newest whole checkpoint in `folder`, if there is one of this recipe and these inputs.

    Args:
        recipe: what to train; `compute` says by how many workers.
        images: URI of the table of :func:`training_images`.
        validation: URI of the table of :func:`samples.labelled`; empty: no scores.
        inputs: their :func:`inputs_digest`.
        folder: URI under which Ray keeps the training's state.
        progress: told of steps and epochs.
        pictures: URI of a folder for a picture of each epoch, of what the student makes of a few images.
        unlabelled: URI of a table of images (`image`) on which a score without labels is taken each epoch.
        on_epoch: called with each epoch's row of the history, from another thread; after a restart with those of
            the checkpoint, too.
        goes_on: asked likewise whether training goes on after that epoch; the next one waits for the answer.
        attempts: in vain, at one epoch, before a fault counts as one that trying again won't mend.
        beside: trainings, this one included, that share a node's cores.

    Returns:
        The last checkpoint; :func:`publish` reads it.

    Raises:
        UserError: a user's mistake, or a loss that is no number.
        RuntimeError: the training failed again and again at one epoch, or twice alike.
    """
    return trainer.fit(
        partial(
            ImageTraining,
            ImageJob(recipe=recipe, images=images, validation=validation, pictures=pictures, unlabelled=unlabelled),
        ),
        name=_name(recipe, inputs),
        folder=folder,
        compute=recipe.compute,
        workers=capacity.elastic_workers(recipe.compute),
        progress=progress,
        on_epoch=on_epoch,
        goes_on=goes_on,
        attempts=attempts,
        beside=beside,
    )


def score_untrained(recipe: Recipe, run: Run, progress: Progress) -> Scores:
    """Score the network that a finished run's training began with, by the run's own evaluator.

    Weights are the initial ones. Statistics of batch norm, and clusters where the method has them, come from one pass
    over the run's training images.

    Args:
        recipe: of the run, whose method takes optimiser steps.
        run: with a complete training, and labelled validation images.
        progress: told of steps and images.
    """
    rows = samples.labelled(recipe, run)
    artifact = run.artifact("training")
    images = artifact.file("images.parquet")
    once = recipe.with_fields({"epochs": 1, "passes": 1})
    checkpoint = trainer.fit(
        partial(UntrainedNetwork, ImageJob(recipe=once, images=images)),
        name=f"untrained-{once.digest('training')[:12]}-{inputs_digest(once, run, parquet.read(images), rows)}",
        folder=run.file("ray"),
        compute=recipe.compute,
        workers=capacity.elastic_workers(recipe.compute),
        progress=progress,
    )
    weights = {"untrained": storage.join(checkpoint.uri, "student.safetensors")}
    return evaluation.evaluate(recipe, weights, rows, progress).scores("untrained")


def publish(recipe: Recipe, run: Run, checkpoint: checkpoints.Found, images: int) -> Outcome:
    """Write the models and the history that a finished training's checkpoint holds into the run's folder."""
    artifact = run.artifact("training")
    history = checkpoint.history
    last = storage.read_bytes(storage.join(checkpoint.uri, "student.safetensors"))
    best = storage.read_bytes_or_none(storage.join(checkpoint.uri, "best.safetensors"))
    storage.write_bytes(artifact.file("history.json"), json.dumps(history, indent=1).encode())
    storage.write_bytes(artifact.file(LAST), last)
    storage.write_bytes(run.file(MODEL), best or last)
    chosen = max(history, key=merit) if best else history[-1]
    details = {"epochs": len(history), "model of epoch": chosen["epoch"]}
    if skipped := sum(row.get("skipped_steps", 0) for row in history):
        details["skipped steps"] = skipped
    return Outcome(items=images, details=details)
