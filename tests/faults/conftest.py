"""Provide the undisturbed run, made once."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.harness import timed_run, write_data
from transfgu.methods import STAGES
from transfgu.recipe import Recipe
from transfgu.store.artifacts import Run


class Undisturbed(NamedTuple):
    recipe: Recipe
    run: Run
    seconds: dict[str, float]


@pytest.fixture(scope="session")
def undisturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The whole run on this machine's disk, and the seconds of each stage (the first with the start of workers)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe, run = write_data(folder), Run(str(folder / "run"))
    seconds = {stage: timed_run(recipe, run, stage) for stage in STAGES}
    print("\nundisturbed: " + ", ".join(f"{stage} {s:.0f} s" for stage, s in seconds.items()))
    return Undisturbed(recipe, run, seconds)


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Folder of Ray's logs; its path must be short, because it contains sockets."""
    folder = Path(tempfile.mkdtemp(prefix="tf-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
