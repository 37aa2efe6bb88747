"""Submit a job twice by `ray job submit` on a head started for it: the first does all the work, the second none."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.harness import history, row, write_data
from transfgu.methods import STAGES
from transfgu.runtime import capacity
from transfgu.store.artifacts import Run

pytestmark = [pytest.mark.long, pytest.mark.ray]

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
# Of a machine on which other clusters may run; beyond those that Ray gives its workers, 10002 to 19999.
PORTS = {
    "port": 26380,
    "dashboard-port": 28265,
    "dashboard-agent-listen-port": 28266,
    "ray-client-server-port": 23001,
}
TOKEN = "5" * 64
ADDRESS = f"http://127.0.0.1:{PORTS['dashboard-port']}"


def environment() -> dict[str, str]:
    """Environment variables of an activated environment without a cluster."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = {**os.environ, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    found["RAY_USAGE_STATS_ENABLED"] = "0"
    found.pop("RAY_ADDRESS", None)
    return found


@pytest.fixture
def head(ray_folder: Path) -> Iterator[None]:
    """A new local head whose dashboard answers at `ADDRESS`."""
    log = ray_folder / "head.log"
    flags = [f"--{name}={port}" for name, port in PORTS.items()]
    command = [RAY, "start", "--head", "--block", "--dashboard-host=127.0.0.1", "--num-cpus=4", *flags]
    with log.open("w") as output:
        started = subprocess.Popen(
            [*command, f"--temp-dir={ray_folder}"],
            env=environment(),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 150
        while not answers():
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "no dashboard"
            time.sleep(0.5)
        yield
    finally:
        if started.poll() is None:
            # It waits for its processes one after the other; they are all this test's.
            for process in (*psutil.Process(started.pid).children(recursive=True), started):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            started.wait(30)


def answers() -> bool:
    try:
        asked = urllib.request.Request(f"{ADDRESS}/api/version", headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(asked, timeout=5) as answer:
            return "ray_version" in answer.read().decode()
    except OSError:
        return False


def submit(recipe: Path, run: Run) -> tuple[str, float]:
    """Return the job's output and duration."""
    started = time.monotonic()
    says = json.dumps(
        {"env_vars": {capacity.NODES: "[]"}}
    )  # of its nodes, as a driver on any machine but the head must
    command = [RAY, "job", "submit", "--address", ADDRESS, "--working-dir", ".", "--runtime-env-json", says, "--"]
    command += ["python", "jobs/train.py", "--recipe", str(recipe), "--run", run.uri]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, time.monotonic() - started


@pytest.mark.usefixtures("head")
def test_jobs_submitted_to_a_fresh_head(tmp_path: Path) -> None:
    run, recipe = Run(str(tmp_path / "run")), tmp_path / "recipe.yaml"
    recipe.write_text(write_data(tmp_path).to_yaml())
    told, first = submit(recipe, run)
    assert "succeeded" in told
    metrics = json.loads(Path(run.file("metrics.json")).read_text())
    assert 0 <= metrics["mean_iou"] <= 100
    assert history(run) == [1, 2, 3, 4]
    before = {p: p.stat().st_mtime_ns for p in Path(run.uri).glob("*/*") if p.is_file()}
    told, second = submit(recipe, run)
    assert told.count("complete already") == len(STAGES)
    assert {p: p.stat().st_mtime_ns for p in Path(run.uri).glob("*/*") if p.is_file()} == before
    outcome = f"mIoU {metrics['mean_iou']:.2f}; the second does no work, {second:.0f} s"
    row("submitted, and submitted again", "whole run", outcome, first, "nothing")
