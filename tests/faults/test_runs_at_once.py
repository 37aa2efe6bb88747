"""Three runs that start at the same moment on one machine, each with a Ray of its own: none disturbs another."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.faults.harness import assert_same, part_hashes, row
from transfgu.benchmarks.processes import Command, Memory
from transfgu.methods import STAGES
from transfgu.store.artifacts import Run

pytestmark = [pytest.mark.long, pytest.mark.ray]

RUNS = 3
ROOT = Path(__file__).parents[2]


def start(run: Run, folder: Path) -> Command:
    """Start `transfgu train` on twelve scenes; Ray and all others put their temporary files into `folder`."""
    words = ["shapes", "--limit", "12", "--epochs", "2", "--run", run.uri]
    places = {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(folder), "TMPDIR": str(folder)}
    return Command([sys.executable, "-m", "transfgu", "train", *words], Memory(), lambda _: None, places)


def finished(command: Command) -> None:
    """Wait for a command, and check that it succeeded and that all of its processes have ended."""
    assert command.wait() == 0, "\n".join(line.text for line in command.lines)
    deadline = time.monotonic() + 5
    while command.living() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not command.living()


def model(run: Run) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(run.file("model.safetensors"))


def test_three_runs_at_once_are_as_one_alone(tmp_path: Path, ray_folder: Path) -> None:
    alone, *together = (Run(str(tmp_path / name)) for name in ("alone", "a", "b", "c"))
    first = start(alone, ray_folder)
    finished(first)
    commands = [start(run, ray_folder) for run in together]
    for command in commands:
        finished(command)
    for run in together:
        for stage in STAGES:
            assert_same(run, alone, stage)
        np.testing.assert_equal(model(run), model(alone))
        assert not Path(run.file("run.lock")).exists()
    assert part_hashes(alone, "features")
    assert list(ray_folder.iterdir()) == []
    assert not [line.text for command in commands for line in command.lines if "took over" in line.text]
    last = max(command.seconds for command in commands)
    row(f"{RUNS} runs at once", "whole run", f"all succeed; one alone took {first.seconds:.0f} s", last, "nothing")
