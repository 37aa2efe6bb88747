"""Check a run and estimate its cost before it starts, from the recipe and the list of samples.

The checks are those of the pipeline, so a run that passes them starts. The operators are those that Ray Data would run.
Ray is not started on a single machine without GPUs, whose resources are known without it.
The cost comes from the model of `transfgu.planning.cost_plan`, with rates from forward passes of the encoder timed on
this machine.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from transfgu import datasets, pipeline
from transfgu.datasets import packed
from transfgu.datasets.packed_maps import packed_planes
from transfgu.encoder import normalise, patch_grid
from transfgu.errors import LeftOut, counted
from transfgu.inference import device
from transfgu.inference.tokens import PatchTokens
from transfgu.methods import STAGES, TRANSFGU, method
from transfgu.planning.cost_plan import Cost, Rates, costs
from transfgu.recipe import Recipe
from transfgu.runtime import capacity, connect
from transfgu.runtime.progress import duration
from transfgu.stages import features, pseudo_labels, samples
from transfgu.store import reuse, storage
from transfgu.store.artifacts import Run
from transfgu.training.order import Order
from transfgu.windows import sliding_windows

_TIMED = 2  # images in the timed forward pass


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of samples."""

    train: int
    validation: int
    labelled: int
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of a stage."""

    what: str
    """Description as text."""
    stored: int = 0
    """Bytes written, at most."""
    time: float = 0.0
    """Seconds in the encoder, at most."""


def describe(
    recipe: Recipe, run: Run, *, until: str = STAGES[-1], shared: Run | None = None, verbose: bool = False
) -> Iterator[str]:
    """Describe, line by line, what a run would do; nothing is computed or stored.

    Raises:
        UserError: a mistake that would stop the run at its start: data, weights, storage, resources, the folder of
            another recipe.
    """
    asked, recipe = recipe, pipeline.preflight(recipe, run)
    run = reuse.linked(recipe, run, shared)[0] if shared else run
    stages = pipeline.stages_until(recipe, until)
    complete = pipeline.check_artifacts(recipe, run)
    connect.connect(verbose=verbose, single_process=True)
    pipeline.check_shared(recipe, run)
    capacity.check_satisfiable(recipe.compute)
    held = capacity.actor_resources(recipe.compute)
    counts = _counts(recipe, run if complete["samples"] else None)
    how = method(recipe.method)
    encode = PatchTokens(recipe.encoder, device.own_device()) if how.encoder else None
    by_concepts = encode is not None and "concepts" in recipe.stages  # the work of these stages is known in detail
    timed = by_concepts and (not capacity.cluster_gpus() or (encode is not None and encode.device.type == "cuda"))
    works = _works(recipe, counts, encode, timed) if encode and by_concepts else _other_works(recipe, counts)
    yield f"dry run of {storage.shown(run.uri)}: checked, nothing computed"
    if shared and (note := reuse.preset_note(asked, recipe, shared)):
        yield note
    encoder = "no encoder"
    if encode:
        parameters = sum(p.numel() for p in encode.encoder.parameters())
        encoder = (
            f"encoder {recipe.encoder.name}, {parameters / 1e6:.1f} million parameters of patch "
            f"{encode.encoder.patch_size}, {recipe.encoder.weights}"
        )
    yield (
        f"recipe   {recipe.preset}{'' if recipe.method == TRANSFGU else ' by ' + how.title}: "
        f"{recipe.concepts.things} things and {recipe.concepts.stuff} stuff"
        f"{' before a background' if recipe.background else ''}, "
        f"{'x'.join(map(str, recipe.dataset.image_size))} pixels; {encoder}"
    )
    yield (
        f"data     {counted(counts.train, 'training image')}, {counts.validation} for validation, {counts.labelled} of "
        f"them labelled{_left_out(counts.left_out)}"
    )
    nodes, cpus, gpus = capacity.present()
    cores = counted(cpus, "CPU")
    if connect.is_embedded():  # Ray is given more CPUs than there are cores
        cores = f"{counted(os.cpu_count() or 1, 'core')} ({cores} for Ray)"
    yield (
        f"machine  {counted(nodes, 'node')}, {cores}, {counted(gpus, 'GPU')}: up to "
        f"{counted(capacity.pool_size(recipe.compute), 'encoder actor')}, "
        f"{counted(capacity.training_workers(recipe.compute), 'training worker')}, each holding "
        f"{counted(held['num_cpus'], 'CPU')} and {counted(held['num_gpus'], 'GPU')}"
    )
    plans = _plans(recipe, encode.encoder.width) if encode and by_concepts else {}
    for stage in stages:
        if complete[stage]:
            taken = run.reused().get(stage)
            yield f"{stage}: {f'taken from {storage.shown(taken)}' if taken else 'complete already'}, skipped"
            continue
        work = works[stage]
        stored = f"; {in_bytes(work.stored)} to write" if work.stored else ""
        takes = f"; about {duration(work.time)} in the encoder" if work.time else ""
        yield f"{stage}: {work.what}{stored}{takes}"
        if stage in plans:
            yield f"  {' > '.join(plans[stage])}"
    left = [works[stage] for stage in stages if not complete[stage]]
    total = f"in total {in_bytes(sum(w.stored for w in left))} to write"
    if timed and encode:
        total += f", about {duration(sum(w.time for w in left))} in the encoder, timed on this {encode.device.type}"
    elif by_concepts:
        total += "; times are unknown, because this machine has no GPU of the cluster"
    else:
        total = f"time and size of {how.title} are not known before its first epoch"
    yield f"{total}. To start, run transfgu train with the same flags, without --dry-run."


def _counts(recipe: Recipe, run: Run | None) -> Counts:
    """Count samples in the run's list if it exists, otherwise in the data."""
    if run:
        tables = {split: samples.load(run, split) for split in datasets.SPLITS}
        left_out: tuple[LeftOut, ...] = ()
    elif recipe.dataset.layout == "shapes":
        drawn = {split: min(n, recipe.limit or n) for split, n in samples.SCENES.items()}
        return Counts(train=drawn["train"], validation=drawn["validation"], labelled=drawn["validation"], left_out=())
    else:
        listings, units = samples.listed(recipe)
        if units:
            return _packed_counts(recipe, units)
        tables = {split: listing.table for split, listing in listings.items()}
        left_out = tuple(x for listing in listings.values() for x in listing.left_out)
    labels = tables["validation"]["label"]
    return Counts(
        train=len(tables["train"]),
        validation=len(tables["validation"]),
        labelled=len(labels) - labels.null_count,
        left_out=left_out,
    )


