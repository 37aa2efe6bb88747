"""Search for a better recipe in many short trainings on the same pseudo labels, on all resources of a cluster.

`transfgu tune --trials 20` searches weights of the losses, omega_1 and omega_2, and alphas on the demonstration;
`--search FIELD=RANGE` searches any numeric field. The same command continues a stopped search.
"""

from collections.abc import Sequence
from pathlib import Path

from transfgu.cli.command_line import Parser, add_output, add_recipe, print_config, recipe_of
from transfgu.search import space
from transfgu.search.space import KINDS
from transfgu.search.trials import OBJECTIVES, SCHEDULERS, SEARCHERS, Search


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser; its help shows the defaults of the preset among `words`."""
    made = Parser(__doc__ or "", "tune", "[PRESET] --trials N")
    group = made.add_argument_group("search")
    add = group.add_argument
    add("--run", metavar="URI", help="folder of the search: a path or URI (default: ~/transfgu/PRESET-search)")
    add("--trials", metavar="N", type=int, required=True, help="number of trials; a grid may have fewer")
    add(
        "--search",
        metavar="FIELD=RANGE",
        action="append",
        help=f"search a field of the recipe: {', '.join(KINDS.values())}; alpha holds it constant. Once per field "
        f"(default: {' '.join(space.DEFAULT)})",
    )
    add("--searcher", metavar="NAME", default="random", help=f"{', '.join(SEARCHERS)} (default: random)")
    add("--scheduler", metavar="NAME", default="asha", help=f"{', '.join(SCHEDULERS)} (default: asha)")
    add(
        "--objective",
        metavar="NAME",
        default="mean_iou",
        help=f"objective to maximise: {', '.join(OBJECTIVES)} (default: mean_iou, which needs validation labels)",
    )
    add(
        "--grace",
        metavar="N",
        type=int,
        default=1,
        help="epochs before ASHA first compares trials [epochs] (default: 1)",
    )
    add("--reduction", metavar="N", type=int, default=4, help="ASHA continues the best 1/N of trials (default: 4)")
    add("--concurrent", metavar="N", type=int, default=0, help="trials at a time (default: as many as fit)")
    add("--workers-per-trial", metavar="N", type=int, default=1, help="training workers per trial (default: 1)")
    add(
        "--gpus-per-trial",
        metavar="X",
        type=float,
        default=0.0,
        help="GPUs per trial, such as 0.5, shared by its workers (default: one per worker, if there are GPUs)",
    )
    add("--hours", metavar="X", type=float, default=0.0, help="time limit of the search [hours] (default: none)")
    add_output(made)
    add_recipe(made, words)
    return made


def main(words: Sequence[str]) -> None:
    """Parse the command line, search, print a table."""
    arguments = parser(words).parse(words)
    recipe = recipe_of(arguments)
    if arguments.print_config:
        print_config(recipe)
        return
    default = space.default(recipe, arguments.searcher)
    own = ("trials", "objective", "searcher", "scheduler", "grace", "reduction", "concurrent", "hours")
    search = Search(
        recipe=recipe,
        uri=arguments.run or str(Path.home() / "transfgu" / f"{recipe.preset}-search"),
        space=space.parse(arguments.search or default, recipe),
        workers_per_trial=arguments.workers_per_trial,
        gpus_per_trial=arguments.gpus_per_trial,
        **{name: getattr(arguments, name) for name in own},
    )
    # Import torch and Ray only now, because they take seconds: mistakes on the command line are reported at once.
    from transfgu.report.search import write
    from transfgu.search.stage import run_search

    run_search(search, report=write, quiet=arguments.quiet, verbose=arguments.verbose)
