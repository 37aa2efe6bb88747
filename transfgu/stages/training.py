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

_CHECKED = 256  # results fetched at a time


def run(recipe: Recipe, run: Run, progress: Progress) -> Outcome:
    """Train the recipe's method; writes `model.safetensors`, `training/last.safetensors`, `history.json`.

    Raises:
        UserError: no image has a pseudo label, the loss is not finite, an image is missing.
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
        progress.note(f"continuing after epoch {epochs} of a training with fewer epochs")
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
    storage.delete(run.artifact("evaluation").uri)  # of the model with fewer epochs, if there was one
    return replace(publish(recipe, run, checkpoint, len(images)), left_out=left_out)


def usable_images(recipe: Recipe, run: Run, kept: str) -> tuple[pa.Table, tuple[LeftOut, ...]]:
    """Return the images that a method trains on, and the images that are left out.

    If the method has pseudo labels, they are the images with pseudo labels. Otherwise each image is decoded once to
    find the bad ones, and the result is stored.

    Args:
        recipe: recipe with the method.
        run: a run with the artefacts that the method's training needs.
        kept: URI of the table in which the result is stored.

    Returns:
        As :func:`training_images`, without `part` and `row` if there are no pseudo labels.

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
    """Return the reason why each image is bad; empty for good ones."""
    if storage.exists(kept):
        found = parquet.read(kept)
        if found["image"].to_pylist() == listed["image"].to_pylist():
            return [str(reason) for reason in found["reason"].to_pylist()]
    reasons: list[str] = []
    read = partial(read_reasons, max_pixels=max_pixels)
    for columns in stream(listed.select(["image"]), read, _CHECKED, world=1, max_pixels=max_pixels):
        reasons += [str(reason) for reason in columns["reason"]]
    write_table(kept, pa.table({"image": listed["image"], "reason": pa.array(reasons, pa.string())}))
    return reasons


def training_images(run: Run) -> pa.Table:
    """Return the images with pseudo labels, in the data set's order: `image` (URI), and columns `map_files.PLACE`.

    The table's metadata have, as `batches.VERSIONS`, a digest of the present versions of all its files.
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
    """Return a digest of the inputs: tables of :func:`usable_images` and :func:`samples.labelled`, and concepts.

    Pseudo labels follow from images and concepts, so the division into parts is left out.
    """
    digest = hashlib.sha256()
    if "concepts" in recipe.stages:
        digest.update(storage.read_bytes(run.artifact("concepts").file("concepts.safetensors")))
    names = [images["image"].to_pylist(), *(validation[name].to_pylist() for name in ("image", "label"))]
    digest.update(json.dumps(names).encode())
    return digest.hexdigest()[:12]


def carry_on(recipe: Recipe, inputs: str, run: Run) -> int:
    """Copy the last checkpoint of the same training with fewer epochs to the place where :func:`fit` finds it.

    Args:
        recipe: recipe of the training with more epochs.
        inputs: digest of its inputs (:func:`inputs_digest`).
        run: its folder; the runs from which it takes stages are searched, too.

    Returns:
        Number of finished epochs in the checkpoint; 0: there is none, or this training has its own.
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
    """Return the name of the folder of a training's checkpoints, different for other recipes and images."""
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
    """Train on Ray Train, from the newest complete checkpoint in `folder` of this recipe and these inputs, if any.

    Args:
        recipe: recipe of the training; `compute` sets the number of workers.
        images: URI of the table of :func:`training_images`.
        validation: URI of the table of :func:`samples.labelled`; empty: no scores.
        inputs: their :func:`inputs_digest`.
        folder: URI of the folder in which Ray keeps the training's state.
        progress: reports steps and epochs.
        pictures: URI of a folder for a picture of each epoch: the student's predictions for a few images.
        unlabelled: URI of a table of images (`image`) for the label-free score of each epoch.
        on_epoch: called with each epoch's row of the history, from another thread; after a restart also with those of
            the checkpoint.
        goes_on: called likewise; returns False to end training after that epoch. The next epoch waits for it.
        attempts: failed attempts at one epoch after which a fault ends the training.
        beside: number of trainings, including this one, that share a node's cores.

    Returns:
        The last checkpoint; :func:`publish` reads it.

    Raises:
        UserError: a user's mistake, or a loss that is not a number.
        RuntimeError: the training failed repeatedly at one epoch, or twice with the same error.
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
    """Score the initial network of a finished run's training, by the run's own evaluator.

    Weights are the initial ones. Statistics of batch norm, and clusters if the method has them, come from one pass over
    the run's training images.

    Args:
        recipe: recipe of the run, whose method takes optimiser steps.
        run: a run with a complete training, and labelled validation images.
        progress: reports steps and images.
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
    """Write the models and the history of a finished training's checkpoint into the run's folder."""
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