def _packed_counts(recipe: Recipe, units: Sequence[packed.Unit]) -> Counts:
    """Count images that have yet to be unpacked; labels are matched to their names later."""
    of = {split: sum(unit.count for unit in units if unit.pack.split == split) for split in ("train", "val", "")}
    apart = of["train"] and of["val"]
    train, validation = (of["train"], of["val"]) if apart else (sum(of.values()), sum(of.values()))
    train, validation = (min(count, recipe.limit or count) for count in (train, validation))
    return Counts(train=train, validation=validation, labelled=validation if recipe.labels else 0, left_out=())


def _works(recipe: Recipe, counts: Counts, encode: PatchTokens, timed: bool) -> Mapping[str, Work]:
    encoder, dataset, training = encode.encoder, recipe.dataset, recipe.training
    grid = patch_grid(dataset.feature_size, encoder.patch_size)
    each = len(sliding_windows(grid, recipe.windows.scales, encoder.patch_size))
    h, w = patch_grid(dataset.image_size, encoder.patch_size)
    k = recipe.concepts.count
    order = Order.of(recipe, counts.train)
    scored = counts.labelled * (training.epochs // training.evaluate_every)
    every = "epoch" if training.evaluate_every == 1 else f"{training.evaluate_every} epochs"
    decoder = 4 * (encoder.width**2 * (12 * recipe.decoder.depth + 3) + encoder.width * recipe.classes)
    rates = _rates(recipe, encode, each, 2 * packed_planes(k) * h * w, order, timed)
    cost = {cost.stage: cost for cost in costs(recipe, rates, counts.train, counts.labelled)}
    actors, workers = capacity.pool_size(recipe.compute), capacity.training_workers(recipe.compute)
    return {
        "samples": Work(what=f"list {counts.train} and {counted(counts.validation, 'image')}"),
        "features": _work(
            f"encode up to {counted(each * counts.train, 'window')} of {'x'.join(map(str, recipe.windows.size))} "
            f"pixels, {each} per image",
            cost["features"],
            actors,
        ),
        "concepts": Work(
            what=f"K-Means into {recipe.concepts.things} and {counted(recipe.concepts.stuff, 'cluster')}, at most "
            f"{counted(recipe.concepts.iterations, 'iteration')}",
            stored=k * 4 * encoder.width,
        ),
        "pseudo_labels": _work(
            f"{counted(k, 'map')} of {h}x{w} patches for each of {counted(counts.train, 'image')}",
            cost["pseudo-labels"],
            actors,
        ),
        "training": replace(
            _work(
                f"{_steps(training.epochs, order)}; {counted(counts.labelled, 'image')} to score every {every}",
                cost["training"],
                workers,
            ),
            stored=2 * decoder,
        ),
        "evaluation": _work(
            f"score {counted(counts.labelled, 'image')} ({counted(scored, 'image')} in all during training)",
            cost["evaluation"],
            actors,
        ),
    }


def _work(what: str, cost: Cost, processes: int) -> Work:
    return Work(what=what, stored=round(cost.written), time=cost.device / processes)


def _rates(recipe: Recipe, encode: PatchTokens, windows: int, map_bytes: int, order: Order, timed: bool) -> Rates:
    """Return the rates of this machine: forward passes alone, of every window that an image may have."""

    def seconds(size: tuple[int, int]) -> float:
        return _seconds(encode, size) if timed else 0.0

    dataset, training = recipe.dataset, recipe.training
    image = seconds(dataset.image_size)
    if training.views:
        step = seconds((dataset.training_size[0] // 2, dataset.training_size[1] // 2))
    else:  # images without random crops are encoded once
        step = seconds(dataset.training_size) * order.images / (order.steps * order.batch * training.epochs)
    return Rates(
        where=f"this {encode.device.type}",
        features=windows * seconds(recipe.windows.size),
        kmeans=0.0,
        maps=image * len(recipe.pseudo_labels.scales),
        training=step,
        scoring=image,
        windows=float(windows),
        window_bytes=4.0 * windows * encode.encoder.width,
        map_bytes=float(map_bytes),
        decoding={"features": 0.0, "pseudo-labels": 0.0, "training": 0.0},
    )


def _other_works(recipe: Recipe, counts: Counts) -> Mapping[str, Work]:
    """Describe the stages of a method without concepts, whose duration is not known before it runs."""
    training = recipe.training
    order = Order.of(recipe, counts.train)
    return {
        "samples": Work(what=f"list {counts.train} and {counted(counts.validation, 'image')}"),
        "pseudo_labels": Work(what=f"an object mask for each of {counted(counts.train, 'image')}"),
        "training": Work(what=_steps(training.epochs, order)),
        "evaluation": Work(what=f"score {counted(counts.labelled, 'image')}"),
    }


def _steps(epochs: int, order: Order) -> str:
    """Return the steps of a training as text."""
    return (
        f"{counted(epochs, 'epoch')} of {counted(order.steps, 'step')} of {counted(order.batch, 'image')}, "
        f"{counted(epochs * order.steps, 'step')} in total"
    )


def _seconds(encode: PatchTokens, size: tuple[int, int]) -> float:
    """Return the seconds of one image's forward pass, the faster of two."""
    pixels = torch.zeros(_TIMED, 3, *size, dtype=torch.uint8)
    encoder = encode.encoder
    batch = normalise(pixels.to(encode.device), encoder.mean, encoder.std)
    taken = []
    for _ in range(2):
        started = time.monotonic()
        encode(batch).sum().item()  # wait for the device
        taken.append(time.monotonic() - started)
    return min(taken) / _TIMED


def _plans(recipe: Recipe, width: int) -> Mapping[str, Sequence[str]]:
    """Return the operators of the stages that run on Ray Data, in order."""
    centroids = np.zeros((recipe.concepts.count, width), np.float32)
    return {
        "features": features.planned_work(recipe, "").operators,
        "pseudo_labels": pseudo_labels.planned_work(recipe, centroids, "").operators,
    }


def _left_out(left_out: Sequence[LeftOut]) -> str:
    return f"; {len(left_out)} left out ({left_out[0].name}: {left_out[0].reason}, ...)" if left_out else ""


def in_bytes(count: int) -> str:
    """Return a number of bytes as text, such as `1.5 kB`."""
    shown, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while shown >= 1000 and len(units) > 1:
        shown /= 1000
        units.pop(0)
    return f"{shown:.0f} {units[0]}" if count < 1000 or shown >= 10 else f"{shown:.1f} {units[0]}"
