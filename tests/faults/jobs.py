"""Run jobs by their commands for tests of faults: what each leaves, how far it is, and the data that they share.

Each case is compared with the same command undisturbed: equal masks, scores, weights or trials, bit by bit.
"""

import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.numpy

from tests.faults.commands import job as command
from tests.faults.commands import output_of
from transfgu.recipe import from_yaml
from transfgu.search.trials import Ledger
from transfgu.store import storage

IMAGES = 72  # three parts
LIMIT = 400  # seconds of a command, on a busy machine


@dataclass(frozen=True)
class Job:
    """A command, and what it leaves."""

    words: str
    """Its arguments; words in capitals stand for places."""
    works: str
    """In the command line of the processes that do its work."""
    outcome: Callable[[str], Any]
    """What it left in OUT, a URI, which is to be the same."""
    last: str
    """The file in OUT that it writes last."""
    asks: str = ""
    """A request, method and path, that is made while it works; S3 fails for jobs that have one."""
    begun: str = ""
    """Pattern in the URI of a file in OUT; a process is killed once there is one."""
    room: int = 0
    """Kilobytes of free space that are too few for what it writes besides `early`."""
    early: str = "nothing"
    """Folder in OUT for which there is room on a disk that becomes full."""


def masks(out: str) -> dict[str, bytes]:
    return {uri.rpartition("/")[2]: storage.read_bytes(uri) for uri in storage.list_files(storage.join(out, "masks"))}


def scores(out: str) -> Any:
    return json.loads(storage.read_bytes(storage.join(out, "scores.json")))


def weights(out: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load(storage.read_bytes(storage.join(out, "vit.safetensors")))


def trials(out: str) -> dict[str, Any]:
    """The best trial, and of each trial its values, its end, and all of its history that does not depend on time."""
    found = {
        f"trial {trial.number}": (trial.parameters, trial.status, [untimed(row) for row in trial.history])
        for trial in Ledger(out).trials.values()
    }
    best = json.loads(storage.read_bytes(storage.join(out, "metrics.json")))["best"]
    recipe = from_yaml(storage.read_bytes(storage.join(out, "best.yaml")).decode())
    assert recipe.training.omega_1 == best["parameters"]["training.omega_1"]
    return {**found, "best": (best["number"], best["mean_iou"])}


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in ("epoch", *VALUES)}


def decoder(out: str) -> dict[str, Any]:
    """The decoder of a run, and its scores."""
    tensors = safetensors.numpy.load(storage.read_bytes(storage.join(out, "model.safetensors")))
    found = json.loads(storage.read_bytes(storage.join(out, "metrics.json")))
    return {**tensors, "scores": (found["mean_iou"], found["pixel_accuracy"])}


VALUES = ("total", "peer", "diversity", "uncertainty", "mean_iou", "pixel_accuracy", "label_free")
STEPS, EPOCHS = 80, 6
OWN = "--data IMAGES --labels LABELS --encoder.weights ENCODER"  # in place of the recipe's
CHECKPOINT = "/checkpoint_[^/]*/digests.json$"
TINY = (
    "--image_size 16 --width 12 --depth 2 --heads 3 --patch_size 4 --global_size 16 --local_size 8 --local_views 1 "
    f"--local_mosaic 2 --prototypes 8 --hidden 8 --bottleneck 4 --batch_size 8 --warmup 1 --steps {STEPS}"
)
JOBS = {
    "prediction": Job(
        "predict --run MADE --images IMAGES --out OUT",
        works="MapBatches(PredictMasks)",
        asks="GET .*/images/",
        outcome=masks,
        last="summary.json",
        room=40,
    ),
    "evaluation": Job(
        f"evaluate --recipe RECIPE {OWN} --decoder.weights DECODER --out OUT/scores.json",
        works="MapBatches(Count)",
        asks="GET .*/labels/",
        outcome=scores,
        last="scores.json",
    ),
    "pretraining": Job(
        f"pretrain --images IMAGES --out OUT/vit.safetensors --workers 1 {TINY}",
        works="ray::RayTrainWorker",
        outcome=weights,
        last="vit.safetensors",
        room=450,
        asks="PUT .*/checkpoint_",
        begun=CHECKPOINT,
    ),
    "search": Job(
        f"tune --recipe RECIPE {OWN} --run OUT --trials 2 --concurrent 1 --scheduler none --epochs {EPOCHS} "
        "--search omega_1=uniform(0.5,2)",
        works="ray::RayTrainWorker",
        outcome=trials,
        last="metrics.json",
        room=300,
        asks="PUT .*/checkpoint_",
        begun=CHECKPOINT,
        early="shared",
    ),
    "training": Job(
        f"train --recipe RECIPE {OWN} --run OUT",
        works="ray::RayTrainWorker",
        outcome=decoder,
        last="metrics.json",
        begun=CHECKPOINT,
    ),
}


@dataclass(frozen=True)
class Data:
    """Images, labels, a recipe and a trained run on this machine's disk; images, labels and encoder in a bucket."""

    folder: Path
    bucket: str
    endpoint: str

    def words(self, job: Job, out: str, base: str) -> tuple[str, list[str]]:
        """Name and arguments of a command, whose places lie below `base`."""
        places = {
            "OUT": out,
            "IMAGES": storage.join(base, "images"),
            "LABELS": storage.join(base, "labels"),
            "ENCODER": storage.join(base, "encoder.safetensors"),
            "RECIPE": str(self.folder / "recipe.yaml"),
            "DECODER": str(self.folder / "decoder.safetensors"),
            "MADE": str(self.folder / "made" / "run"),
        }
        words = [re.sub("|".join(places), lambda found: places[found[0]], word) for word in job.words.split()]
        return words[0], words[1:]


_wanted: dict[str, tuple[Any, float]] = {}


def undisturbed(job: str, data: Data) -> tuple[Any, float]:
    """What a job leaves that nothing disturbs, and its seconds; made once."""
    if job not in _wanted:
        out, started = str(data.folder / f"{job}-out"), time.monotonic()
        output_of(start(job, data, out), LIMIT)
        _wanted[job] = JOBS[job].outcome(out), time.monotonic() - started
    return _wanted[job]


def start(job: str, data: Data, out: str, base: str = "", **environment: str) -> "subprocess.Popen[str]":
    name, words = data.words(JOBS[job], out, base or str(data.folder))
    return command(name, words, data.folder, **environment)


def check(job: str, data: Data, out: str) -> None:
    """What it left is what it leaves undisturbed."""
    np.testing.assert_equal(JOBS[job].outcome(out), undisturbed(job, data)[0])


def begun(job: str, out: str) -> bool:
    """Return True once there is something to go on from, for jobs that have such files."""
    return not JOBS[job].begun or any(re.search(JOBS[job].begun, uri) for uri in storage.list_files(out))


def wait_until_at_work(job: str, process: "subprocess.Popen[str]", out: str, among: int = 0) -> psutil.Process:
    """Wait for a process that does the work, and has started; it descends from `process`, or from the process `among`.

    Returns:
        That process.
    """
    until = time.monotonic() + LIMIT
    while time.monotonic() < until and process.poll() is None:
        for child in psutil.Process(among or process.pid).children(recursive=True) if begun(job, out) else ():
            try:
                line = " ".join(child.cmdline())
            except psutil.Error:
                continue
            if JOBS[job].works in line and "__init__" not in line:
                return child
        time.sleep(0.02)
    pytest.fail(f"{job} did not begin: {process.communicate()[0] if process.poll() is not None else 'too slow'}")
