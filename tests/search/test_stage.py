"""Searches on a real cluster: shared stages are computed once, killed searches continue, failures are reported."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from tests.folder_run import photographs, small
from tests.refusals import refused
from transfgu.errors import counted
from transfgu.methods import STAGES
from transfgu.recipe import from_yaml, preset
from transfgu.report.search import write
from transfgu.runtime import capacity
from transfgu.runtime.progress import Progress
from transfgu.search import space as search_space
from transfgu.search import stage as stage
from transfgu.search.stage import SharedRun, allot, run_search
from transfgu.search.trials import Ledger, Search
from transfgu.search.tuning import reported
from transfgu.store import lock

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]


def search(folder: Path, *ranges: str, **fields: Any) -> Search:
    """A search over a folder of six small photographs."""
    own: dict[str, Any] = {name: fields.pop(name) for name in list(fields) if name not in Search.__dataclass_fields__}
    if not (folder / "images").exists():
        photographs(folder)
    own = {"teacher_start": 1, "teacher_every": (1,), **own}
    recipe = small(folder, **own)
    space = search_space.parse(ranges, recipe)
    given: dict[str, Any] = {"recipe": recipe, "uri": str(folder / "search"), "space": space, "trials": 3}
    return Search(**{**given, "concurrent": 2, **fields})


def asked(trials: int = 20, **fields: Any) -> Search:
    recipe = preset("shapes")
    space = search_space.parse(["omega_1=uniform(0,1)"], recipe)
    return Search(recipe=recipe, uri="/nowhere", space=space, trials=trials, **fields)


def test_a_whole_cpu_stays_free_for_decoding() -> None:
    two = allot([{"CPU": 4.0}], asked())
    assert (two.concurrent, two.compute.workers, two.compute.cpus_per_actor) == (2, 1, 1.0)
    for count in (1, 2, 3, 4, 7):
        for workers in (1, 2):
            for nodes in ([{"CPU": 4.0}], [{"CPU": 2.0}], [{"CPU": 8.0}, {"CPU": 4.0}, {"CPU": 2.0}]):
                found = allot(nodes, asked(concurrent=count, workers_per_trial=workers))
                assert found.concurrent == count
                held = count * (0.1 + workers * found.compute.cpus_per_actor)
                # However it is spread, one node has a whole CPU left: else all would have less than one.
                assert held <= sum(node["CPU"] for node in nodes) - len(nodes) + 1e-9
    assert allot([{"CPU": 4.0}], asked(trials=1)).concurrent == 1
    with refused("cluster-too-small 2"):
        allot([{"CPU": 2.0}], asked(concurrent=20))


def test_gpus_are_divided() -> None:
    node = {"CPU": 16.0, "GPU": 4.0}
    half = allot([node, node], asked(gpus_per_trial=0.5))
    assert (half.concurrent, half.compute.gpus_per_actor, half.beside) == (16, 0.5, 8)
    pair = allot([node, node], asked(gpus_per_trial=1.0, workers_per_trial=2))
    assert (pair.concurrent, pair.compute.workers, pair.compute.gpus_per_actor) == (8, 2, 0.5)
    assert allot([node, node], asked()).concurrent == 8  # a GPU each
    assert allot([node, node], asked(gpus_per_trial=2.0, workers_per_trial=2, concurrent=3)).concurrent == 3
    with refused("cluster-too-small 2 8"):
        allot([node, node], asked(gpus_per_trial=16.0, workers_per_trial=2))
    with refused("gpu-missing --gpus-per-trial"):
        allot([{"CPU": 4.0}], asked(gpus_per_trial=0.5))


def test_nodes_with_gpus_read_for_themselves() -> None:
    """Otherwise the first nodes, full of workers, would wait for the last ones."""
    nodes = [*[{"CPU": 4.0, "GPU": 1.0}] * 8, {"CPU": 64.0}]
    four = allot(nodes, asked(trials=50, gpus_per_trial=0.25))
    # Three CPUs for four workers, and a tenth for each one's trial; in all there were (96 - 9) / 32 for each.
    assert (four.concurrent, four.compute.cpus_per_actor) == (32, 0.65)
    assert allot(nodes, asked(trials=50, gpus_per_trial=0.5)).compute.cpus_per_actor == 1.0  # 3 for two
    assert allot(nodes, asked(trials=1, gpus_per_trial=0.25)).compute.cpus_per_actor == 1.0  # 3 for one
    # Where a node has no other CPU, others read for it.
    assert allot([{"CPU": 1.0, "GPU": 1.0}, {"CPU": 8.0}], asked()).compute.cpus_per_actor == 1.0


@pytest.mark.s3
@pytest.mark.usefixtures("ray_cluster")
def test_trials_are_for_nodes_that_may_come(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(capacity.NODES, '[{"count": 2, "CPU": 4, "GPU": 1}]')
    wanted = search(tmp_path, "omega_1=uniform(0,1)", uri=s3, gpus_per_trial=4.0, workers_per_trial=4)
    with refused("cluster-too-small 4 1 2"):
        stage.run(wanted, Progress("search", quiet=True), quiet=True)


def test_recipes_share_what_they_have_in_common(tmp_path: Path) -> None:
    recipe = preset("shapes")
    one = SharedRun(str(tmp_path), recipe)
    other = SharedRun(str(tmp_path), recipe.with_fields({"omega_1": 7.0, "smoothing": 5}))
    same = [s for s in STAGES if one.artifact(s) == other.artifact(s)]
    assert same == ["samples", "features", "concepts"]


@pytest.mark.ci_long
@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_a_small_search(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = search(tmp_path, "omega_1=loguniform(0.1,10)", "alpha=uniform(0,0.1)", epochs=2, searcher="tpe")
    metrics = run_search(wanted, report=write, quiet=True)
    rows = json.loads((tmp_path / "search" / "trials.json").read_text())
    assert [r["number"] for r in rows] == [0, 1, 2]
    assert {r["status"] for r in rows} <= {"finished", "stopped"}
    assert "finished" in {r["status"] for r in rows}  # the first at a rung goes on
    assert all(r["epochs"] == (2 if r["status"] == "finished" else 1) for r in rows)
    assert all(0 <= r["mean_iou"] <= 100 and 0 <= r["label_free"] <= 100 for r in rows)
    assert metrics["epochs"]["trained"] == sum(r["epochs"] for r in rows)
    assert [s for s, found in metrics["stages"].items() if not found["skipped"]] == list(stage.upstream(wanted.recipe))
    assert all(r["stages"] == [] for r in rows)
    assert sorted(p.name.rpartition("-")[0] for p in (tmp_path / "search" / "shared").iterdir()) == sorted(
        stage.upstream(wanted.recipe)
    )
    best = from_yaml((tmp_path / "search" / "best.yaml").read_text())
    assert best.training.omega_1 == metrics["best"]["parameters"]["training.omega_1"]
    assert best.training.alpha_step == 0
    assert "parallel" in (tmp_path / "search" / "report.html").read_text()
    assert not list((tmp_path / "search").rglob("*.pkl"))

    # Another search in that folder is refused; the same one does nothing twice, and a longer one adds to it.
    with refused("search-mismatch training.lr"):
        run_search(dataclasses.replace(wanted, recipe=wanted.recipe.with_fields({"lr": 0.5})), quiet=True)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "search" / "trials").iterdir()}
    again = run_search(wanted, quiet=True)
    assert all(found["skipped"] for found in again["stages"].values())
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "search" / "trials").iterdir()} == before
    assert again["best"] == metrics["best"]

    # Whose folder was taken over meanwhile writes no results.
    results = (tmp_path / "search" / "trials.json").stat().st_mtime_ns
    run = stage.run

    def run_and_lose(*args: Any, **fields: Any) -> stage.Found:
        found = run(*args, **fields)
        (tmp_path / "search" / lock.FILE).write_text('{"id": "other"}')
        return found

    monkeypatch.setattr(stage, "run", run_and_lose)
    with refused("run-taken"):
        run_search(wanted, quiet=True)
    assert (tmp_path / "search" / "trials.json").stat().st_mtime_ns == results


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_trials_that_are_stopped_give_back_what_they_held(tmp_path: Path) -> None:
    """Each trial is compared with those that have finished their first epoch, and not all can be the best so far."""
    rates = "lr=grid(0.003,0.001,0.0001,0.00001,0.000001)"
    run_search(search(tmp_path, rates, epochs=2, trials=5, searcher="grid"), quiet=True)
    trials = Ledger(str(tmp_path / "search")).trials.values()
    assert {t.status for t in trials} == {"finished", "stopped"}
    assert all(len(t.history) == (2 if t.status == "finished" else 1) for t in trials)
    best = max(reported(t, "mean_iou", 1) for t in trials)
    assert all(reported(t, "mean_iou", 1) < best for t in trials if t.status == "stopped")
    end = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < end, ray.available_resources()
        time.sleep(0.2)


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_what_is_searched_upstream_is_made_once_for_each_value(tmp_path: Path) -> None:
    wanted = search(
        tmp_path, "stuff=grid(2,3)", "omega_1=grid(0.5,1)", epochs=1, searcher="grid", trials=9, objective="label_free"
    )
    metrics = run_search(wanted, quiet=True)
    rows = json.loads((tmp_path / "search" / "trials.json").read_text())
    assert [tuple(r["parameters"].values()) for r in rows] == [(2, 0.5), (2, 1), (3, 0.5), (3, 1)]
    assert {r["status"] for r in rows} == {"finished"}
    assert set(metrics["stages"]) == {"samples", "features"}
    assert metrics["stages_of_single_trials"] == {"concepts": 2, "pseudo_labels": 2}


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("stuff=grid(2,5000)", "5000 concepts are too many for"),  # raises
        ("passes=grid(1,1000000000000)", "out of memory: "),  # a permutation of 48 TB
        ("lr=grid(0.001,1e30)", "training diverged: loss "),
    ],
)
def test_a_trial_that_fails_is_told_and_the_search_goes_on(tmp_path: Path, bad: str, reason: str) -> None:
    # Two steps an epoch: each epoch has a new student here, and a step's harm shows in the next one.
    grid: dict[str, Any] = {"searcher": "grid", "scheduler": "none", "trials": 4}
    wanted = search(tmp_path, bad, "omega_2=grid(0.3,0.4)", epochs=2, passes=2, **grid)
    metrics = run_search(wanted, report=write, quiet=True)
    rows = json.loads((tmp_path / "search" / "trials.json").read_text())
    assert [r["status"] for r in rows] == ["finished", "finished", "failed", "failed"]
    for row in rows[2:]:
        assert reason in row["reason"]
        assert "\n" not in row["reason"]
    assert metrics["best"]["number"] in (0, 1)
    assert reason in (tmp_path / "search" / "report.html").read_text().replace("&#39;", "'")


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 200.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.long
def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    photographs(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(small(tmp_path, epochs=4, passes=120).to_yaml())
    command = [sys.executable, "jobs/tune.py", "--recipe", str(recipe), "--run", str(tmp_path / "search")]
    command += ["--trials", "4", "--concurrent", "2", "--scheduler", "none", "--search", "omega_1=uniform(0.5,2)"]

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def records() -> Ledger:
        return Ledger(str(tmp_path / "search"))

    def midway() -> bool:
        found = records()
        ended = [t for t in found.trials.values() if t.status == "finished"]
        return bool(ended) and any(len(t.history) >= 2 for t in found.unfinished())

    process = start()
    children: list[psutil.Process] = []
    try:
        wait_for(midway, process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        psutil.wait_procs(children, timeout=20)
        for child in children:
            if child.is_running():
                child.kill()
    killed = records()
    ended = {n: t for n, t in killed.trials.items() if t.status == "finished"}
    begun = {t.number: t for t in killed.unfinished()}
    assert ended
    assert begun
    files = {n: (tmp_path / "search" / "trials" / f"{n:04d}.json").stat().st_mtime_ns for n in ended}

    process = start()
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output
    final = records().trials
    assert sorted(final) == [0, 1, 2, 3]
    assert {t.status for t in final.values()} == {"finished"}
    for number, trial in ended.items():  # kept, not touched
        assert final[number] == trial
        assert (tmp_path / "search" / "trials" / f"{number:04d}.json").stat().st_mtime_ns == files[number]
    for number, trial in begun.items():  # gone on from the checkpoint: what was trained before is as it was
        assert final[number].parameters == trial.parameters
        assert final[number].history[: len(trial.history)] == trial.history
        # The last epoch's checkpoint may not have been written yet; the one before it was.
        assert final[number].repeated <= 1
        assert final[number].repeated < max(2, len(trial.history))
    for trial in final.values():
        assert [row["epoch"] for row in trial.history] == [1, 2, 3, 4]
    assert len({t.parameters["training.omega_1"] for t in final.values()}) == 4
    assert f"{counted(4 - len(ended), 'trial')} to go, 2 at a time" in output


SCRIPT = """
import sys
import ray
from pathlib import Path
sys.path.insert(0, {root!r})
from transfgu.runtime import connect
for name, value in connect.ENVIRONMENT.items():
    __import__("os").environ.setdefault(name, value)
ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False,
         runtime_env={{"env_vars": {{**connect.ENVIRONMENT, "PYTHONPATH": {root!r}}}}})
