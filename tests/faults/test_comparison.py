"""A killed comparison leaves no training behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.long, pytest.mark.ray]


def trainings(folder: Path) -> list[psutil.Process]:
    """Return the processes of trainings below a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "train" in words and any(word.startswith(str(folder)) for word in words):
            found.append(process)
    return found


def test_trainings_end_with_a_killed_comparison(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "transfgu", "compare", "shapes", "--methods", "transfgu", "--seeds", "1"]
    job = subprocess.Popen([*command, "--limit", "40", "--run", str(tmp_path)], stdout=subprocess.DEVNULL)
    run = tmp_path / "transfgu" / "seed-1"
    begun = time.monotonic()
    while not (run / "features" / "fields.json").exists():
        assert job.poll() is None
        assert time.monotonic() - begun < 240
        time.sleep(0.05)
    (training,) = trainings(tmp_path)
    its = [training, *training.children(recursive=True)]
    assert len(its) > 1  # Ray's
    job.send_signal(signal.SIGKILL)
    job.wait()
    _, left = psutil.wait_procs(its, timeout=30)
    assert not left
    assert not (run / "run.lock").exists()  # it ended in order
