"""A training with more epochs finds the last checkpoint of one with fewer, and no other."""

import json
from pathlib import Path

from transfgu.recipe import Recipe, preset
from transfgu.stages.training import carry_on
from transfgu.store.artifacts import Run
from transfgu.training import checkpoints

RECIPE = preset("shapes").with_fields({"epochs": 5})


def leave(run: Run, recipe: Recipe, epochs: int, inputs: str = "inputs", name: str = "checkpoint") -> Path:
    """Write a sealed checkpoint of so many epochs, like the training of `recipe`."""
    folder = Path(run.file("ray")) / f"training-{recipe.digest('training')[:12]}-{inputs}" / name
    folder.mkdir(parents=True)
    (folder / "student.safetensors").write_bytes(b"weights after %d" % epochs)
    (folder / "history.json").write_text(json.dumps([{"epoch": n + 1} for n in range(epochs)]))
    checkpoints.seal(folder)
    return folder


def longer(recipe: Recipe, by: int = 3) -> Recipe:
    return recipe.with_fields({"epochs": recipe.training.epochs + by})


def carried(run: Run, recipe: Recipe) -> checkpoints.Found | None:
    return checkpoints.newest(str(Path(run.file("ray")) / f"training-{recipe.digest('training')[:12]}-inputs"))


def test_the_last_whole_checkpoint_is_carried_over(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    leave(run, RECIPE, 4, name="a")
    (leave(run, RECIPE, 5, name="b") / "student.safetensors").write_bytes(b"cut")  # no longer what was sealed
    leave(run, RECIPE.with_fields({"epochs": 2}), 2)
    assert carry_on(longer(RECIPE), "inputs", run) == 4
    found = carried(run, longer(RECIPE))
    assert found is not None
    assert len(found.history) == 4
    assert (Path(found.uri) / "student.safetensors").read_bytes() == b"weights after 4"
    assert carry_on(longer(RECIPE), "inputs", run) == 0  # it has one of its own now


def test_other_recipes_inputs_and_lengths_do_not_count(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    leave(run, RECIPE.with_fields({"lr": 0.5}), 5)
    leave(run, RECIPE, 5, inputs="others")
    leave(run, longer(RECIPE, 9), 5)
    assert carry_on(longer(RECIPE), "inputs", run) == 0
    assert carried(run, longer(RECIPE)) is None


def test_a_run_whose_stages_are_taken_has_checkpoints_to_offer(tmp_path: Path) -> None:
    first = Run(str(tmp_path / "first"))
    leave(first, RECIPE, 5)
    run = Run(str(tmp_path / "run"), links={"pseudo_labels": first.file("pseudo_labels")})
    assert carry_on(longer(RECIPE), "inputs", run) == 5
    assert carried(run, longer(RECIPE)) is not None


def test_a_learning_rate_that_follows_the_epochs_begins_anew(tmp_path: Path) -> None:
    run, recipe = Run(str(tmp_path)), preset("shapes", "maskcontrast")
    leave(run, recipe, recipe.training.epochs)
    assert carry_on(longer(recipe), "inputs", run) == 0