from tests.search.test_stage import search
from transfgu.search.stage import run_search
run_search(search(Path({folder!r}), "omega_1=uniform(0.5,2)", epochs=2, scheduler="none", trials=3,
                           gpus_per_trial=0.5, workers_per_trial=2))
"""


@pytest.mark.long
def test_two_workers_a_trial_half_a_gpu_and_hardly_a_cpu(tmp_path: Path) -> None:
    """One of the two CPUs stays free, so two trials of two workers share the other one."""
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(SCRIPT.format(root=str(ROOT), folder=str(tmp_path))))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRANSFGU_DEVICE": "cpu"}  # the GPU is declared, not there
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 trials to go, 2 at a time" in done.stderr
    rows = json.loads((tmp_path / "search" / "trials.json").read_text())
    assert [(r["status"], r["epochs"]) for r in rows] == [("finished", 2)] * 3


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_time_runs_out_and_the_same_search_goes_on(tmp_path: Path) -> None:
    wanted = search(tmp_path, "omega_1=uniform(0.5,2)", epochs=2, scheduler="none", trials=2)
    stage.prepare(wanted.recipe, wanted.uri)
    early = stage.run(dataclasses.replace(wanted, hours=5 / 3600), Progress("search", quiet=True), quiet=True)
    assert [t.status for t in early.trials].count("finished") < 2
    late = stage.run(wanted, Progress("search", quiet=True), quiet=True)
    assert [(t.number, t.status, len(t.history)) for t in late.trials] == [(0, "finished", 2), (1, "finished", 2)]
