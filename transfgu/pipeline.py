"""Run the stages in order; stages with a complete artefact are skipped, so the same command resumes a stopped run.

Mistakes are found before Ray starts if possible, so that no GPU is held for a run that can't succeed.
"""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import safetensors.numpy
import torch

from transfgu import datasets, formats
from transfgu.baselines.masks import score_masks
from transfgu.encoder import SHIPPED, Encoder, is_self_described
from transfgu.errors import LeftOut, UserError, counted
from transfgu.methods import STAGES, TRANSFGU, method
from transfgu.metrics import Scores, merge_clusters, scores, scores_json
from transfgu.presets import SMALL_ENCODER
from transfgu.recipe import Recipe, field_name, preset
from transfgu.runtime.failures import no_faiss
from transfgu.runtime.progress import Progress
from transfgu.segmenter import assignment_of
from transfgu.segmenter import class_table as unnamed_table
from transfgu.sharing import names as names_of
from transfgu.sharing.names import ClassTable
from transfgu.store import reuse, storage
from transfgu.store.artifacts import MODEL, Manifest, Outcome, Run, read_json
from transfgu.store.lock import Lock, hold
from transfgu.training import tracking

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from jaxtyping import Int

_SIZES = ("dataset.image_size", "dataset.feature_size", "dataset.training_size", "windows.size")
SMALL_SIDE = 128
"""Encoders trained on images with fewer pixels per side are small ones; DINO's was trained on 224."""


_OF_METHOD = ("pseudo_labels", "training")  # stages whose artefacts name their method


def fit_to_patch(recipe: Recipe, patch_size: int) -> Recipe:
    """Round a preset's image sides to multiples of the encoder's patch: with patch 14, 320 becomes 322.

    Raises:
        UserError: a side given by the user, not the preset, is not a multiple of the patch.
    """
    published = preset(recipe.preset, recipe.method).flat()
    flat = recipe.flat()
    changes: dict[str, Any] = {}
    for name in _SIZES:
        # A training view has half the sides of the image from which it is cropped.
        step = 2 * patch_size if name == "dataset.training_size" and recipe.training.views else patch_size
        near = [max(1, round(side / step)) * step for side in flat[name]]
        if near == flat[name]:
            continue
        if flat[name] != published[name]:
            raise UserError(
                f"{name} {'x'.join(map(str, flat[name]))} is not a multiple of "
                f"{'twice ' if step > patch_size else ''}the encoder's patch, {patch_size}: "
                f"use {'x'.join(map(str, near))}",
                code="image-size",
            )
        changes[name] = near
    return recipe.with_fields(changes)


def fit_to_small_encoder(recipe: Recipe) -> Recipe:
    """Adapt preset `folder` to a small encoder whose file describes it, as written by `transfgu pretrain`.

    Images have 8/3 of the side of the encoder's training images, and windows are resized to that side, as in preset
    `shapes`; other fields are those of `SMALL_ENCODER`. Fields that differ from the preset's values are kept, and every
    recipe with another encoder is unchanged. If only a file is given, the encoder gets its name.

    Raises:
        UserError: the file is missing or damaged.
    """
    usual = preset(recipe.preset, recipe.method)
    if recipe.preset != "folder" or not method(recipe.method).encoder:
        return recipe
    name, weights = recipe.encoder.name, recipe.encoder.weights
    if name != SHIPPED:
        if not is_self_described(weights):
            return recipe
        if name == usual.encoder.name:
            name = weights.rsplit("/", 1)[-1].removesuffix(".safetensors")
    encoder = Encoder.from_pretrained(name, weights)
    proposed: dict[str, Any] = {"encoder.name": name}
    if encoder.native_side < SMALL_SIDE:
        step = 2 * encoder.patch_size
        side = max(1, round(encoder.native_side * 8 / 3 / step)) * step
        proposed.update(dict.fromkeys(_SIZES, (side, side)))
        proposed.update(SMALL_ENCODER, **{"windows.size": (encoder.native_side, encoder.native_side)})
    # A method of comparison keeps its values for all presets.
    own = {field_name(name) for name in method(recipe.method).values.get("", {})}
    proposed = {name: value for name, value in proposed.items() if field_name(name) not in own}
    given = recipe.given()
    wanted = usual.with_fields(proposed).flat()
    return recipe.with_fields({f: v for f, v in wanted.items() if f not in given or f == "encoder.name"})


