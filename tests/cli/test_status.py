"""The status of runs: a finished one, a stopped one, one in progress, and a folder of runs."""

import json
import shutil
from pathlib import Path

import pytest

from transfgu.cli import runs, status
from transfgu.errors import UserError
from transfgu.store.artifacts import Run
from transfgu.store.lock import hold

GOLDEN = Path(__file__).parents[1] / "golden" / "run"


@pytest.fixture
def finished(tmp_path: Path) -> Run:
    shutil.copytree(GOLDEN, tmp_path / "runs" / "done")
    return Run(str(tmp_path / "runs" / "done"))


@pytest.fixture
def stopped(tmp_path: Path) -> Run:
    shutil.copytree(GOLDEN, tmp_path / "runs" / "stopped")
    run = Run(str(tmp_path / "runs" / "stopped"))
    for stage in ("training", "evaluation"):
        Path(run.artifact(stage).file("manifest.json")).unlink()
    shutil.rmtree(run.artifact("evaluation").uri)
    Path(run.file("metrics.json")).unlink(missing_ok=True)
    Path(run.artifact("training").file("fields.json")).write_text("{}")
    return run


def test_a_finished_run_says_what_comes_next(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    status.main([finished.uri])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{finished.uri}: shapes, 10 classes, 1 epoch"
    assert [line.split()[1] for line in lines[1:7]] == ["complete:"] * 6
    assert lines[7].startswith("mIoU ")
    assert lines[8] == f"next: transfgu predict --run {finished.uri} --images IMAGES --out MASKS"
    status.main([finished.uri, "--json"])
    tree = json.loads(capsys.readouterr().out)
    assert list(tree["stages"])[-1] == "evaluation"
    assert tree["holder"] is None


def test_a_stopped_run_says_how_it_goes_on(stopped: Run) -> None:
    lines = list(status.describe(stopped))
    assert lines[5].split() == ["training", "begun"]
    assert lines[6].split() == ["evaluation", "not", "yet"]
    assert lines[7] == f"next: transfgu train --recipe {stopped.uri}/recipe.yaml --run {stopped.uri}"
    with hold(stopped.uri, print):
        assert " works on it" in list(status.describe(stopped))[7]
    assert "next:" in list(status.describe(stopped))[7]


def test_a_folder_of_runs(finished: Run, stopped: Run, tmp_path: Path) -> None:
    (tmp_path / "runs" / "no run").mkdir()
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "recipe.yaml").write_text("a: [")
    lines = runs.table(str(tmp_path / "runs")).splitlines()
    assert lines[0].split() == ["run", "preset", "classes", "epochs", "stages", "mIoU", "accuracy"]
    assert [line.split()[0] for line in lines[1:]] == ["broken", "done", "stopped"]
    assert "finished" in lines[2]
    assert "4 of 6" in lines[3]
    assert "recipe.yaml" in lines[1]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        runs.table(str(tmp_path))
    assert caught.value.code == "runs-missing"
    with pytest.raises(UserError) as caught:
        status.main([str(tmp_path)])
    assert caught.value.code == "run-missing"
