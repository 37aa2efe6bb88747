"""Segment a data set without labels: features, concepts, pseudo labels, training, evaluation, report.

`python jobs/train.py` runs the embedded demonstration; `python jobs/train.py coco-stuff-27 --data URI` a benchmark.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.cli.command_line import Parser, add_recipe, preset_table, recipe_of, run_job
from transfgu.recipe import STAGES
from transfgu.store.artifacts import Run


def main() -> None:
    """Parse the command line and run the pipeline."""
    parser = Parser(__doc__ or "")
    add_recipe(parser)
    parser.add_argument("--run", metavar="URI", help="run folder: a path or URI (default: ~/transfgu/PRESET)")
    parser.add_argument(
        "--until", metavar="STAGE", default=STAGES[-1], help=f"stop after this stage: {', '.join(STAGES)}"
    )
    parser.add_argument("--list", action="store_true", help="show the presets, and do nothing")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check data, weights, storage and resources, show the plan and the cost, and do nothing",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--verbose", action="store_true", help="let Ray's own messages through")
    arguments = parser.parse()
    if arguments.list:
        print(preset_table())
        return
    recipe = recipe_of(arguments)
    # Only now torch and Ray, which take seconds to import: a mistake on the command line is answered at once.
    from transfgu.pipeline import run_stages
    from transfgu.report.page import write

    run = Run(arguments.run or str(Path.home() / "transfgu" / recipe.preset))
    if arguments.dry_run:
        from transfgu.planning.dry_run import describe

        for line in describe(recipe, run, until=arguments.until, verbose=arguments.verbose):
            print(line)
        return
    run_stages(recipe, run, until=arguments.until, report=write, quiet=arguments.quiet, verbose=arguments.verbose)


if __name__ == "__main__":
    run_job(main)
