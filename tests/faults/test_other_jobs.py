"""Faults in prediction, evaluation, pretraining and search, each by its command on a cluster of its own.

Each case is compared with the same command undisturbed: equal masks, scores, weights or trials, bit by bit.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import psutil
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from tests.faults.commands import job as command
from tests.faults.commands import output_of
from tests.faults.harness import Reaper, row, write_data
from tests.gateway import HANG, HANG_UP, Gateway
from tests.made_run import make_run
from transfgu.decoder import MaskDecoder
from transfgu.recipe import from_yaml
from transfgu.search.trials import Ledger
from transfgu.store import storage

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.s3]

IMAGES = 72  # three parts
OUTAGE_SECONDS, HANGING = 15.0, 2
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
    room: int
    """Kilobytes of free space that are too few for what it writes besides `early`."""
    asks: str = ""
    """A request, method and path, that is made while it works; S3 fails for jobs that have one."""
    begun: str = ""
    """Pattern of files in OUT; a process is killed once there is one."""
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


VALUES = ("total", "peer", "diversity", "uncertainty", "mean_iou", "pixel_accuracy", "label_free")
STEPS, EPOCHS = 80, 6
OWN = "--data IMAGES --labels LABELS --encoder.weights ENCODER"  # in place of the recipe's
CHECKPOINT = "**/checkpoint_*/digests.json"
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
        room=0,
    ),
    "pretraining": Job(
        f"pretrain --images IMAGES --out OUT/vit.safetensors --workers 1 {TINY}",
        works="ray::RayTrainWorker",
        outcome=weights,
        last="vit.safetensors",
        room=450,
        begun=CHECKPOINT,
    ),
    "search": Job(
        f"tune --recipe RECIPE {OWN} --run OUT --trials 2 --concurrent 1 --scheduler none --epochs {EPOCHS} "
        "--search omega_1=uniform(0.5,2)",
        works="ray::RayTrainWorker",
        outcome=trials,
        last="metrics.json",
        room=300,
        begun=CHECKPOINT,
        early="shared",
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


@pytest.fixture(scope="module")
def data(s3_endpoint: str) -> Iterator[Data]:
    folder = Path(tempfile.mkdtemp(prefix="tf-", dir="/tmp"))
    recipe = write_data(folder, IMAGES)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    torch.manual_seed(0)
    decoder = MaskDecoder(24, recipe.classes, num_heads=3)
    safetensors.torch.save_file(decoder.state_dict(), folder / "decoder.safetensors")
    (folder / "made").mkdir()
    make_run(folder / "made")
    bucket = f"s3://transfgu-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket.removeprefix("s3://"))
    for file in (f for f in folder.rglob("*") if f.is_file() and "made" not in f.parts):
        storage.write_bytes(storage.join(bucket, str(file.relative_to(folder))), file.read_bytes())
    yield Data(folder, bucket, s3_endpoint)
    shutil.rmtree(folder)


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


def begun(job: str, out: Path) -> bool:
    """Return True once there is something to go on from, for jobs that have such files."""
    return not JOBS[job].begun or any(out.glob(JOBS[job].begun))


def wait_until_at_work(job: str, process: "subprocess.Popen[str]", out: Path) -> None:
    """Wait for a process that does the work, and has started."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until and process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True) if begun(job, out) else ():
            try:
                line = " ".join(child.cmdline())
            except psutil.Error:
                continue
            if JOBS[job].works in line and "__init__" not in line:
                return
        time.sleep(0.02)
    pytest.fail(f"{job} did not begin: {process.communicate()[0] if process.poll() is not None else 'too slow'}")


@pytest.mark.parametrize("job", JOBS)
def test_a_worker_that_is_killed(job: str, data: Data, tmp_path: Path) -> None:
    _, usual = undisturbed(job, data)
    started = time.monotonic()
    process = start(job, data, str(tmp_path / "out"))
    with Reaper(JOBS[job].works, lambda: begun(job, tmp_path / "out"), among=process.pid) as reaper:
        output_of(process, LIMIT)
    assert JOBS[job].works in reaper.killed
    check(job, data, str(tmp_path / "out"))
    row("actor or worker killed", job, "goes on by itself", time.monotonic() - started - usual, "its work in hand")


