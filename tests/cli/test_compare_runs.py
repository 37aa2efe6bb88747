"""Runs side by side: the settings that differ, scores, classes, seconds."""

import json
import shutil
from pathlib import Path

import pytest

from tests.refusals import refused
from transfgu.cli import compare, compare_runs
from transfgu.store.artifacts import Run

GOLDEN = Path(__file__).parents[1] / "golden" / "run"


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """The golden run, and a copy with two more things, another score of two classes, and its own features."""
    found = [Run(str(tmp_path / name)) for name in ("a", "b")]
    for run in found:
        shutil.copytree(GOLDEN, run.uri)
    recipe = Path(found[1].file("recipe.yaml"))
    recipe.write_text(found[1].recipe().with_fields({"things": 8, "track": "none"}).to_yaml())
    metrics = json.loads(Path(found[0].file("metrics.json")).read_text())
    for run, score, classes in zip(
        found, (50.0, 52.5), ({"star": 10.0, "sky": None}, {"star": 8.0, "cow": 3.0}), strict=True
    ):
        Path(run.file("metrics.json")).write_text(json.dumps({**metrics, "mean_iou": score, "iou": classes}))
    links = {"format": 2, "stages": {"features": found[0].file("features")}}
    Path(found[1].file("reused.json")).write_text(json.dumps(links))
    return found


def test_what_differs_is_named(runs: list[Run]) -> None:
    found = compare_runs.compared(runs)
    assert found["recipe"] == {"concepts.things": [6, 8]}  # where it ran changes no result
    assert found["scores"]["mIoU, %"] == [50.0, 52.5]
    assert found["classes"] == {"star": [10.0, 8.0], "sky": [None, None], "cow": [None, 3.0]}
    assert found["reused"] == [[], ["features"]]
    assert list(found["seconds"]) == list(runs[0].recipe().stages)


def test_the_command_takes_runs_in_place_of_a_preset(runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    compare.main([run.uri for run in runs])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"A  {runs[0].uri}", f"B  {runs[1].uri}"]
    table = {line.strip().rpartition("  ")[0].split("  ")[0]: line.split() for line in lines[3:]}
    assert lines[2].split() == ["A", "B", "B", "-", "A"]
    assert "concepts.things" in lines[4]
    assert lines[4].split() == ["concepts.things", "6", "8"]
    assert table["mIoU, %"][-3:] == ["50.00", "52.50", "+2.50"]
    assert table["star"] == ["star", "10.00", "8.00", "-2.00"]
    features = next(line.split() for line in lines if line.strip().startswith("features"))
    assert features[2] == features[1] + "*"
    compare.main([*(run.uri for run in runs), "--json"])
    assert json.loads(capsys.readouterr().out) == compare_runs.compared(runs)


def test_the_same_run_and_three(runs: list[Run]) -> None:
    lines = compare_runs.lines(compare_runs.compared([runs[0], runs[0]]))
    assert "no setting differs" in lines
    assert compare_runs.lines(compare_runs.compared([*runs, runs[0]]))[3].split() == ["A", "B", "C"]


def test_a_folder_without_a_run(runs: list[Run], tmp_path: Path) -> None:
    with refused("run-missing nothing"):
        compare.main([runs[0].uri, str(tmp_path / "nothing")])