def preflight(recipe: Recipe, run: Run) -> Recipe:
    """Find mistakes before Ray starts: data, encoder, sizes, run folder.

    Returns:
        The recipe, continued from that of an existing run or adapted to a small encoder, with image sides rounded to
            the encoder's patch.

    Raises:
        UserError: the first mistake.
    """
    tracking.names(recipe.compute.track)
    if "concepts" in recipe.stages and importlib.util.find_spec("faiss") is None:
        raise no_faiss()
    datasets.preflight(recipe)
    storage.check_writable(run.uri)
    # An existing run keeps its own fields.
    recipe = run.continued(recipe) if storage.is_file(run.file("recipe.yaml")) else fit_to_small_encoder(recipe)
    return fit_to_encoder(recipe)


def fit_to_encoder(recipe: Recipe) -> Recipe:
    """Check the method's requirements, and round image sides to the patch of its encoder, if it uses one.

    Raises:
        UserError: an encoder that is not available, or a mistake found by the method's own check.
    """
    how = method(recipe.method)
    if how.encoder:
        encoder = Encoder.from_pretrained(recipe.encoder.name, recipe.encoder.weights)
        recipe = fit_to_patch(recipe, encoder.patch_size)
    if how.check:
        how.load("check")(recipe)
    return recipe


def _stage_function(stage: str) -> Callable[..., Outcome]:
    # Imported when a stage runs, because stages import Ray, FAISS or torch, which skipped stages don't need.
    function: Callable[..., Outcome] = importlib.import_module(f"transfgu.stages.{stage}").run
    return function


def stages_until(recipe: Recipe, until: str) -> tuple[str, ...]:
    """Return the method's stages up to and including `until`; raise UserError if it has no such stage."""
    if until not in recipe.stages:
        of = "" if until not in STAGES else f" of method {recipe.method}"
        raise UserError(
            f"there is no stage {until}{of}; choose one of {', '.join(recipe.stages)}", code="stage-unknown"
        )
    return recipe.stages[: recipe.stages.index(until) + 1]


Report = Callable[[Recipe, Run, Mapping[str, Manifest], Mapping[str, Any]], str]
"""Writes a run's report from its manifests and the content of `metrics.json`, and returns its URI."""


