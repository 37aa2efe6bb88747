"""Faults in prediction, evaluation, pretraining and search, each by its command on a cluster of its own.

Each case is compared with the same command undisturbed: equal masks, scores, weights or trials, bit by bit.
"""

import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.commands import output_of
from tests.faults.harness import Reaper, row
from tests.faults.jobs import JOBS, LIMIT, Data, begun, check, start, undisturbed, wait_until_at_work
from tests.gateway import HANG, HANG_UP, Gateway
from transfgu.store import storage

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.s3]

OTHERS = [name for name in JOBS if name != "training"]  # whose faults other files have
OUTAGE_SECONDS, HANGING = 15.0, 2


@pytest.mark.parametrize("job", OTHERS)
def test_a_worker_that_is_killed(job: str, data: Data, tmp_path: Path) -> None:
    _, usual = undisturbed(job, data)
    started = time.monotonic()
    process = start(job, data, str(tmp_path / "out"))
    with Reaper(JOBS[job].works, lambda: begun(job, str(tmp_path / "out")), among=process.pid) as reaper:
        output_of(process, LIMIT)
    assert JOBS[job].works in reaper.killed
    check(job, data, str(tmp_path / "out"))
    row("actor or worker killed", job, "goes on by itself", time.monotonic() - started - usual, "its work in hand")


@pytest.mark.parametrize("job", ["prediction", "pretraining", "search"])  # an evaluation has nothing to go on from
def test_a_driver_that_is_killed(job: str, data: Data, tmp_path: Path) -> None:
    undisturbed(job, data)
    process = start(job, data, str(tmp_path / "out"))
    wait_until_at_work(job, process, str(tmp_path / "out"))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / JOBS[job].last).exists()
    started = time.monotonic()
    output_of(start(job, data, str(tmp_path / "out")), LIMIT)
    check(job, data, str(tmp_path / "out"))
    row("driver killed (SIGKILL)", job, "run again, it goes on", time.monotonic() - started, "its work in hand")


@pytest.mark.parametrize("job", OTHERS)
def test_a_raylet_that_is_killed(job: str, data: Data, tmp_path: Path) -> None:
    undisturbed(job, data)
    process = start(job, data, str(tmp_path / "out"))
    wait_until_at_work(job, process, str(tmp_path / "out"))
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
@pytest.mark.parametrize("job", [name for name in OTHERS if JOBS[name].asks])
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
@pytest.mark.parametrize("job", OTHERS)
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
