"""Processes that end with their parent, even if it is killed."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from transfgu.runtime import stopping

CHILD = """
import sys, time
from pathlib import Path
from transfgu.runtime import stopping
stopping.install()
stopping.at_end(lambda: Path(sys.argv[1]).write_text("in order"))
print("ready", flush=True)
time.sleep(120)
"""
PARENT = """
import os, signal, subprocess, sys
from transfgu.runtime import stopping
child = stopping.start_tied(sys.argv[1:], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
if "killed" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.processes
@pytest.mark.parametrize("end", ["killed", "exits"])
def test_a_tied_process_ends_with_its_parent(tmp_path: Path, end: str) -> None:
    ended = tmp_path / "ended"
    command = [sys.executable, "-c", PARENT, sys.executable, "-c", CHILD, str(ended), end]
    parent = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    assert (parent.returncode == -9) == (end == "killed")
    child, begun = int(parent.stdout), time.monotonic()
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - begun < 30
        time.sleep(0.05)
    assert ended.read_text() == "in order"


@pytest.mark.processes
def test_a_tied_process_runs_while_its_parent_does() -> None:
    code = "import os; from transfgu.runtime import stopping; stopping.install(); print('STDIN' in str(os.environ))"
    child = stopping.start_tied([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout
    assert child.stdout.read() == "False\n"  # not handed on to processes that it starts
    assert child.wait(60) == 0