@pytest.mark.parametrize("job", ["prediction", "pretraining", "search"])  # an evaluation has nothing to go on from
def test_a_driver_that_is_killed(job: str, data: Data, tmp_path: Path) -> None:
    undisturbed(job, data)
    process = start(job, data, str(tmp_path / "out"))
    wait_until_at_work(job, process, tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / JOBS[job].last).exists()
    started = time.monotonic()
    output_of(start(job, data, str(tmp_path / "out")), LIMIT)
    check(job, data, str(tmp_path / "out"))
    row("driver killed (SIGKILL)", job, "run again, it goes on", time.monotonic() - started, "its work in hand")


@pytest.mark.parametrize("job", JOBS)
def test_a_raylet_that_is_killed(job: str, data: Data, tmp_path: Path) -> None:
    undisturbed(job, data)
    process = start(job, data, str(tmp_path / "out"))
    wait_until_at_work(job, process, tmp_path / "out")
    others = psutil.Process(process.pid).children(recursive=True)
    (raylet,) = [p for p in others if p.name() == "raylet"]
    raylet.kill()
    killed = time.monotonic()
    told, _ = process.communicate(timeout=LIMIT)
    seconds = time.monotonic() - killed
    assert process.returncode == 2, told
    assert "Ray's process raylet was killed by SIGKILL" in told.splitlines()[-1]
    assert told.splitlines()[-1].endswith("[ray-died]")
    assert "Traceback" not in told
    _, left = psutil.wait_procs(others, timeout=5)
    assert not left, [process.cmdline() for process in left]
    assert not (tmp_path / "out" / JOBS[job].last).exists()
    started = time.monotonic()
    output_of(start(job, data, str(tmp_path / "out")), LIMIT)
    check(job, data, str(tmp_path / "out"))
    row(
        "raylet killed",
        job,
        f"one line after {seconds:.1f} s; run again, it goes on",
        time.monotonic() - started,
        "its work in hand",
    )


class Fault:
    """What a gateway does to requests: `503` to one in five; `gone` and `hang` from the first that the work makes."""

    def __init__(self, kind: str, asks: str) -> None:
        self._kind, self._asks = kind, asks
        self._lock, self._count, self._since = threading.Lock(), 0, 0.0

    def __call__(self, line: str) -> int | None:
        with self._lock:
            self._count += 1
            if self._kind == "503":
                return 503 if self._count % 5 == 0 else None
            if not self._since and re.search(self._asks, line):
                self._since, self._count = time.monotonic(), 0
            if not self._since:
                return None
            if self._kind == "gone":
                return HANG_UP if time.monotonic() < self._since + OUTAGE_SECONDS else None
            return HANG if self._count < HANGING else None


@pytest.mark.parametrize("kind", ["503", "gone", "hang"])
@pytest.mark.parametrize("job", [name for name, job in JOBS.items() if job.asks])
def test_s3_that_fails(job: str, kind: str, data: Data) -> None:
    _, usual = undisturbed(job, data)
    gateway = Gateway(data.endpoint)
    gateway.fault = Fault(kind, JOBS[job].asks)
    out = storage.join(data.bucket, f"{job}-{kind}")
    started = time.monotonic()
    output_of(start(job, data, out, data.bucket, AWS_ENDPOINT_URL_S3=gateway.url), LIMIT)
    seconds = time.monotonic() - started
    gateway.close()
    assert gateway.met >= (1 if kind == "hang" else 2)
    check(job, data, out)
    what = {"503": "S3 answers 503 to one request in five", "gone": f"S3 gone for {OUTAGE_SECONDS:.0f} s"}
    fault = what.get(kind, f"S3 never answers {HANGING} requests")
    row(f"{fault}: {gateway.met} of {len(gateway.asked)}", job, "goes on by itself", seconds - usual, "those requests")


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of a certain size is mounted by root alone")
@pytest.mark.parametrize("job", JOBS)
def test_a_full_disk(job: str, data: Data, tmp_path: Path) -> None:
    undisturbed(job, data)
    disk = tmp_path / "disk"
    disk.mkdir()
    early = sum(f.stat().st_blocks // 2 for f in (data.folder / f"{job}-out" / JOBS[job].early).rglob("*"))
    room = 4 + early + JOBS[job].room
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}k", "tmpfs", str(disk)], check=True)
    try:
        (disk / "other").write_bytes(bytes(4096))
        process = start(job, data, str(disk / "out"))
        told, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == 2, told
        last = told.splitlines()[-1]
        assert last.endswith("[disk-full]"), told
        assert "Traceback" not in told
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        started = time.monotonic()
        output_of(start(job, data, str(disk / "out")), LIMIT)
        check(job, data, str(disk / "out"))
        row(
            "disk full, then room made",
            job,
            "one line; run again, it goes on",
            time.monotonic() - started,
            "the parts without masks",
        )
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
