"""A job that works on another node of a cluster, joined by `RAY_ADDRESS`, loses the raylet of its own node."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.faults.commands import ROOT, output_of
from tests.faults.harness import row
from tests.faults.jobs import JOBS, LIMIT, Data, check, start, undisturbed, wait_until_at_work
from transfgu.store import storage

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.s3]

SECONDS = 30  # from the kill until the job and its processes on other nodes have ended


class Joined(NamedTuple):
    """A running cluster of a head, which jobs on this machine join, and a node, which does their work."""

    head: psutil.Process
    """The raylet of the head."""
    node: psutil.Process
    """The raylet of the node."""
    environment: dict[str, str]
    """Variables of a job that joins it."""

    def at_work(self) -> list[psutil.Process]:
        """Return the processes on the node that have a task or an actor of a job."""
        found = []
        for process in self.node.children(recursive=True):
            try:
                if re.match(r"ray::(?!IDLE|\w+Agent\b)", " ".join(process.cmdline())):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@contextmanager
def joined_cluster(folder: Path) -> Iterator[Joined]:
    """Run a cluster, with its sockets and logs in `folder`, during the block."""
    environment = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    running = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("joined_cluster.py"))],
        env={**os.environ, **environment, "RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdin
    assert running.stdout
    try:
        told = json.loads(running.stdout.readline())
        environment["RAY_ADDRESS"] = told["address"]
        yield Joined(psutil.Process(told["head"]), psutil.Process(told["node"]), environment)
    finally:
        running.stdin.close()
        running.wait(60)
        running.stdout.close()


@pytest.mark.parametrize("job", JOBS)
def test_the_raylet_of_its_node_is_killed(job: str, data: Data, ray_folder: Path) -> None:
    undisturbed(job, data)
    out = storage.join(data.bucket, f"{job}-joined")
    with joined_cluster(ray_folder) as cluster:
        process = start(job, data, out, data.bucket, **cluster.environment)
        wait_until_at_work(job, process, out, among=cluster.node.pid)
        others = cluster.at_work()
        assert others
        cluster.head.kill()
        killed = time.monotonic()
        told, _ = process.communicate(timeout=LIMIT)
        seconds = time.monotonic() - killed
        assert process.returncode == 2, told
        assert told.splitlines()[-1].startswith("Ray's process raylet on this machine")
        assert told.splitlines()[-1].endswith("[ray-died]")
        assert "Traceback" not in told
        assert not [uri for uri in storage.list_files(out) if uri.endswith("run.lock")]
        _, left = psutil.wait_procs(others, timeout=max(0.0, SECONDS - seconds))
        assert not left, [process.cmdline() for process in left]
        all_ended = time.monotonic() - killed
        assert not storage.exists(storage.join(out, JOBS[job].last))
    with joined_cluster(ray_folder) as cluster:
        started = time.monotonic()
        output_of(start(job, data, out, data.bucket, **cluster.environment), LIMIT)
        again = time.monotonic() - started
    check(job, data, out)
    outcome = (
        f"one line after {seconds:.1f} s, {len(others)} processes ended after {all_ended:.0f} s; run again, it goes on"
    )
    row("raylet of a joined cluster killed", job, outcome, again, "its work in progress")
