"""Whole runs by the command, as processes of their own, whose drivers are killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import assert_same, history, row
from transfgu.artifacts import Run
from transfgu.recipe import STAGES, Recipe

pytestmark = [pytest.mark.long, pytest.mark.ray]

ROOT = Path(__file__).parents[2]


def train(recipe: Recipe, run: str, folder: Path) -> subprocess.Popen[str]:
    """`python jobs/train.py` on the recipe, on an embedded cluster of its own."""
    file = folder / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "train.py"), "--recipe", str(file), "--run", run],
        env={**os.environ, "RAY_TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def output_of(job: subprocess.Popen[str]) -> str:
    try:
        text, _ = job.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        job.kill()
        raise
    assert job.returncode == 0, text
    return text


def test_a_driver_killed_in_every_stage_and_run_again(
    undisturbed: Undisturbed, tmp_path: Path, ray_folder: Path
) -> None:
    run = Run(str(tmp_path / "run"))
    folder = Path(run.uri)

    def begun(stage: str) -> Callable[[], bool]:
        if stage in ("features", "pseudo_labels"):
            return lambda: any((folder / stage).glob("part-*"))
        if stage == "training":
            return lambda: any((folder / "ray").glob("*/checkpoint_*/digests.json"))
        return lambda: (folder / stage / "fields.json").exists()

    made: dict[Path, int] = {}
    for stage in STAGES[1:]:
        ready, started = begun(stage), time.monotonic()
        job = train(undisturbed.recipe, run.uri, ray_folder)
        while not ready() and job.poll() is None and time.monotonic() - started < 200:
            time.sleep(0.01)
        assert job.poll() is None, job.communicate()[0]
        job.send_signal(signal.SIGKILL)
        job.wait()
        assert (folder / "run.lock").exists()
        before = {p: p.stat().st_mtime_ns for p in folder.glob("*/part-*")}
        assert made.items() <= before.items()  # nothing that was there was made again
        made = before
        print(f"\ndriver killed in {stage}, {len(made)} parts there")
    started = time.monotonic()
    told = output_of(train(undisturbed.recipe, run.uri, ray_folder))
    assert "took over the lock of a run that died" in told
    seconds = time.monotonic() - started
    assert not (folder / "run.lock").exists()
    for stage in STAGES:
        assert_same(run, undisturbed.run, stage)
    assert history(run) == [1, 2, 3, 4]
    row("driver killed (SIGKILL), run again", ", ".join(STAGES[1:]), "goes on", seconds, "work in hand: no part twice")
