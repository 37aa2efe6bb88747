"""Results computed from the trials' records, by hand."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.refusals import refused
from transfgu.cli.command_line import Parser, add_recipe, recipe_of
from transfgu.recipe import from_yaml, preset
from transfgu.search import space as search_space
from transfgu.search import trials
from transfgu.search.trials import (
    Ledger,
    Search,
    Trial,
    best,
    rank_correlation,
    ranked,
)

SHAPES = preset("shapes")


def search(
    folder: Path | str = "/nowhere", ranges: tuple[str, ...] = ("omega_1=uniform(0,10)",), **fields: Any
) -> Search:
    space = search_space.parse(ranges, SHAPES)
    given: dict[str, Any] = {"recipe": SHAPES, "uri": str(folder), "space": space, "trials": 20, **fields}
    return Search(**given)


def row(epoch: int, mean_iou: float | None, accuracy: float = 50.0, label_free: float | None = None) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "mean_iou": mean_iou,
        "pixel_accuracy": None if mean_iou is None else accuracy,
        "label_free": label_free,
        "seconds": 2.0,
    }


def trial(number: int, *values: float, status: str = "finished", omega_1: float | None = None) -> Trial:
    """Return a trial with these mIoUs, and label_free ten times as large."""
    history = [row(i + 1, v, label_free=10 * v) for i, v in enumerate(values)]
    parameters = {"training.omega_1": float(number) if omega_1 is None else omega_1}
    return Trial(number=number, parameters=parameters, epochs=4, status=status, history=history)


def test_values() -> None:
    found = Trial(number=0, parameters={}, epochs=4)
    assert found.value("mean_iou") is None
    found.history = [row(1, 40, 60, 5), row(2, 42, 50, 7), row(3, None, label_free=6)]
    assert found.value("mean_iou") == 40  # 40 + 60 > 42 + 50: that decoder is the one a run keeps
    assert found.value("label_free") == 6  # the last
    assert found.value("label_free", 2) == 7
    summary = found.summary()
    assert (summary["mean_iou"], summary["best_epoch"], summary["last_mean_iou"]) == (40, 1, None)
    assert (summary["status"], summary["epochs"], summary["seconds"]) == ("unfinished", 3, 6.0)


def test_rows_come_once() -> None:
    found = trial(0, 10, 20, status="running")
    assert not found.add(dict(found.history[0]))  # as the checkpoint has it
    assert found.repeated == 0
    assert not found.add({**found.history[1], "seconds": 9.0})  # trained again
    assert found.repeated == 1
    assert found.add(row(3, 30))
    assert [r["epoch"] for r in found.history] == [1, 2, 3]


def test_records_are_read_back(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    assert ledger.trials == {}
    for found in (trial(1, 10), trial(0, 20), trial(2, 5, status="running")):
        ledger.save(found)
    again = Ledger(str(tmp_path))
    assert again.trials == {n: ledger.trials[n] for n in (0, 1, 2)}
    assert list(again.trials) == [0, 1, 2]
    assert [t.number for t in again.unfinished()] == [2]


def test_a_record_of_constant_alpha_is_read_back(tmp_path: Path) -> None:
    """`alpha` is a shorthand of the search, not a field of the recipe."""
    ledger = Ledger(str(tmp_path))
    ledger.save(Trial(number=0, parameters={"alpha": 0.05, "training.omega_1": 2.0}, epochs=4))
    assert Ledger(str(tmp_path)).trials[0].parameters == {"alpha": 0.05, "training.omega_1": 2.0}


def test_the_winner() -> None:
    finished, stopped, failed = trial(0, 10, 11, 12, 13), trial(1, 90, status="stopped"), trial(2, 99, status="failed")
    assert best([stopped, finished, failed], "mean_iou") is finished
    assert best([stopped, failed], "mean_iou") is stopped
    assert best([failed], "mean_iou") is None
    assert [t.number for t in ranked([failed, stopped, finished, trial(3, 50)], "mean_iou")] == [3, 0, 1, 2]


def test_rank_correlation() -> None:
    # Ranks of label_free 1 2 3 4 against mIoU 1 3 2 4: 1 - 6 * 2 / (4 * 15) = 0.8
    found = [Trial(number=i, parameters={}, epochs=1, status="finished") for i in range(4)]
    for t, label_free, mean_iou in zip(found, (1.0, 2.0, 3.0, 4.0), (10.0, 30.0, 20.0, 40.0), strict=True):
        t.history = [row(1, mean_iou, label_free=label_free)]
    assert rank_correlation(found) == pytest.approx((0.8, 4))
    found[3].status = "stopped"
    assert rank_correlation(found)[1] == 3
    assert rank_correlation(found, 1) == pytest.approx((0.8, 4))
    assert rank_correlation(found[:2]) == (None, 2)
    assert rank_correlation([trial(i, 7) for i in range(5)]) == (None, 5)  # all alike


def test_what_a_search_leaves(tmp_path: Path) -> None:
    asked = search(tmp_path, ("omega_1=uniform(0,10)", "alpha=uniform(0,1)"))
    found = [
        trial(0, 30, 31, 32, 33),
        trial(1, 10, status="stopped"),
        trial(2, 20, status="running"),
        trial(3, status="failed"),
    ]
    for t in found:
        t.parameters["alpha"] = 0.25
    found[1].reason, found[3].reason, found[3].stages = "late", "out of memory: x", ["features", "concepts"]
    metrics = trials.write_results(asked, found, {"samples": {"skipped": False}})
    rows = json.loads((tmp_path / "trials.json").read_text())
    assert [r["status"] for r in rows] == ["finished", "stopped", "unfinished", "failed"]
    assert rows[0]["parameters"] == {"training.omega_1": 0.0, "alpha": 0.25}
    assert [r["epochs"] for r in rows] == [4, 1, 1, 0]
    assert rows[3]["reason"] == "out of memory: x"
    assert rows[3]["mean_iou"] is None
    recipe = from_yaml((tmp_path / "best.yaml").read_text())
    assert recipe == SHAPES.with_fields({"omega_1": 0.0, "alpha_start": 0.25, "alpha_step": 0.0, "alpha_end": 0.25})
    parser = Parser("as jobs/train.py reads it")
    add_recipe(parser)
    assert recipe_of(parser.parse(["--recipe", str(tmp_path / "best.yaml")])) == recipe
    assert metrics["epochs"] == {"trained": 6, "asked": 16}
    assert metrics["trials"] == {"finished": 1, "stopped": 1, "failed": 1, "running": 1}
    assert metrics["stages_of_single_trials"] == {"features": 1, "concepts": 1}
    lines = trials.table(asked, found)
    assert len(lines) == 5
    assert lines[0].split() == ["trial", "omega_1", "alpha", "mIoU", "label_free", "epochs", "status"]
    assert lines[1].split() == ["0", "0", "0.25", "33.00", "330.00", "4", "finished"]
    assert lines[-1].endswith("failed: out of memory: x")


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"trials": 0}, "flag-range --trials 0"),
        ({"trials": -3}, "flag-range --trials -3"),
        ({"workers_per_trial": 0}, "flag-range --workers-per-trial"),
        ({"grace": 0}, "flag-range --grace"),
        ({"reduction": 1}, "flag-range --reduction"),
        ({"concurrent": -1}, "flag-range --concurrent"),
        ({"gpus_per_trial": -0.5}, "flag-range --gpus-per-trial -0.5"),
        ({"hours": -1.0}, "flag-range --hours"),
        ({"hours": float("nan")}, "flag-range --hours"),
        ({"objective": "loss"}, "flag-invalid --objective mean_iou label_free loss"),
        ({"searcher": "bayes"}, "flag-invalid --searcher random grid tpe bayes"),
        ({"scheduler": "pbt"}, "flag-invalid --scheduler asha none pbt"),
        ({"searcher": "grid"}, "search-grid-unlisted"),
        ({"ranges": ("omega_1=grid(1,2)",)}, "search-grid-unlisted --searcher"),
        ({"recipe": preset("folder")}, "labels-missing --objective"),
    ],
)
def test_bad_requests_are_one_line(fields: dict[str, Any], refusal: str) -> None:
    with refused(refusal):
        search(**fields)


@pytest.mark.processes
def test_the_command_answers_mistakes_without_ray_and_torch() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "jobs/tune.py", "--trials", "2", "--search", "omega_9=uniform(0,1)"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert imported.isdisjoint({"ray", "torch"})
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert len(said) == 1
    assert said[0].endswith(" [field-unknown]")
