"""Run several methods with several seeds on the same images, each run in its own process and folder.

Complete runs are skipped and stopped ones continue, as with the command of a single run. The processes of the runs end
with the comparison, even if it is killed.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transfgu import formats
from transfgu.errors import UserError
from transfgu.methods import METHODS
from transfgu.runtime import connect, stopping
from transfgu.runtime.progress import Progress
from transfgu.store import storage
from transfgu.store.artifacts import Run, read_json
from transfgu.store.lock import hold

UNTRAINED = "untrained.json"
"""File in a run's folder with the scores of the initial network."""

_PATIENCE = 20.0  # seconds a run has to stop


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One run of a comparison.

    Args:
        method: its name, as the value of `--method`.
        seed: seed of the run.
        run: URI of the run's folder.
        mean_iou: percent; None if the run has no score.
        pixel_accuracy: percent; None if the run has no score.
        seconds: duration of all stages.
        untrained_mean_iou: percent, of the network before training; None if there is no network or no score.
        untrained_pixel_accuracy: likewise.
        failure: reason why the run failed, in one line; empty if it succeeded.
    """

    method: str
    seed: int
    run: str
    mean_iou: float | None = None
    pixel_accuracy: float | None = None
    seconds: float = 0.0
    untrained_mean_iou: float | None = None
    untrained_pixel_accuracy: float | None = None
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Settings of a comparison.

    Args:
        uri: folder of the comparison; a run is in `METHOD/seed-SEED` below it.
        methods: names, as values of `--method`.
        seeds: seeds of the runs of each method.
        flags: flags of `transfgu train` for each method: the preset and fields of the recipe, without method, seed and
            run.
        at_once: number of runs in parallel.
    """

    uri: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    flags: Mapping[str, tuple[str, ...]]
    at_once: int = 1


def compare(comparison: Comparison, say: Callable[[str], None]) -> list[Scored]:
    """Train and score each method with each seed.

    If a run fails, the failure is reported and the other runs continue.

    Args:
        comparison: settings of the comparison.
        say: prints a line of a run's progress.

    Returns:
        One row per run, ordered by method as given, then by seed.
    """
    pairs = [(method, seed) for method in comparison.methods for seed in comparison.seeds]
    with _stopped_together() as processes, ThreadPoolExecutor(comparison.at_once) as pool:
        waiting = [pool.submit(_run, comparison, method, seed, processes, say) for method, seed in pairs]
        try:
            return [future.result() for future in waiting]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(
    comparison: Comparison,
    method: str,
    seed: int,
    processes: list[subprocess.Popen[str]],
    say: Callable[[str], None],
) -> Scored:
    uri = storage.join(comparison.uri, method, f"seed-{seed}")
    own = ("--method", method, "--seed", str(seed), "--run", uri)
    command = [sys.executable, "-m", "transfgu", "train", *comparison.flags[method], *own]
    clone = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    process = stopping.start_tied(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": clone, "PYTHONUNBUFFERED": "1"},
    )
    processes.append(process)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        if line.strip():
            last = line.strip()
            say(f"{method}, seed {seed}: {line.rstrip()}")
    if process.wait():
        return Scored(method=method, seed=seed, run=uri, failure=last or f"exit status {process.returncode}")
    return read_scores(method, seed, uri)


def read_scores(method: str, seed: int, uri: str) -> Scored:
    """Read the scores and the duration of a finished run.

    Raises:
        UserError: its `metrics.json` is missing or damaged.
    """
    file = Run(uri).file("metrics.json")
    remedy = "run the same command again"
    metrics = read_json(file, remedy)
    if metrics is None:
        raise UserError(f"{storage.shown(file)} is missing: {remedy}", code="run-unfinished")
    with formats.damage(storage.shown(file), remedy):
        stages: Mapping[str, Mapping[str, float]] = metrics["stages"]
        return Scored(
            method=method,
            seed=seed,
            run=uri,
            mean_iou=metrics["mean_iou"],
            pixel_accuracy=metrics["pixel_accuracy"],
            seconds=sum(stage["seconds"] for stage in stages.values()),
        )


def score_untrained(rows: Sequence[Scored], say: Callable[[str], None], *, quiet: bool = False) -> list[Scored]:
    """Score, for each run with a score, its initial network.

    The scores are stored in the run's folder and read from there by the next call.

    Args:
        rows: the result of :func:`compare`.
        say: prints a line of progress.
        quiet: show no progress within a run.

    Returns:
        The rows with their `untrained_mean_iou` and `untrained_pixel_accuracy`.

    Raises:
        UserError: files of a run are missing or damaged.
    """
    return [
        row if row.mean_iou is None or not METHODS[row.method].optimised else _with_untrained(row, say, quiet=quiet)
        for row in rows
    ]


def _with_untrained(row: Scored, say: Callable[[str], None], *, quiet: bool) -> Scored:
    run = Run(row.run)
    file = run.file(UNTRAINED)
    data = storage.read_bytes_or_none(file)
    if data is None:
        from transfgu.stages.training import score_untrained as score

        say(f"{row.method}, seed {row.seed}: scoring the untrained network")
        connect.connect()
        with hold(run.uri, say):
            found = score(run.recipe(), run, Progress("untrained", quiet=quiet))
            tree = formats.stamp({"mean_iou": _number(found.mean_iou), "pixel_accuracy": _number(found.pixel_accuracy)})
            data = json.dumps(tree, indent=1).encode()
            storage.write_bytes(file, data)
    remedy = "delete it, and run the same command again"
    scores = formats.read_json(data, storage.shown(file), remedy)
    with formats.damage(storage.shown(file), remedy):
        return replace(row, untrained_mean_iou=scores["mean_iou"], untrained_pixel_accuracy=scores["pixel_accuracy"])


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


@contextmanager
def _stopped_together() -> Iterator[list[subprocess.Popen[str]]]:
    """Stop the processes of the list that are still running when the block ends, for example after Ctrl-C."""
    processes: list[subprocess.Popen[str]] = []
    try:
        yield processes
    finally:
        running = [process for process in processes if process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
