"""Whole runs by the command, as separate processes whose drivers are killed."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.commands import output_of, train
from tests.faults.conftest import Undisturbed
from tests.faults.harness import assert_same, history, row
from transfgu.methods import STAGES
from transfgu.store.artifacts import Run

pytestmark = [pytest.mark.long, pytest.mark.ray]


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
