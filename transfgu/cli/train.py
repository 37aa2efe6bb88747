"""Segment a data set without labels: features, concepts, pseudo labels, training, evaluation, report.

`transfgu train` runs the embedded demonstration; `transfgu train coco-stuff-27 --data URI` runs a benchmark.
"""

from collections.abc import Sequence
from pathlib import Path

from transfgu.cli.command_line import Parser, add_output, add_recipe, preset_table, print_config, recipe_of
from transfgu.errors import UserError
from transfgu.methods import STAGES, TRANSFGU
from transfgu.recipe import Recipe
from transfgu.runtime import failures
from transfgu.store import storage
from transfgu.store.artifacts import Run


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser; its help shows the defaults of the preset among `words`."""
    made = Parser(__doc__ or "", "train", "[PRESET]")
    made.add_argument(
        "--run",
        metavar="URI",
        help="folder of the run: a path or URI (default: ~/transfgu/PRESET, plus -METHOD for other methods)",
    )
    made.add_argument(
        "--until", metavar="STAGE", default=STAGES[-1], help=f"stop after this stage: {', '.join(STAGES)}"
    )
    made.add_argument(
        "--class-names",
        metavar="FILE",
        help="names of the classes of --labels: one line per class in the order of their values, or YAML: {3: cow}",
    )
    made.add_argument(
        "--reuse",
        metavar="URI",
        help="take the stages of another run that this recipe shares: its features for another number of concepts, "
        "or its pseudo labels for another --omega_1; without PRESET, start from its recipe",
    )
    made.add_argument("--list", action="store_true", help="show the presets and exit")
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="check data, weights, storage and resources, show the plan and the cost, and exit",
    )
    add_output(made)
    add_recipe(made, words)
    return made


def folder_name(recipe: Recipe) -> str:
    """Return the default name of a run's folder."""
    return recipe.preset if recipe.method == TRANSFGU else f"{recipe.preset}-{recipe.method}"


def main(words: Sequence[str]) -> None:
    """Parse the command line and run the pipeline."""
    given = parser(words).parse(words)
    if given.list:
        print(preset_table())
        return
    shared = Run(given.reuse) if given.reuse else None
    recipe = recipe_of(given, shared.recipe() if shared and not (given.preset or given.recipe) else None)
    names = None
    if given.class_names:
        from transfgu import datasets
        from transfgu.sharing.names import parse

        if not recipe.labels:
            raise UserError(
                "--class-names names the classes of --labels: give --labels, or name concepts after the run by "
                "transfgu name",
                code="labels-missing",
            )
        text = storage.read_bytes(given.class_names)
        names = parse(text, datasets.classes(recipe).names, storage.shown(given.class_names))
    run = Run(given.run or str(Path.home() / "transfgu" / folder_name(recipe)))
    if given.print_config:
        print_config(recipe, run)
    elif given.dry_run:
        from transfgu.planning.dry_run import describe

        for line in describe(recipe, run, until=given.until, shared=shared, verbose=given.verbose):
            print(line)
    else:
        failures.check_ray()
        # Import torch and Ray only now, because they take seconds: mistakes on the command line are reported at once.
        from transfgu.pipeline import run_stages
        from transfgu.report.page import write

        run_stages(
            recipe,
            run,
            until=given.until,
            report=write,
            names=names,
            shared=shared,
            quiet=given.quiet,
            verbose=given.verbose,
        )
