"""Trials share every artefact that their recipes have in common, because a folder is named after its stage's digest.

So what no trial searches is computed once, before the search; what some do is computed once for each value that is
tried. A trial is a Ray Train run of its own, started by Ray Tune; its record is written by the driver alone, with every
epoch, and is all that a restarted search reads.

Decoding tasks ask for a whole CPU. If trials held every CPU, no trial's images would ever be read: each node keeps one
CPU free, whatever the number of trials, and trials share the rest, in fractions if need be. Nodes are those that the
cluster may come to have, as trials are what brings them.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
from ray import tune

from transfgu import formats, pipeline
from transfgu.errors import UserError, in_words
from transfgu.recipe import ComputeRecipe, Recipe, upgraded
from transfgu.runtime import capacity, connect
from transfgu.runtime.failures import find_user_error
from transfgu.runtime.progress import Progress
from transfgu.search import space, trials
from transfgu.search.trials import Ledger, Search, Trial
from transfgu.search.tuning import EPOCH, VALUE, Proposals, Recorder, reported
from transfgu.stages import samples, training
from transfgu.store import parquet, storage
from transfgu.store.artifacts import Artifact, Run
from transfgu.store.lock import hold


def upstream(recipe: Recipe) -> tuple[str, ...]:
    """Return the method's stages before training, whose artefacts trials share."""
    return recipe.stages[: recipe.stages.index("training")]


_UNLABELLED = 256  # validation images that the criterion without labels is taken on, at even distances
_TRIAL_CPUS = 0.1  # of the process that starts a trial's workers and waits
_ATTEMPTS = 3  # in vain, at one epoch, before a trial counts as failed
_LOST = 10  # times that a trial's own process may be lost with its node


@dataclass(frozen=True)
class SharedRun(Run):
    """A run's folder in a search: an artefact is found by what it was made from."""

    made_by: Recipe

    def artifact(self, stage: str) -> Artifact:
        """The folder of a stage's results, the same for all recipes that agree up to that stage."""
        return Artifact(stage, self.file(f"shared/{stage}-{self.made_by.digest(stage)[:12]}"))


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What a trial reads besides the maps: URIs of small tables."""

    images: str
    validation: str
    """Empty where no image is labelled."""
    unlabelled: str
    inputs: str
    """Digest of what is trained on."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Upstream results of one recipe."""

    computed: list[str]
    """Stages that had to be run."""
    tables: Tables


def prepare(recipe: Recipe, uri: str, stages: Sequence[str] | None = None, *, quiet: bool = True) -> list[str]:
    """Run those of `stages` (None: all before training) that are not complete in the search's folder; returns which."""
    run = SharedRun(uri, recipe)
    computed = []
    for stage in upstream(recipe) if stages is None else stages:
        if not run.artifact(stage).check(recipe):
            manifest = pipeline.run_stage(stage, recipe, run, quiet=quiet, verbose=False)
            computed.append(stage)
            if not quiet:
                print(f"{stage}: {manifest.outcome.items} items in {manifest.seconds:.1f} s", flush=True)
    return computed


