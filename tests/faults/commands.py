"""Start commands as separate processes, as users do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from transfgu.recipe import Recipe

ROOT = Path(__file__).parents[2]


def train(recipe: Recipe, run: str, folder: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    """Start `python jobs/train.py` on the recipe, on its own embedded cluster, with logs in `folder`."""
    file = folder / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    return job("train", ["--recipe", str(file), "--run", run, *flags], folder, **environment)


def job(name: str, arguments: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Start `python jobs/NAME.py` on its own embedded cluster, with logs in `folder`."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments],
        env={**os.environ, "RAY_TMPDIR": str(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def output_of(job: subprocess.Popen[str], seconds: float = 240) -> str:
    """Return the output of a process that ended with success."""
    try:
        told, _ = job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        job.kill()
        pytest.fail(f"still running after {seconds:.0f} s:\n{job.communicate()[0]}")
    assert job.returncode == 0, told
    return told