def run_stages(
    recipe: Recipe,
    run: Run,
    *,
    until: str = STAGES[-1],
    report: Report | None = None,
    names: Mapping[int, str] | None = None,
    shared: Run | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> dict[str, Any]:
    """Run the stages up to and including `until`, then write `metrics.json`.

    Args:
        recipe: recipe of the run.
        run: folder of the run; complete stages in it are skipped.
        until: the last stage to run.
        report: writes the report of an evaluated run (`transfgu.report.page.write`); None: no report.
        names: names of the classes, by index, to store in the run (`transfgu.sharing.names`); None: keep its names.
        shared: another run, whose stages are used if this recipe shares them (`transfgu.store.reuse`).
        quiet: print nothing.
        verbose: show Ray's messages.

    Returns:
        The content of `metrics.json`.

    Raises:
        UserError: a mistake of the user, before or while the stages run.

    Examples:
        Eight drawn scenes and one epoch; the second call finds every stage complete:

        >>> from pathlib import Path
        >>> from transfgu.store.artifacts import Run
        >>> from transfgu.pipeline import run_stages
        >>> from transfgu.recipe import preset
        >>> recipe = preset("shapes").with_fields({"limit": 8, "epochs": 1})
        >>> run = Run(str(Path.home() / "transfgu" / "small"))
        >>> metrics = run_stages(recipe, run, quiet=True)
        >>> list(metrics["stages"])
        ['samples', 'features', 'concepts', 'pseudo_labels', 'training', 'evaluation']
        >>> again = run_stages(recipe, run, quiet=True)
        >>> again["mean_iou"] == metrics["mean_iou"], {stage["skipped"] for stage in again["stages"].values()}
        (True, {True})
    """
    stages = stages_until(recipe, until)
    run = Run(storage.absolute(run.uri), links=run.links)  # Ray Train's workers have a working directory of their own
    asked, recipe = recipe, preflight(recipe, run)
    run, why_not = reuse.linked(recipe, run, shared) if shared else (run, "")

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    with hold(run.uri, say) as lock:
        complete = check_artifacts(recipe, run)
        storage.write_bytes(run.file("recipe.yaml"), recipe.to_yaml(run.given(asked)).encode())
        if names is not None:
            names_of.write(run, names)
        if shared:
            reuse.write(run)
            if note := reuse.preset_note(asked, recipe, shared):
                say(note)
            if why_not:
                say(f"not shared with {storage.shown(shared.uri)}: {why_not}")
        named = recipe.preset if recipe.method == TRANSFGU else f"{recipe.preset} by {method(recipe.method).title}"
        say(f"{named}: {', '.join(stages)} in {storage.shown(run.uri)}")
        if asked.preset == "folder" and asked.windows.size != recipe.windows.size and not complete["samples"]:
            side = f"{recipe.dataset.image_size[0]} x {recipe.dataset.image_size[1]}"
            say(f"sizes and training fit encoder {recipe.encoder.name}: images of {side} pixels, see recipe.yaml")
        manifests: dict[str, Manifest] = {}
        for stage in recipe.stages:
            if complete[stage]:
                manifest = run.artifact(stage).manifest()
                assert manifest is not None
                at_the_time = f"{_counted(manifest)}, {manifest.seconds:.1f} s at the time"
                taken = run.reused().get(stage)
                where = f"taken from {storage.shown(taken)}" if taken else "complete already"
                say(f"{stage}: {where} ({at_the_time}), skipped")
            elif stage in stages:
                manifest = run_stage(stage, recipe, run, lock, quiet=quiet, verbose=verbose)
                say(f"{stage}: {_counted(manifest)} in {manifest.seconds:.1f} s{_left_out_note(manifest)}")
            else:
                continue
            manifests[stage] = manifest
        return _conclude(recipe, run, manifests, complete, report, say)


def check_artifacts(recipe: Recipe, run: Run) -> dict[str, bool]:
    """Return which artefacts of the method's stages are complete in the run's folder; all share one `recipe.yaml`.

    Raises:
        UserError: one was made, completely or in part, by another method or recipe, or one taken from another run is
            missing.
    """
    reuse.check_present(run)
    for stage in _OF_METHOD:
        run.artifact(stage).check_method(recipe)
    reuse.check_same(recipe, run)
    return {stage: run.artifact(stage).check(recipe) for stage in recipe.stages}


def run_stage(
    stage: str, recipe: Recipe, run: Run, lock: Lock | None = None, *, quiet: bool, verbose: bool
) -> Manifest:
    """Run one stage, whose predecessors are complete, and commit its artefact, if `lock` is still held."""
    from transfgu.runtime import capacity, connect

    connect.connect(verbose=verbose)
    check_shared(recipe, run)
    capacity.check_satisfiable(recipe.compute)
    started = time.monotonic()
    run.artifact(stage).begin(recipe)
    progress = Progress(stage, quiet=quiet)
    outcome = _stage_function(stage)(recipe, run, progress)
    progress.end()
    if lock:
        lock.check()
    return run.artifact(stage).commit(recipe, outcome, started)


def check_shared(recipe: Recipe, run: Run | None) -> None:
    """Refuse folders of one machine on a cluster of several nodes.

    Images that a node can't find would be left out as missing, and which ones would be random.

    Raises:
        UserError: a local folder; the message names its flag.
    """
    from transfgu.runtime import capacity

    for uri, flag in ((run.uri if run else "", "--run"), (recipe.data, "--data"), (recipe.labels, "--labels")):
        if uri:
            capacity.check_shared(uri, flag)


def _counted(manifest: Manifest) -> str:
    """Return the amount of a stage's work, such as ``200 images``."""
    return counted(manifest.outcome.items, "window" if manifest.stage == "concepts" else "image")


def _left_out_note(manifest: Manifest) -> str:
    left_out = manifest.outcome.left_out
    return f", {len(left_out)} left out ({left_out[0].name}: {left_out[0].reason}, ...)" if left_out else ""


def _conclude(
    recipe: Recipe,
    run: Run,
    manifests: dict[str, Manifest],
    complete: dict[str, bool],
    report: Report | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    scores = scores_of(recipe, run) if "evaluation" in manifests else {}
    metrics: dict[str, Any] = {
        formats.KEY: formats.FORMAT,
        "preset": recipe.preset,
        "method": recipe.method,
        "mean_iou": None,
        "pixel_accuracy": None,
        "iou": None,
        **scores,
        "protocol": recipe.evaluation.protocol,
        "made": _made(run) if complete["evaluation"] else made_now(),
        "stages": {
            s: {"seconds": m.seconds, "items": m.outcome.items, "skipped": complete[s], **m.outcome.details}
            for s, m in manifests.items()
        },
        "left_out": [{"stage": s, **dataclasses.asdict(x)} for s, m in manifests.items() for x in m.outcome.left_out],
    }
    storage.write_bytes(run.file("metrics.json"), json.dumps(metrics, indent=1).encode())
    if "evaluation" in manifests:
        where = report(recipe, run, manifests, metrics) if report else ""
        if metrics["mean_iou"] is not None:
            say(f"mIoU {metrics['mean_iou']:.2f} %, pixel accuracy {metrics['pixel_accuracy']:.2f} %")
        else:
            say(f"no labels, no scores{': the report shows the predictions' if where else ''}")
        if where:
            say(f"report: {where}")
        uri = storage.shown(run.uri)
        if metrics["mean_iou"] is None:
            say(f"next: look at the report's concepts and name them: transfgu name {uri} > names.yaml")
        say(f"next: masks of images: transfgu predict --run {uri} --images IMAGES --out MASKS")
    return metrics


def class_table(recipe: Recipe, run: Run, *, named: bool = True) -> ClassTable:
    """Return the classes of a run's predictions, without the user's names if not `named`."""
    unnamed, _ = unnamed_table(recipe, assignment_of(run.scores()))
    return names_of.named(unnamed, datasets.classes(recipe).colours, names_of.read(run) if named else {})


def scores_of(recipe: Recipe, run: Run) -> dict[str, Any]:
    """Return the scores of an evaluated run for `metrics.json`.

    If the user merged or ignored classes, `named` holds the resulting `classes`, with their `mean_iou` and
    `pixel_accuracy`; the other scores are those of the unnamed classes.
    """
    found = run.scores() or {}
    for tree in (found, found.get("last", {})):
        tree["iou"] = _by_class(recipe, tree.get("iou"), run)
    table = class_table(recipe, run)
    data = storage.read_bytes_or_none(run.artifact("evaluation").file("confusion.safetensors"))
    if not table.merged or data is None:
        return {**found, "named": None}
    merged = _named_scores(recipe, run, safetensors.numpy.load(data)["model"])
    named = {"mean_iou": merged.mean_iou, "pixel_accuracy": merged.pixel_accuracy}
    return {**found, "named": {"classes": list(table.names), **named}}


def _named_scores(recipe: Recipe, run: Run, confusion: "Int[np.ndarray, 'C clusters']") -> Scores:
    """Return the scores of a run's decoder in the classes that the user named and merged."""
    table = class_table(recipe, run)
    _, class_of = unnamed_table(recipe, assignment_of(run.scores()))
    return scores(merge_clusters(confusion, table.index_of[class_of], len(table.names)), table.ignored)


def made_now() -> dict[str, str]:
    """Return when, with which version and on what kind of machine a run was finished, for its report."""
    machine = f"{os.cpu_count()} cores" + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "")
    return {
        "finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": importlib.metadata.version("transfgu"),
        "machine": "a Ray cluster" if os.environ.get("RAY_ADDRESS") else machine,
    }


def _made(run: Run) -> dict[str, str] | None:
    """Return the result of :func:`made_now` from the time when the run was finished; None for earlier versions."""
    metrics = read_json(run.file("metrics.json"), "delete it, and run again")
    return None if metrics is None else metrics.get("made")


def evaluate(recipe: Recipe, run: Run | None, *, quiet: bool = False, verbose: bool = False) -> dict[str, Any]:
    """Score a decoder on labelled validation images, without training one.

    Args:
        recipe: recipe of the run or of a preset; `decoder.weights`, if set, is scored instead of the run's decoder.
        run: the run with the list of samples; None: the samples are listed from `recipe.data`.
        quiet: print no progress.
        verbose: show Ray's messages.

    Returns:
        `mean_iou` and `pixel_accuracy` (percent), `iou` by class, `protocol`, `images`, `left_out`.

    Raises:
        UserError: no decoder, no labels, or a decoder with other classes.
    """
    from transfgu.runtime import capacity, connect
    from transfgu.stages import evaluation

    decoder = recipe.decoder.weights or (run.file(MODEL) if run else "")
    if not decoder:
        raise UserError(
            "there is nothing to evaluate: give --run URI, or a PRESET with --data and --decoder.weights",
            code="flag-missing",
        )
    recipe = recipe if run else fit_to_small_encoder(recipe)
    rows = _labelled_rows(recipe, run)
    evaluation.check_decoder(recipe, decoder)
    if method(recipe.method).encoder:
        encoder = Encoder.from_pretrained(recipe.encoder.name, recipe.encoder.weights)
        recipe = fit_to_patch(recipe, encoder.patch_size)
    connect.connect(verbose=verbose, single_process=len(rows) <= evaluation.BLOCK_ROWS)
    check_shared(recipe, run)
    capacity.check_satisfiable(dataclasses.replace(recipe.compute, workers=0))  # the run's number is for training
    counted = evaluation.evaluate(recipe, {"model": decoder}, rows, Progress("evaluation", quiet=quiet))
    own = run is not None and storage.absolute(decoder) == storage.absolute(run.model())
    if run is not None and own and class_table(recipe, run).merged:
        found = _named_scores(recipe, run, counted.confusions["model"])
    else:
        found = counted.scores("model")
    return evaluation_result(recipe, run, found, counted.images, counted.left_out)


def evaluate_masks(recipe: Recipe, run: Run | None, masks: str, *, quiet: bool = False) -> dict[str, Any]:
    """Score a folder of masks from any program, on labelled validation images, with the recipe's protocol.

    Args:
        recipe: recipe of the run or of a preset.
        run: the run with the list of samples; None: the samples are listed from `recipe.data`.
        masks: URI of the folder (see `transfgu.baselines.masks`).
        quiet: print no progress.

    Returns:
        As :func:`evaluate`.

    Raises:
        UserError: no labels; a mask that is missing, of another size, or with an index without a class.
    """
    counted = score_masks(recipe, _labelled_rows(recipe, run), masks, Progress("evaluation", quiet=quiet))
    return evaluation_result(recipe, run, scores(counted.confusion, counted.ignored), counted.images, counted.left_out)


def _labelled_rows(recipe: Recipe, run: Run | None) -> "pa.Table":
    """Return the labelled validation samples of a run, or of `recipe.data`."""
    from transfgu.stages import samples

    if run:
        rows = samples.labelled(recipe, run)
    elif recipe.dataset.layout not in datasets.LAYOUTS:
        raise UserError(
            f"the images of {recipe.preset} are drawn by a run: give --run URI instead of the PRESET",
            code="data-missing",
        )
    else:
        datasets.preflight(recipe)
        rows = datasets.list_samples(recipe, "validation")
        rows = rows.filter(rows["label"].is_valid())
        rows = rows.filter(rows["curated"]) if recipe.dataset.curated else rows
    if not len(rows):
        raise UserError(
            f"no validation image of {storage.shown(recipe.data) or recipe.preset} has a label",
            code="labels-missing",
        )
    return rows


def evaluation_result(
    recipe: Recipe, run: Run | None, scores: Scores, images: int, left_out: Sequence[LeftOut]
) -> dict[str, Any]:
    """Return the scores of a run as `metrics.json` has them, with the names of its classes and the left-out inputs."""
    result = scores_json(scores)
    return {
        **result,
        "iou": _by_class(recipe, result["iou"], run),
        "protocol": recipe.evaluation.protocol,
        "images": images,
        "left_out": [dataclasses.asdict(x) for x in left_out],
    }


def _by_class(recipe: Recipe, values: list[float | None] | None, run: Run | None) -> dict[str, float | None] | None:
    """Return values by true class, with the user's names if there is one per class."""
    if values is None:
        return None
    table = class_table(recipe, run) if run else None
    names = table.names if table and not table.merged else datasets.classes(recipe).names
    return dict(zip(names, values, strict=True))


def baselines(recipe: Recipe, run: Run) -> dict[str, dict[str, Any]]:
    """Return the scores of the baselines on a run's images, as in :func:`evaluate` (`transfgu.baselines.tokens`).

    Raises:
        UserError: the run has no concepts yet.
    """
    from transfgu.baselines import tokens

    if run.artifact("concepts").manifest() is None:
        raise UserError(
            f"{storage.shown(run.uri)} has no concepts yet: finish it with transfgu train", code="concepts-missing"
        )
    return {name: scores_json(scores) for name, scores in tokens.baselines(recipe, run).items()}
