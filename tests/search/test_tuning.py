"""Ray Tune's searcher and scheduler with a search's records, by hand and without a cluster."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.cloudpickle

from tests.refusals import refused
from tests.search.test_trials import SHAPES, row, search, trial
from transfgu.runtime.progress import Progress
from transfgu.search.trials import Ledger, Search, Trial
from transfgu.search.tuning import Proposals, Recorder


def ledger_of(folder: Path, *trials: Trial) -> Ledger:
    ledger = Ledger(str(folder))
    for one in trials:
        ledger.save(one)
    return ledger


def recorder(asked: Search, ledger: Ledger) -> Recorder:
    return Recorder(asked, ledger, Progress("search", quiet=True))


def tell(told: Recorder, number: int, result: dict[str, Any]) -> str:
    return told.on_trial_result(None, SimpleNamespace(config={"number": number}), result)


def epoch(told: Recorder, number: int, n: int, mean_iou: float | None) -> None:
    assert tell(told, number, {"row": json.dumps(row(n, mean_iou))}) == "CONTINUE"  # a trial ends by itself


def status(folder: Path, number: int) -> str:
    return Ledger.read(str(folder), number).status


def test_asha_compares_at_its_rungs(tmp_path: Path) -> None:
    """Reduction 2: after epochs 1 and 2 a trial continues if it reaches the median of those before it."""
    asked = search(tmp_path, reduction=2)
    ledger = ledger_of(tmp_path, *(trial(n, status="running") for n in range(5)))
    told = recorder(asked, ledger)
    epoch(told, 0, 1, 10.0)  # the first always goes on
    epoch(told, 1, 1, 20.0)
    epoch(told, 2, 1, 14.0)  # median of 10 and 20: 15
    assert [status(tmp_path, n) for n in range(3)] == ["running", "running", "stopped"]
    assert Ledger.read(str(tmp_path), 2).reason == "not among the best 1/2 after epoch 1"
    epoch(told, 3, 1, 14.0)  # median of 10, 14, 20: not below
    epoch(told, 0, 2, 30.0)
    epoch(told, 1, 2, 25.0)  # below 30
    assert [status(tmp_path, n) for n in (0, 1, 3)] == ["running", "stopped", "running"]
    epoch(told, 0, 3, 1.0)  # no rung
    epoch(told, 4, 1, None)  # nothing was scored
    assert [status(tmp_path, n) for n in (0, 4)] == ["running", "running"]


def test_the_last_epoch_stops_no_trial_and_none_stops_without_asha(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, trial(0, 30, 31, 32, 33), trial(1, 1, 1, 1, status="running"))
    epoch(recorder(search(tmp_path, reduction=2), ledger), 1, 4, 1.0)
    assert status(tmp_path, 1) == "running"
    ledger = ledger_of(tmp_path, trial(2, status="running"))
    epoch(recorder(search(tmp_path, scheduler="none"), ledger), 2, 1, 0.0)
    assert status(tmp_path, 2) == "running"


def test_asha_goes_on_from_the_records(tmp_path: Path) -> None:
    records = [trial(0, 30, 31), trial(1, 10, status="stopped"), trial(2, 20, status="running")]
    ledger = ledger_of(tmp_path, *records, trial(3, status="running"))
    told = recorder(search(tmp_path, reduction=4), ledger)
    epoch(told, 3, 1, 24.0)  # three quarters of 10, 20, 30 lie below 25
    assert status(tmp_path, 3) == "stopped"
    epoch(told, 2, 1, 20.0)  # an epoch that is known already
    epoch(told, 2, 2, 5.0)  # no rung at a reduction of 4
    assert status(tmp_path, 2) == "running"
    epoch(told, 2, 3, 5.0)
    epoch(told, 2, 4, 40.0)
    assert status(tmp_path, 2) == "running"


def test_how_a_trial_ends(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, *(trial(n, 20, status="running") for n in range(3)), trial(3, 1, status="stopped"))
    told = recorder(search(tmp_path), ledger)
    tell(told, 0, {"end": json.dumps({"reason": "", "code": "", "stages": ["concepts"]})})
    tell(told, 1, {"end": json.dumps({"reason": "out of memory", "code": "", "stages": []})})
    told.on_trial_error(None, SimpleNamespace(config={"number": 2}, get_error=lambda: None))
    tell(told, 3, {"end": json.dumps({"reason": "", "code": "", "stages": []})})  # what ended it first stays
    read = [Ledger.read(str(tmp_path), n) for n in range(4)]
    assert [t.status for t in read] == ["finished", "failed", "failed", "stopped"]
    assert read[0].stages == ["concepts"]
    assert read[1].reason == "out of memory"
    assert "its process was lost" in read[2].reason


@pytest.mark.parametrize("code", ["disk-full", "storage-failed"])
def test_a_trial_whose_storage_fails_stays_unfinished_and_no_other_starts(tmp_path: Path, code: str) -> None:
    ledger = ledger_of(tmp_path, trial(0, 20, status="running"), trial(1, 1, status="stopped"))
    told, proposals = recorder(search(tmp_path), ledger), Proposals(search(tmp_path), ledger)
    tell(told, 1, {"end": json.dumps({"reason": "no space", "code": code, "stages": []})})  # it had ended before
    assert ledger.storage_error is None
    tell(told, 0, {"end": json.dumps({"reason": "no space", "code": code, "stages": []})})
    assert [status(tmp_path, n) for n in range(2)] == ["running", "stopped"]
    assert ledger.storage_error is not None
    assert ledger.storage_error.line == f"no space [{code}]"
    assert proposals.suggest("trial") == Proposals.FINISHED
    again = Proposals(search(tmp_path), Ledger(str(tmp_path)))
    assert again.suggest("trial")["number"] == 0


def test_a_record_that_cannot_be_written_is_known_as_failed_storage(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    (tmp_path / "trials").write_text("no folder")
    with refused("storage-failed"):
        ledger.save(trial(0, status="running"))
    assert ledger.storage_error is not None
    assert ledger.storage_error.code == "storage-failed"


def proposed(proposals: Proposals, count: int) -> list[Any]:
    return [proposals.suggest(f"trial {i}") for i in range(count)]


def test_a_random_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    asked = search(tmp_path, trials=4)
    drawn = [asked.space.draw(SHAPES.seed, n) for n in range(4)]
    alone = proposed(Proposals(asked, Ledger(str(tmp_path))), 5)
    assert alone == [*({"number": n, "parameters": drawn[n]} for n in range(4)), Proposals.FINISHED]
    ledger = Ledger(str(tmp_path))
    assert [(t.parameters, t.status, t.epochs) for t in ledger.trials.values()] == [
        (values, "running", SHAPES.training.epochs) for values in drawn
    ]
    for number in (0, 2):
        ledger.trials[number].status = "finished"
    more = proposed(Proposals(search(tmp_path, trials=5), ledger), 4)
    assert [m["number"] for m in more[:3]] == [1, 3, 4]  # first those that were begun
    assert more[2]["parameters"] == asked.space.draw(SHAPES.seed, 4)
    assert more[3] == Proposals.FINISHED


def test_a_grid_ends(tmp_path: Path) -> None:
    asked = search(tmp_path, ("omega_1=grid(1,2,3)",), searcher="grid")
    found = proposed(Proposals(asked, ledger_of(tmp_path, trial(0, 1, omega_1=1))), 3)
    assert [f["parameters"] for f in found[:2]] == [{"training.omega_1": 2}, {"training.omega_1": 3}]
    assert found[2] == Proposals.FINISHED


def test_tpe_goes_where_trials_did_well(tmp_path: Path) -> None:
    asked = search(
        tmp_path, ("omega_1=uniform(0,10)", "passes=randint(1,3)", "lr=choice(0.1,0.2)"), searcher="tpe", trials=40
    )
    for number in range(30):
        known = trial(number, 0.0)
        known.parameters = asked.space.draw(3, number)
        known.history = [row(1, 50 - 4 * abs(known.parameters["training.omega_1"] - 2))]
        ledger = ledger_of(tmp_path, known)
    ledger = Ledger(str(tmp_path))
    ledger.trials[3].status, ledger.trials[4].status = "failed", "stopped"
    ledger.trials[6].history = []  # finished, and never scored
    proposals = Proposals(asked, ledger)
    found = []
    for n in range(6):
        parameters = proposals.suggest(str(n))["parameters"]
        assert type(parameters["training.passes"]) is int
        assert parameters["training.lr"] in (0.1, 0.2)
        found.append(parameters["training.omega_1"])
        value = 50 - 4 * abs(found[-1] - 2)
        proposals.on_trial_result(str(n), {"value": value, "training_iteration": 1})
        proposals.on_trial_complete(str(n), {"value": value})
    assert sum(abs(value - 2) < 2.5 for value in found) >= 4  # a uniform draw hits that half of the time


def test_tune_can_keep_both(tmp_path: Path) -> None:
    """Tune writes its searcher and its scheduler to its own folder when it starts."""
    ledger = ledger_of(tmp_path, trial(0, 30, 31))
    asked = search(tmp_path)
    for kept in (Proposals(asked, ledger), recorder(asked, ledger)):
        assert type(ray.cloudpickle.loads(ray.cloudpickle.dumps(kept))) is type(kept)


@pytest.mark.parametrize("reason", ["", "out of memory"])
def test_a_trial_without_a_score_is_told(tmp_path: Path, reason: str) -> None:
    proposals = Proposals(search(tmp_path, trials=2), Ledger(str(tmp_path)))
    proposals.suggest("a")
    proposals.on_trial_result("a", {"value": float("nan"), "training_iteration": 1, "reason": reason})
    proposals.on_trial_complete("a", {"value": float("nan")})
    assert proposals.suggest("b")["number"] == 1
