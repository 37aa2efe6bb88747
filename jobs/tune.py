"""Search for a better recipe: many short trainings on the same pseudo labels, on as much of a cluster as there is.

`python jobs/tune.py --trials 20` tries other weights of the losses, omega_1 and omega_2, and other alphas on the
demonstration; `--search FIELD=RANGE` searches any numeric field. The same command goes on with a stopped search.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.cli.command_line import Parser, add_recipe, recipe_of, run_job
from transfgu.search import space
from transfgu.search.space import KINDS
from transfgu.search.trials import OBJECTIVES, SCHEDULERS, SEARCHERS, Search


def main() -> None:
    """Parse the command line, search, print a table."""
    parser = Parser(__doc__ or "")
    add_recipe(parser)
    group = parser.add_argument_group("search")
    add = group.add_argument
    add("--run", metavar="URI", help="the search's folder: a path or URI (default: ~/transfgu/PRESET-search)")
    add("--trials", metavar="N", type=int, required=True, help="trials in all; a grid may have fewer")
    add(
        "--search",
        metavar="FIELD=RANGE",
        action="append",
        help=f"search a field of the recipe: {', '.join(KINDS.values())}; alpha holds it constant. Once a field "
        f"(default: {' '.join(space.DEFAULT)})",
    )
    add("--searcher", metavar="NAME", default="random", help=f"{', '.join(SEARCHERS)} (default: random)")
    add("--scheduler", metavar="NAME", default="asha", help=f"{', '.join(SCHEDULERS)} (default: asha)")
    add(
        "--objective",
        metavar="NAME",
        default="mean_iou",
        help=f"what is maximised: {', '.join(OBJECTIVES)} (default: mean_iou, which needs validation labels)",
    )
    add("--grace", metavar="N", type=int, default=1, help="asha first compares after so many [epochs] (default: 1)")
    add("--reduction", metavar="N", type=int, default=4, help="asha lets the best 1/N go on (default: 4)")
    add("--concurrent", metavar="N", type=int, default=0, help="trials at a time (default: as the cluster holds)")
    add("--workers-per-trial", metavar="N", type=int, default=1, help="training workers of a trial (default: 1)")
    add(
        "--gpus-per-trial",
        metavar="X",
        type=float,
        default=0.0,
        help="GPUs of a trial, such as 0.5, shared by its workers (default: one a worker, where there are GPUs)",
    )
    add("--hours", metavar="X", type=float, default=0.0, help="stop after so long [hours] (default: no limit)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--verbose", action="store_true", help="let Ray's own messages through")
    arguments = parser.parse()
    recipe = recipe_of(arguments)
    default = space.DEFAULT_GRID if arguments.searcher == "grid" else space.DEFAULT
    own = ("trials", "objective", "searcher", "scheduler", "grace", "reduction", "concurrent", "hours")
    search = Search(
        recipe=recipe,
        uri=arguments.run or str(Path.home() / "transfgu" / f"{recipe.preset}-search"),
        space=space.parse(arguments.search or default, recipe),
        workers_per_trial=arguments.workers_per_trial,
        gpus_per_trial=arguments.gpus_per_trial,
        **{name: getattr(arguments, name) for name in own},
    )
    # Only now torch and Ray, which take seconds to import: a mistake on the command line is answered at once.
    from transfgu.report.search import write
    from transfgu.search.stage import run_search

    run_search(search, report=write, quiet=arguments.quiet, verbose=arguments.verbose)


if __name__ == "__main__":
    run_job(main)
