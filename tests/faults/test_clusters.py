"""Clusters that change during a run: nodes removed and added in every stage, and Ray's autoscaler."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import assert_same, history, row, timed_run, write_data
from tests.faults.s3_copies import fetched, on_s3
from transfgu.methods import STAGES
from transfgu.recipe import Recipe
from transfgu.store import storage
from transfgu.store.artifacts import Run

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.s3]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def slow(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Like `undisturbed`, with a training long enough for a new node: Ray checks for new ones every 20 s."""
    folder = tmp_path_factory.mktemp("slow")
    sizes = {"dataset.image_size": (128, 128), "dataset.training_size": (192, 192)}
    recipe, run = write_data(folder).with_fields({**sizes, "epochs": 8, "passes": 2}), Run(str(folder / "run"))
    seconds = {stage: timed_run(recipe, run, stage) for stage in STAGES}
    print("\nundisturbed: " + ", ".join(f"{stage} {s:.0f} s" for stage, s in seconds.items()))
    return Undisturbed(recipe, run, seconds)


def on_a_cluster_of_its_own(command: list[str], folder: Path, seconds: float) -> str:
    """Return the output of a process that starts Ray nodes in its own process namespace, because nodes outlive it.

    They use the loopback device only, as on systems without Ray clusters.
    """
    settings = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_TMPDIR": str(folder),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *command],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def changed(same: Undisturbed, tmp_path: Path, ray_folder: Path, s3: str, how: str) -> tuple[Run, dict[str, Any]]:
    """A whole run with a change of the cluster in every stage, and the record of each."""
    file = tmp_path / "recipe.yaml"
    file.write_text(on_s3(same.recipe, s3).with_fields({"resize_seconds": 5.0}).to_yaml())
    script = [sys.executable, str(Path(__file__).parent / "changing_cluster.py")]
    told = on_a_cluster_of_its_own([*script, str(file), storage.join(s3, "run"), how], ray_folder, 400)
    print(told)
    run = fetched(s3, tmp_path / "run")
    for stage in STAGES:
        assert_same(run, same.run, stage)
    assert history(run) == [*range(1, same.recipe.training.epochs + 1)]
    return run, json.loads(told.splitlines()[-1])


@pytest.mark.skipif(os.geteuid() != 0, reason="a process table is given by root alone")
def test_a_node_removed_in_every_stage(undisturbed: Undisturbed, tmp_path: Path, ray_folder: Path, s3: str) -> None:
    run, told = changed(undisturbed, tmp_path, ray_folder, s3, "removed")
    workers = history(run, "workers")
    assert (workers[0], workers[-1]) == (2, 1)
    repeated = {
        "concepts": "reading the features",
        "training": f"the epoch in progress; workers by epoch: {workers}",
        "evaluation": "the batch in progress",
    }
    for stage, what in told.items():
        lost = what["seconds"] - undisturbed.seconds[stage]
        row("node removed", stage, "continues by itself", lost, repeated.get(stage, "the parts in progress"))


@pytest.mark.skipif(os.geteuid() != 0, reason="a process table is given by root alone")
def test_nodes_added_in_every_stage(slow: Undisturbed, tmp_path: Path, ray_folder: Path, s3: str) -> None:
    run, told = changed(slow, tmp_path, ray_folder, s3, "added")
    workers = history(run, "workers")
    assert (workers[0], workers[-1]) == (1, 2)
    for stage, what in told.items():
        lost = what["seconds"] - slow.seconds[stage]
        outcome, repeated = "waits for it, then goes on", "none"
        if stage == "training":
            outcome, repeated = "goes on with both", f"the epoch in progress; workers by epoch: {workers}"
        row("node added", stage, outcome, lost, repeated)


def simulated(recipe: Recipe, folder: Path, run: str, *arguments: str) -> list[int]:
    """Train on a simulated cluster; returns the number of GPU nodes at every change."""
    file = folder / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    job = [sys.executable, str(ROOT / "jobs" / "train.py"), "--recipe", str(file), "--run", run, *arguments]
    done = subprocess.run(
        [sys.executable, str(ROOT / "cluster" / "simulated.py"), "--", *job],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [int(n) for n in re.findall(r"GPU nodes: (\d+)", done.stderr)]


def test_a_cluster_that_scales_from_nothing_and_back(undisturbed: Undisturbed, tmp_path: Path, s3: str) -> None:
    recipe, uri = on_s3(undisturbed.recipe, s3), storage.join(s3, "run")
    for arguments in (["--until", "features"], []):
        nodes = simulated(recipe, tmp_path, uri, *arguments)
        assert (nodes[0], nodes[-1]) == (0, 0)
        assert max(nodes) > 0
        row("autoscaled", "to features" if arguments else "the rest", f"GPU nodes: {nodes}", None, "none")
    run = fetched(s3, tmp_path / "run")
    for stage in STAGES:
        assert_same(run, undisturbed.run, stage)