def tabulate(recipe: Recipe, uri: str) -> Tables:
    """Write the tables that training reads, beside the artefact that they belong to: the last one before training.

    Raises:
        UserError: no image has a pseudo label, or can be used.
    """
    run = SharedRun(uri, recipe)
    folder = run.artifact(upstream(recipe)[-1])
    images, _ = training.usable_images(recipe, run, folder.file("usable.table"))
    labelled = samples.labelled(recipe, run)
    validation = samples.load(run, "validation").select(["image"])
    count = min(_UNLABELLED, len(validation))
    unlabelled = validation.take(pa.array([i * len(validation) // count for i in range(count)], pa.int64()))
    tables = {"images": images, "validation": labelled, "unlabelled": unlabelled}
    # Not `.parquet`: those files of the folder are the pseudo labels' parts.
    uris = {name: folder.file(f"{name}.table") if len(table) else "" for name, table in tables.items()}
    for name, table in tables.items():
        if len(table):
            parquet.write_table(uris[name], table)
    return Tables(**uris, inputs=training.inputs_digest(recipe, run, images, labelled))


class Preparer:
    """An actor that computes what trials do not share with all others, one trial's after the other's.

    One at a time: two clusterings side by side could each hold half of the CPUs that both need.
    """

    def prepare(self, recipe: Recipe, uri: str) -> Prepared:
        """See :func:`prepare` and :func:`tabulate`."""
        return Prepared(computed=prepare(recipe, uri), tables=tabulate(recipe, uri))


@dataclass(frozen=True, kw_only=True)
class Allotment:
    """What trials get of a cluster."""

    concurrent: int
    beside: int
    """Trials that share a node at most."""
    compute: ComputeRecipe
    """Of each trial."""


def allot(nodes: Sequence[Mapping[str, float]], search: Search) -> Allotment:
    """Divide a cluster among trials so that a whole CPU is left on some node, however the rest is spread.

    Of the CPUs as many as there are nodes stay free in all: then one node at least has a whole one.

    Args:
        nodes: resources of each node that the cluster may come to have.
        search: says how many trials at a time, with how many workers and GPUs each; `recipe.compute.cpus_per_actor`
            is what a worker gets at most.

    Raises:
        UserError: the cluster is too small for what is asked.
    """
    nodes = [node for node in nodes if node.get("CPU")]
    wanted, workers = search.recipe.compute, search.workers_per_trial
    total = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    if search.gpus_per_trial and not gpus:
        raise UserError(
            f"--gpus-per-trial {search.gpus_per_trial:g} asks for GPUs, but the cluster has none: leave it out",
            code="gpu-missing",
        )
    share = search.gpus_per_trial / workers if search.gpus_per_trial else wanted.gpus_per_actor
    slots = [math.floor(node.get("GPU", 0.0) / share + 1e-9) for node in nodes]
    if gpus:
        most = sum(slots) // workers
        if not most:
            raise UserError(
                f"a trial asks for {workers} x {share:g} GPUs, but the cluster has {gpus:g}: lower --gpus-per-trial",
                code="cluster-too-small",
            )
    else:
        # The embedded cluster counts each core twice.
        most = search.concurrent or max(1, int(total) // (2 * workers))
    concurrent = min(search.concurrent or most, most, search.count)
    free = total - len(nodes)
    cpus = min(wanted.cpus_per_actor, math.floor(100 * (free / concurrent - _TRIAL_CPUS) / workers) / 100)
    # Nodes come one by one: those with GPUs must not wait, full of workers, for another that reads for them.
    for node, slot in zip(nodes, slots, strict=True):
        held = min(slot, concurrent * workers)
        if held and (room := math.floor(100 * ((node["CPU"] - 1) / held - _TRIAL_CPUS / workers)) / 100) > 0:
            cpus = min(cpus, room)
    if cpus <= 0:
        raise UserError(
            f"{concurrent} trials of {workers} workers do not fit on {total:g} CPUs, one of which each node keeps for "
            "decoding: lower --concurrent or --workers-per-trial",
            code="cluster-too-small",
        )
    compute = replace(wanted, workers=workers, actors=workers, gpus_per_actor=share, cpus_per_actor=cpus)
    return Allotment(concurrent=concurrent, beside=math.ceil(concurrent / len(nodes)), compute=compute)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A search's outcome as far as it came."""

    trials: list[Trial]
    stages: dict[str, dict[str, Any]]
    """Of the shared stages: `seconds`, `items`, `skipped`."""


def run(search: Search, progress: Progress, *, quiet: bool = False, verbose: bool = False) -> Found:
    """Search from where an earlier attempt in the same folder left off, until there are enough trials or no more time.

    Raises:
        UserError: a folder that holds another search, no labels to maximise mIoU with, a cluster that is too small.
    """
    started = time.monotonic()
    _claim(search)
    ledger = Ledger(search.uri)
    left = search.count - len(ledger.trials) + len(ledger.unfinished())
    connect.connect(verbose=verbose)
    capacity.check_shared(search.uri)
    allotment = allot(capacity.every_possible_node(), search)
    shared = [stage for stage in upstream(search.recipe) if not search.space.touches(search.recipe.stage_fields(stage))]
    computed = prepare(search.recipe, search.uri, shared, quiet=quiet)
    home = SharedRun(search.uri, search.recipe)
    stages = {}
    for stage in shared:
        manifest = home.artifact(stage).manifest()
        assert manifest is not None
        stages[stage] = {
            "seconds": manifest.seconds,
            "items": manifest.outcome.items,
            "skipped": stage not in computed,
            **manifest.outcome.details,
        }
    if "samples" in shared and search.objective == "mean_iou" and not len(samples.labelled(search.recipe, home)):
        raise UserError(
            "--objective mean_iou needs labels, and no validation image has one: use --objective label_free",
            code="labels-missing",
        )
    whole = shared == list(upstream(search.recipe))
    if left > 0:
        plan = _Plan(
            recipe=replace(search.recipe, compute=allotment.compute),
            uri=search.uri,
            objective=search.objective,
            beside=allotment.beside,
            tables=tabulate(search.recipe, search.uri) if whole else None,
            preparer=ray.remote(Preparer).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
            if not whole
            else None,
        )
        progress.note(f"{left} trials to go, {allotment.concurrent} at a time")
        _tune(search, plan, ledger, allotment.concurrent, left, started, progress, verbose=verbose)
    for trial in ledger.trials.values():
        if trial.status != "running":  # its checkpoints have served
            storage.delete(_train_folder(search.uri, trial.number))
    return Found(trials=list(ledger.trials.values()), stages=stages)


def _claim(search: Search) -> None:
    """Take the folder for this search; raises UserError where it holds another one."""
    uri = search.file("search.json")
    held = storage.read_bytes_or_none(uri)
    wanted = json.loads(json.dumps(search.identity()))
    if held is None:
        storage.write_bytes(uri, json.dumps(formats.stamp(wanted), indent=1).encode())
        return
    remedy = "delete the folder to start again, or choose another --run"
    found = upgraded(formats.read_json(held, storage.shown(uri), remedy))
    differing = [f"{n} ({found.get(n)} there, {wanted.get(n)} asked)" for n in wanted if found.get(n) != wanted[n]]
    if differing:
        raise UserError(
            f"{storage.shown(search.uri)} holds another search, differing in {', '.join(differing)}: "
            "choose another --run",
            code="search-mismatch",
        )


def _train_folder(uri: str, number: int) -> str:
    return storage.join(uri, f"ray/trials/{number:04d}")


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What every trial is told."""

    recipe: Recipe
    uri: str
    objective: str
    beside: int
    """Trials that share a node's cores."""
    tables: Tables | None
    """Of the shared upstream; None where it is searched."""
    preparer: Any
    """Handle of the `Preparer`, where there are no shared tables."""


def _tune(
    search: Search,
    plan: _Plan,
    ledger: Ledger,
    concurrent: int,
    left: int,
    started: float,
    progress: Progress,
    *,
    verbose: bool,
) -> None:
    # Tune has no argument for either: its output prints even with `verbose=0`, and its handler of Ctrl-C takes the
    # place of the command's own, which stops the search in the same way as every other job.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    budget = None
    if search.hours:
        budget = max(1.0, 3600 * search.hours - (time.monotonic() - started))
    folder = storage.join(search.uri, "ray")
    storage.delete(storage.join(folder, "tune"))  # of a driver that was killed
    fs, root = storage.travelling(storage.absolute(folder))

    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, plan=plan), {"CPU": _TRIAL_CPUS}),
        tune_config=tune.TuneConfig(
            num_samples=left,
            search_alg=Proposals(search, ledger),
            scheduler=Recorder(search, ledger, progress),
            max_concurrent_trials=concurrent,
            time_budget_s=budget,
            trial_dirname_creator=lambda trial: f"{trial.config['number']:04d}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=root,
            storage_filesystem=fs,
            failure_config=tune.FailureConfig(max_failures=_LOST),
            verbose=2 if verbose else 0,
        ),
    )
    tuner.fit()
    storage.delete(storage.join(folder, "tune"))


def run_trial(config: Mapping[str, Any], plan: _Plan) -> None:
    """One trial, in a process of its own: a Ray Train run, from its last checkpoint on.

    A trial that is stopped ends by itself, as its record says so: Ray Train's controller, killed with the trial's
    process, would leave its workers' CPUs taken where there is no dashboard, for other trials to wait for.

    Tune is told each epoch's row, and at the end what came of it; a failure is told, not raised, so that Tune runs
    again only what was lost with its process.

    Args:
        config: `number` and `parameters`.
        plan: what all trials have in common.
    """
    number: int = config["number"]
    stages: list[str] = []
    record = Ledger.read(plan.uri, number)

    def goes_on(row: dict[str, Any]) -> bool:
        record.add(row)
        epochs = len(record.history)
        tune.report({"row": json.dumps(row), EPOCH: epochs, VALUE: reported(record, plan.objective)})
        return Ledger.read(plan.uri, number).status == "running"  # it was written before `report` returned

    try:
        recipe = space.apply(plan.recipe, config["parameters"])
        tables = plan.tables
        if tables is None:
            prepared: Prepared = ray.get(plan.preparer.prepare.remote(recipe, plan.uri))
            tables, stages = prepared.tables, prepared.computed
        training.fit(
            recipe,
            images=tables.images,
            validation=tables.validation,
            unlabelled=tables.unlabelled,
            inputs=tables.inputs,
            folder=_train_folder(plan.uri, number),
            progress=Progress("training", quiet=True),
            goes_on=goes_on,
            attempts=_ATTEMPTS,
            beside=plan.beside,
        )
        reason = ""
    except Exception as error:
        reason = in_words(find_user_error(error) or error)
        if isinstance(error, RuntimeError) and str(error).startswith("training failed"):
            reason = str(error)
    value = math.nan if reason else reported(record, plan.objective)
    tune.report({"end": json.dumps({"reason": reason, "stages": stages}), VALUE: value})


def run_search(
    search: Search,
    *,
    report: Callable[[Search, Sequence[Trial], Mapping[str, Any]], str] | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> dict[str, Any]:
    """Search for a better recipe; writes `trials.json`, `best.yaml` and `metrics.json`.

    Args:
        search: what to try, and where; trials that ended there are kept, and those that did not go on.
        report: writes the search's report from its trials and metrics, and returns its URI
            (`transfgu.report.search.write`); None: no report is written.
        quiet: print nothing.
        verbose: let Ray's messages through.

    Returns:
        The content of `metrics.json`.

    Raises:
        UserError: a mistake of the user's, before or while it runs; every trial failed.
    """
    search = replace(search, recipe=pipeline.preflight(search.recipe, Run(search.uri)))

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    say(f"{search.recipe.preset}: {search.count} trials of {', '.join(search.space.shown())} in {search.uri}")
    with hold(search.uri, say) as lock:
        found = run(search, Progress("search", quiet=quiet), quiet=quiet, verbose=verbose)
        lock.check()
        metrics = trials.write_results(search, found.trials, found.stages)
        for line in trials.table(search, found.trials):
            say(line)
        if report:
            say(f"report: {report(search, found.trials, metrics)}")
    failed = [trial for trial in found.trials if trial.status == "failed"]
    if failed and len(failed) == len(found.trials):
        raise UserError(f"every trial failed; trial {failed[0].number}: {failed[0].reason}", code="trials-failed")
    if metrics["best"]:
        say(f"best recipe: {search.file('best.yaml')}")
    if left := search.count - sum(trial.status != "running" for trial in found.trials):
        say(f"{left} trials are left: the same command continues")
    return metrics
