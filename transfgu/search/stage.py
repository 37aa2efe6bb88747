"""Run the trials of a search on Ray; trials share every artefact that their recipes have in common.

The folder of an artefact is named after its stage's digest. So stages without searched fields are computed once, before
the search; the others once per value. A trial is a Ray Train run, started by Ray Tune; the driver alone writes its
record, with every epoch, and a restarted search reads only the records.

Decoding tasks require a whole CPU. If trials held every CPU, no images would ever be read: each node keeps one CPU
free, whatever the number of trials, and trials share the others, in fractions if necessary. All nodes that the cluster
may have are counted, because trials make an autoscaler add them.
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
from transfgu.errors import UserError, counted, in_words
from transfgu.recipe import ComputeRecipe, Recipe, upgraded
from transfgu.runtime import capacity, connect
from transfgu.runtime.failures import find_user_error
from transfgu.runtime.progress import Progress
from transfgu.search import space, trials
from transfgu.search.trials import Ledger, Search, Trial
from transfgu.search.tuning import EPOCH, VALUE, Proposals, Recorder, reported
from transfgu.stages import samples, training
from transfgu.store import parquet, storage
from transfgu.store.artifacts import Artifact, Run, read_json
from transfgu.store.lock import hold


def upstream(recipe: Recipe) -> tuple[str, ...]:
    """Return the method's stages before training, whose artefacts trials share."""
    return recipe.stages[: recipe.stages.index("training")]


_UNLABELLED = 256  # validation images of the label-free objective, at equal distances
_TRIAL_CPUS = 0.1  # for the process that starts a trial's workers and waits
_ATTEMPTS = 3  # failed attempts at one epoch before a trial counts as failed
_LOST = 10  # how often a trial's own process may be lost with its node


@dataclass(frozen=True)
class SharedRun(Run):
    """The folder of a run in a search, in which an artefact is found by its digest."""

    made_by: Recipe

    def artifact(self, stage: str) -> Artifact:
        """Return the folder of a stage's results, the same for all recipes that agree up to that stage."""
        return Artifact(stage, self.file(f"shared/{stage}-{self.made_by.digest(stage)[:12]}"))


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Inputs of a trial besides the maps: URIs of small tables."""

    images: str
    validation: str
    """Empty if no image is labelled."""
    unlabelled: str
    inputs: str
    """Digest of the training inputs."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Results of one recipe's earlier stages."""

    computed: list[str]
    """Stages that were computed."""
    tables: Tables


