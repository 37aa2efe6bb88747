"""The command line: one flag per field, and every mistake in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.refusals import refused
from transfgu.cli import compare
from transfgu.cli.command_line import Parser, add_pretraining_recipe, add_recipe, pretraining_recipe_of, recipe_of
from transfgu.errors import UserError
from transfgu.pretraining.recipe import PRETRAINING_FIELDS, PretrainingRecipe
from transfgu.recipe import FIELDS, Recipe, preset
from transfgu.runtime.failures import find_user_error

ROOT = Path(__file__).resolve().parents[2]


def parse(*words: str) -> Recipe:
    parser = Parser("test")
    add_recipe(parser)
    return recipe_of(parser.parse(words))


def test_without_words_it_is_the_demonstration() -> None:
    assert parse() == preset("shapes")


def test_flags_by_full_and_by_short_name() -> None:
    wanted = preset("cityscapes").with_fields({"epochs": 2, "encoder.weights": "random", "curated": True})
    assert parse("cityscapes", "--epochs", "2", "--encoder.weights", "random", "--curated") == wanted
    assert parse("cityscapes", "--training.epochs=2", "--encoder.weights=random", "--curated", "yes") == wanted


def test_things_and_stuff_of_a_folder() -> None:
    recipe = parse("folder", "--things", "3", "--stuff", "0", "--data", "/x")
    assert recipe.background
    assert recipe.classes == 4


def test_published_sets_what_the_published_code_does_otherwise() -> None:
    usual, published = parse("coco-stuff-27").flat(), parse("coco-stuff-27", "--published", "--colours", "image").flat()
    assert {name: value for name, value in published.items() if value != usual[name]} == {
        "concepts.start": "faiss",
        "training.sampler": "published",
        "dataset.interpolation": "nearest",
    }
    assert parse("cityscapes", "--published").dataset.interpolation == "bilinear"
    assert parse("cityscapes", "--published").training.colours == "batch"
    with refused("option-of-another-method --published iic"):
        parse("shapes", "--published", "--method", "iic")
    with refused("option-of-another-method --published --methods"):
        compare.main(["shapes", "--published", "--methods", "iic"])


def test_published_changes_a_reused_runs_recipe_too() -> None:
    parser = Parser("test")
    add_recipe(parser)
    base = preset("shapes").with_fields({"epochs": 3, "colours": "image"})
    recipe = recipe_of(parser.parse(["--published"]), base)
    assert (recipe.training.epochs, recipe.training.colours, recipe.concepts.start) == (3, "batch", "faiss")


def test_a_recipe_file_may_be_the_start(tmp_path: Path) -> None:
    file = tmp_path / "best.yaml"
    file.write_text(preset("lip-5").with_fields({"omega_2": 0.5}).to_yaml())
    assert parse("--recipe", str(file), "--epochs", "1") == preset("lip-5").with_fields({"omega_2": 0.5, "epochs": 1})
    with refused("flags-conflict"):
        parse("shapes", "--recipe", str(file))


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["coco"], "preset-unknown coco"),
        (["--epohcs", "3"], "flag-unknown --epohcs --epochs"),
        (["--epochs"], "flag-invalid --epochs"),
        (["shapes", "more"], "word-unexpected more"),
        (["--weights", "x"], "flag-unknown --weights"),  # the encoder and the decoder each have some
    ],
)
def test_mistakes_are_one_line(words: list[str], refusal: str) -> None:
    with refused(refusal):
        parse(*words)


def test_help_shows_every_field_with_its_meaning() -> None:
    parser = Parser("test")
    add_recipe(parser)
    text = " ".join(parser.format_help().split())
    for name, info in FIELDS.items():
        if name == "preset":
            continue
        if name in preset("shapes").others_fields():  # of another method
            assert f"--{name} " not in text
        else:
            assert f"--{name}" in text
            assert " ".join(info.doc.split()[:3]) in text


@pytest.mark.processes
def test_a_mistake_on_the_command_line_needs_no_ray_and_shows_no_trace() -> None:
    done = subprocess.run(
        [sys.executable, "jobs/train.py", "coco"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert done.stderr.startswith("unknown preset coco")
    assert done.stderr.endswith(" [preset-unknown]\n")


class Wrapped(Exception):
    """An error as Ray wraps exceptions of workers."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("a task failed")
        self.cause = cause


def test_a_users_mistake_is_found_under_wrappers() -> None:
    mistake = UserError("K is larger than the number of windows", code="concepts-too-many")
    assert find_user_error(Wrapped(Wrapped(mistake))) is mistake
    assert find_user_error(ValueError("another")) is None


def test_a_users_mistake_in_a_task_is_its_line_and_not_rays_stack_trace() -> None:
    from ray.exceptions import RayTaskError

    mistake = UserError("no such file", code="file-missing")
    inner = RayTaskError("prepare", "Traceback ...", mistake).as_instanceof_cause()
    outer = RayTaskError("run", "Traceback ...", inner).as_instanceof_cause()
    assert isinstance(inner, UserError)
    for error in (inner, outer):
        assert str(error) != str(mistake)
        assert find_user_error(error) is mistake


def test_every_field_of_the_pretraining_is_a_flag() -> None:
    parser = Parser("")
    add_pretraining_recipe(parser)
    assert pretraining_recipe_of(parser.parse([])) == PretrainingRecipe()
    given = parser.parse(["--prototypes", "32", "--local_area", "0.1,0.3"])
    assert pretraining_recipe_of(given) == PretrainingRecipe(prototypes=32, local_area=(0.1, 0.3))
    assert pretraining_recipe_of(parser.parse(["--hue", "10"]), "photographs").hue == 10
    assert pretraining_recipe_of(parser.parse([]), "photographs").brightness == (0.3, 1.5)
    shown = parser.format_help()
    assert all(f"--{name} " in shown and info.doc[:20] in shown for name, info in PRETRAINING_FIELDS.items())


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["--steps", "many"], "field-type steps many"),
        (["--steps", "0"], "field-range steps 0"),
        (["--global_area", "0.5,0.2"], "field-range global_area 0.5,0.2"),
        (["--heads", "5"], "heads-mismatch 96 5"),
    ],
)
def test_mistakes_in_the_pretrainings_flags_are_one_line(words: list[str], refusal: str) -> None:
    parser = Parser("")
    add_pretraining_recipe(parser)
    with refused(refusal):
        pretraining_recipe_of(parser.parse(words))
