"""Stages taken from another run: the longest sequence of first stages that both recipes share, and no others."""

import json
import time
from pathlib import Path

import pytest

from tests.refusals import refused
from transfgu.methods import STAGES
from transfgu.recipe import Recipe, preset
from transfgu.store import reuse
from transfgu.store.artifacts import REUSED, Outcome, Run

RECIPE = preset("shapes")


def complete(folder: Path, recipe: Recipe = RECIPE, until: int = len(STAGES)) -> Run:
    run = Run(str(folder))
    folder.mkdir()
    Path(run.file("recipe.yaml")).write_text(recipe.to_yaml())
    for stage in STAGES[:until]:
        run.artifact(stage).begin(recipe)
        run.artifact(stage).commit(recipe, Outcome(items=3), time.monotonic())
    return run


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({"things": 7}, 2),  # another K: samples and features
        ({"omega_1": 0.5}, 4),  # another omega: all before training
        ({"encoder.precision": "bfloat16"}, 1),
        ({"evaluation.protocol": "label"}, 4),  # a model is never shared
        ({"compute.workers": 2}, 4),  # on which no result depends
    ],
)
def test_the_stages_before_the_first_difference_are_shared(
    tmp_path: Path, changes: dict[str, object], shared: int
) -> None:
    other, run = complete(tmp_path / "other"), Run(str(tmp_path / "run"))
    made, why = reuse.linked(RECIPE.with_fields(changes), run, other)
    assert list(made.reused()) == list(STAGES[:shared])
    assert [made.artifact(stage).uri for stage in STAGES] == [
        str(tmp_path / ("other" if index < shared else "run") / stage) for index, stage in enumerate(STAGES)
    ]
    assert why.startswith(
        "" if shared == 4 else f"{STAGES[shared]} differs in {next(iter(changes)).split('.')[0]}"[:20]
    )
    assert not (tmp_path / "run").exists()
    reuse.write(made)
    assert Run(run.uri).reused() == made.reused()


def test_a_run_leads_on_to_the_run_that_it_takes_from(tmp_path: Path) -> None:
    first = complete(tmp_path / "first")
    second, _ = reuse.linked(RECIPE.with_fields({"things": 7}), Run(str(tmp_path / "second")), first)
    reuse.write(second)
    Path(second.file("recipe.yaml")).write_text(RECIPE.with_fields({"things": 7}).to_yaml())
    third, why = reuse.linked(RECIPE, Run(str(tmp_path / "third")), second)
    assert dict(third.reused()) == {stage: str(tmp_path / "first" / stage) for stage in STAGES[:2]}
    assert why == "concepts is not complete there"


def test_values_of_the_preset_that_the_other_run_has_otherwise_are_listed(tmp_path: Path) -> None:
    other = complete(tmp_path / "other", RECIPE.with_fields({"epochs": 3, "omega_2": 0.7, "workers": 2, "things": 5}))
    asked = RECIPE.with_fields({"things": 7})
    note = reuse.preset_note(asked, asked, other)
    assert "training.epochs (3 there, " in note
    assert "training.omega_2 (0.7 there, " in note
    assert "things" not in note  # asked for
    assert "compute" not in note
    assert "\n" not in note
    based = other.recipe().with_fields({"things": 7})  # as without a PRESET
    assert reuse.preset_note(based, based, other) == ""


def test_the_list_of_reused_stages_is_read_once(tmp_path: Path) -> None:
    made, _ = reuse.linked(RECIPE, Run(str(tmp_path / "run")), complete(tmp_path / "other"))
    reuse.write(made)
    run = Run(made.uri)
    before = run.artifact("features").uri
    Path(run.file(REUSED)).unlink()
    assert run.artifact("features").uri == before == made.artifact("features").uri
    assert Run(run.uri).artifact("features").uri == run.file("features")


def test_a_runs_own_stages_stay_its_own(tmp_path: Path) -> None:
    other, run = complete(tmp_path / "other"), complete(tmp_path / "run", until=2)
    made, _ = reuse.linked(RECIPE, run, other)
    assert list(made.reused()) == ["concepts", "pseudo_labels"]


def test_refusals(tmp_path: Path) -> None:
    other, run = complete(tmp_path / "other"), Run(str(tmp_path / "run"))
    with refused("reuse-nothing seed 2021 1"):
        reuse.linked(RECIPE.with_fields({"seed": 1}), run, other)
    with refused("reuse-same other"):
        reuse.linked(RECIPE, Run(str(tmp_path / "other") + "/"), other)
    with refused("run-missing"):
        reuse.linked(RECIPE, run, Run(str(tmp_path / "nothing")))
    made, _ = reuse.linked(RECIPE, run, other)
    reuse.write(made)
    Path(other.artifact("features").file("manifest.json")).unlink()
    with refused("reuse-missing features"):
        reuse.check_present(Run(run.uri))


def test_another_recipes_folder_names_the_stages_and_the_command(tmp_path: Path) -> None:
    run = complete(tmp_path / "run")
    (tmp_path / "run-2").mkdir()
    asked = RECIPE.with_fields({"things": 7, "omega_1": 0.5, "compute.workers": 3})
    with refused("recipe-mismatch concepts.things 6 7") as caught:
        reuse.check_same(asked, run)
    command = f"transfgu train --reuse {run.uri} --run {run.uri}-3 --concepts.things 7 --training.omega_1 0.5"
    assert str(caught.value).endswith(command)
    assert "concepts, pseudo_labels, training, evaluation differ, samples, features can be shared" in str(caught.value)
    with refused("recipe-mismatch seed"):
        reuse.check_same(RECIPE.with_fields({"seed": 1}), run)
    reuse.check_same(RECIPE, run)


def test_more_epochs_go_on_and_fewer_are_another_recipe(tmp_path: Path) -> None:
    run = complete(tmp_path / "run")
    epochs = RECIPE.training.epochs
    more = RECIPE.with_fields({"epochs": epochs + 1})
    reuse.check_same(more, run)
    assert [run.artifact(stage).check(more) for stage in STAGES] == [True] * 4 + [False] * 2
    with refused(f"recipe-mismatch training.epochs {epochs} {epochs - 1}"):
        reuse.check_same(RECIPE.with_fields({"epochs": epochs - 1}), run)
    with refused("recipe-mismatch training.epochs training.lr"):
        reuse.check_same(more.with_fields({"lr": 0.5}), run)
    run.artifact("training").begin(more)
    assert run.artifact("training").manifest() is None  # no longer complete, and not of fewer epochs
    with refused("recipe-mismatch training.epochs"):
        reuse.check_same(RECIPE, run)


def test_a_method_that_anneals_does_not_go_on(tmp_path: Path) -> None:
    recipe = preset("shapes", "maskcontrast")
    run = Run(str(tmp_path))
    run.artifact("training").begin(recipe)
    with refused("recipe-mismatch training.epochs"):
        run.artifact("training").check(recipe.with_fields({"epochs": recipe.training.epochs + 1}))


def test_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "reused.json").write_text(json.dumps({"stages": 3}))
    with refused("file-damaged reused.json --reuse"):
        Run(str(tmp_path)).reused()