def prepare(recipe: Recipe, uri: str, stages: Sequence[str] | None = None, *, quiet: bool = True) -> list[str]:
    """Run the stages (None: all before training) that are missing in the search's folder; returns their names."""
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
    """Write the tables that training reads, next to the last artefact before training.

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
    # Not `.parquet`, because these files of the folder are parts of the pseudo labels.
    uris = {name: folder.file(f"{name}.table") if len(table) else "" for name, table in tables.items()}
    for name, table in tables.items():
        if len(table):
            parquet.write_table(uris[name], table)
    return Tables(**uris, inputs=training.inputs_digest(recipe, run, images, labelled))


class Preparer:
    """An actor that computes the artefacts that trials do not share with all others, one trial at a time.

    Two clusterings at the same time could each hold half of the CPUs that both need, and wait forever.
    """

    def prepare(self, recipe: Recipe, uri: str) -> Prepared:
        """See :func:`prepare` and :func:`tabulate`."""
        return Prepared(computed=prepare(recipe, uri), tables=tabulate(recipe, uri))


@dataclass(frozen=True, kw_only=True)
class Allotment:
    """Resources of trials in a cluster."""

    concurrent: int
    beside: int
    """Maximum number of trials that share a node."""
    compute: ComputeRecipe
    """Settings of each trial."""


def allot(nodes: Sequence[Mapping[str, float]], search: Search) -> Allotment:
    """Divide a cluster among trials so that a whole CPU remains on at least one node.

    As many CPUs as there are nodes stay free in total, so at least one node has a whole one.

    Args:
        nodes: resources of each node that the cluster may have.
        search: number of trials at a time, with workers and GPUs of each; `recipe.compute.cpus_per_actor` is the
            maximum for a worker.

    Raises:
        UserError: the cluster is too small for the request.
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
                f"a trial asks for {workers} x {counted(share, 'GPU')}, but the cluster has {gpus:g}: lower "
                "--gpus-per-trial",
                code="cluster-too-small",
            )
    else:
        # The embedded cluster counts each core twice.
        most = search.concurrent or max(1, int(total) // (2 * workers))
    concurrent = min(search.concurrent or most, most, search.count)
    free = total - len(nodes)
    cpus = min(wanted.cpus_per_actor, math.floor(100 * (free / concurrent - _TRIAL_CPUS) / workers) / 100)
    # Nodes start one by one: a node with GPUs must not be full of workers and wait for another node to read images.
    for node, slot in zip(nodes, slots, strict=True):
        held = min(slot, concurrent * workers)
        if held and (room := math.floor(100 * ((node["CPU"] - 1) / held - _TRIAL_CPUS / workers)) / 100) > 0:
            cpus = min(cpus, room)
    if cpus <= 0:
        raise UserError(
            f"{counted(concurrent, 'trial')} of {counted(workers, 'worker')} at a time do not fit on the "
            f"{counted(total, 'CPU')} that Ray counts, one of which each node keeps for decoding: lower --concurrent "
            "or --workers-per-trial",
            code="cluster-too-small",
        )
    compute = replace(wanted, workers=workers, actors=workers, gpus_per_actor=share, cpus_per_actor=cpus)
    return Allotment(concurrent=concurrent, beside=math.ceil(concurrent / len(nodes)), compute=compute)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The outcome of a search so far."""

    trials: list[Trial]
    stages: dict[str, dict[str, Any]]
    """Of the shared stages: `seconds`, `items`, `skipped`."""


def run(search: Search, progress: Progress, *, quiet: bool = False, verbose: bool = False) -> Found:
    """Continue a search in its folder, until there are enough trials or the time is over.

    Raises:
        UserError: a folder with another search, no labels for mIoU as objective, a cluster that is too small, storage
            that failed in a trial, which stays unfinished.
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
            "--objective mean_iou requires labels, but no validation image has one: use --objective label_free",
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
        progress.note(f"{counted(left, 'trial')} to go, {allotment.concurrent} at a time")
        _tune(search, plan, ledger, allotment.concurrent, left, started, progress, verbose=verbose)
    for trial in ledger.trials.values():
        if trial.status != "running":  # its checkpoints are no longer needed
            storage.delete(_train_folder(search.uri, trial.number))
    return Found(trials=list(ledger.trials.values()), stages=stages)


def _claim(search: Search) -> None:
    """Take the folder for this search; raise UserError if it holds another one."""
    uri = search.file("search.json")
    remedy = "delete the folder to start again, or choose another --run"
    held = read_json(uri, remedy)
    wanted = json.loads(json.dumps(search.identity()))
    if held is None:
        storage.write_bytes(uri, json.dumps(formats.stamp(wanted), indent=1).encode())
        return
    found = upgraded(held)
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
    """Settings of every trial."""

    recipe: Recipe
    uri: str
    objective: str
    beside: int
    """Number of trials that share a node's cores."""
    tables: Tables | None
    """Tables of shared stages; None if these stages depend on searched fields."""
    preparer: Any
    """Handle of the `Preparer`, if there are no shared tables."""


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
    # Tune has no arguments for these: its output prints even with `verbose=0`, and its Ctrl-C handler would replace
    # the command's own, which stops a search like every other job.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    budget = None
    if search.hours:
        budget = max(1.0, 3600 * search.hours - (time.monotonic() - started))
    folder = storage.join(search.uri, "ray")
    storage.delete(storage.join(folder, "tune"))  # left by a killed driver
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
    try:
        tuner.fit()
    except Exception:
        if not ledger.storage_error:
            raise
    if ledger.storage_error:
        raise ledger.storage_error
    storage.delete(storage.join(folder, "tune"))


def run_trial(config: Mapping[str, Any], plan: _Plan) -> None:
    """Run one trial in its own process: a Ray Train run, from its last checkpoint.

    A stopped trial ends itself after reading its record. If Tune killed the trial's process, Ray Train's controller
    would be killed, too, and without a dashboard its workers would keep their CPUs from other trials.

    Tune receives the row of each epoch, and the outcome at the end, with the code of a failure that is a `UserError`.
    Failures are reported, not raised, so that Tune repeats only trials whose process was lost.

    Args:
        config: `number` and `parameters`.
        plan: settings of all trials.
    """
    number: int = config["number"]
    stages: list[str] = []
    record = Ledger.read(plan.uri, number)

    def goes_on(row: dict[str, Any]) -> bool:
        record.add(row)
        epochs = len(record.history)
        tune.report({"row": json.dumps(row), EPOCH: epochs, VALUE: reported(record, plan.objective)})
        return Ledger.read(plan.uri, number).status == "running"  # the record is written before `report` returns

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
        reason, code = "", ""
    except Exception as error:
        mistake = find_user_error(error)
        reason, code = in_words(mistake or error), mistake.code if mistake else ""
        if isinstance(error, RuntimeError) and str(error).startswith("training failed"):
            reason = str(error)
    value = math.nan if reason else reported(record, plan.objective)
    tune.report({"end": json.dumps({"reason": reason, "code": code, "stages": stages}), VALUE: value})


def run_search(
    search: Search,
    *,
    report: Callable[[Search, Sequence[Trial], Mapping[str, Any]], str] | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> dict[str, Any]:
    """Search for a better recipe; writes `trials.json`, `best.yaml` and `metrics.json`.

    Args:
        search: settings and folder; finished trials there are kept, and others continue.
        report: writes the search's report from its trials and metrics, and returns its URI
            (`transfgu.report.search.write`); None: no report.
        quiet: print nothing.
        verbose: show Ray's messages.

    Returns:
        The content of `metrics.json`.

    Raises:
        UserError: a mistake of the user, before or during the search; all trials failed.
    """
    search = replace(search, recipe=pipeline.preflight(search.recipe, Run(search.uri)))

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    say(
        f"{search.recipe.preset}: {counted(search.count, 'trial')} of {', '.join(search.space.shown())} in {search.uri}"
    )
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
        say(f"{counted(left, 'trial')} left: the same command continues")
    return metrics
