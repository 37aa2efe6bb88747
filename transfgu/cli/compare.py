"""Compare methods on the same images: train each with each seed, and score all with one evaluator.

`transfgu compare PRESET --methods transfgu,picie --seeds 1,2,3 --run URI`; `--methods all` takes every method. Flags of
the recipe apply to all methods that have them. The same command continues stopped runs and skips complete ones.
`transfgu compare RUN RUN`, with the folders of finished runs, trains nothing: it shows side by side the settings that
differ, scores, classes and seconds.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from transfgu.cli import compare_runs
from transfgu.cli.command_line import Parser, add_recipe, given_fields, print_config, recipe_of
from transfgu.errors import UserError, counted
from transfgu.methods import METHODS, TRANSFGU, method
from transfgu.presets import PRESETS
from transfgu.recipe import Recipe, preset
from transfgu.store import storage


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser; its help shows the defaults of the preset among `words`."""
    made = Parser(__doc__ or "", "compare", "[PRESET]")
    add = made.add_argument_group("comparison").add_argument
    add("--methods", metavar="A,B", default="all", help=f"all (default), or some of {', '.join(METHODS)}")
    add("--seeds", metavar="N,N", default="1,2,3", help="seeds of each method (default: 1,2,3)")
    add("--run", metavar="URI", help="folder of the runs and the table (default: ~/transfgu/compare-PRESET)")
    add("--parallel", metavar="N", help="runs at a time (default: 1; on a Ray cluster, all)")
    add("--quiet", action="store_true", help="print only the table")
    add_recipe(made, words)
    return made


def main(words: Sequence[str]) -> None:
    """Parse the command line, run each method with each seed, write and print the table."""
    if len(words) > 1 and not any(word.startswith("-") for word in words[:2]) and words[0] not in PRESETS:
        compare_runs.main(words)
        return
    arguments = parser(words).parse(words)
    given = given_fields(arguments)
    for name in ("method", "seed"):
        if name in given:
            raise UserError(f"a comparison has several values: give --{name}s instead of --{name}", code="flag-invalid")
    recipe = recipe_of(arguments)
    methods, seeds = _methods(arguments.methods), _numbers("--seeds", arguments.seeds, lowest=0)
    flags = _flags(recipe, methods, given)
    if arguments.published:
        if TRANSFGU not in methods:
            raise UserError(
                "--published is an option of transfgu only: leave it out, or add transfgu to --methods",
                code="option-of-another-method",
            )
        flags[TRANSFGU] = ("--published", *flags[TRANSFGU])
    if arguments.print_config:
        print_config(recipe)
        return
    runs = len(methods) * len(seeds)
    at_once = runs if os.environ.get("RAY_ADDRESS") else 1
    if arguments.parallel:
        at_once = _numbers("--parallel", arguments.parallel, lowest=1)[0]
    uri = arguments.run or str(Path.home() / "transfgu" / f"compare-{recipe.preset}")
    storage.check_writable(uri)
    base = ["--recipe", arguments.recipe] if arguments.recipe else [recipe.preset]
    # Import torch only now, because it takes seconds: mistakes on the command line are reported at once.
    from transfgu.baselines.comparison import Comparison, compare, score_untrained
    from transfgu.report import comparison as report

    def say(text: str) -> None:
        if not arguments.quiet:
            print(text, flush=True)

    asked = Comparison(
        uri=uri,
        methods=methods,
        seeds=seeds,
        flags={name: (*base, *words) for name, words in flags.items()},
        at_once=at_once,
    )
    rows = score_untrained(compare(asked, say), say, quiet=arguments.quiet)
    page = report.write(recipe, uri, rows)
    print(report.table_markdown(report.summarise(rows, recipe.preset)), end="")
    say(f"table and pictures: {storage.shown(page)}")
    failed = [row for row in rows if row.failure]
    if failed:
        first = failed[0]
        raise UserError(
            f"{len(failed)} of {counted(runs, 'run')} failed, such as {first.method} with seed {first.seed} "
            f"({first.failure}): correct the cause, and run the same command again",
            code="comparison-unfinished",
        )


def _methods(text: str) -> tuple[str, ...]:
    names = METHODS if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        method(name)
    return tuple(dict.fromkeys(names))


def _flags(recipe: Recipe, methods: Sequence[str], given: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the recipe's flags that each method has.

    Raises:
        UserError: a flag that no method of the comparison has, or a value that does not fit.
    """
    others_fields = {name: preset(recipe.preset, name).others_fields() for name in methods}
    for field in given:
        others = [of_others.get(field) for of_others in others_fields.values()]
        if all(others):
            raise UserError(
                f"--{field} is not an option of {', '.join(methods)}, only of other methods, such as "
                f"{others[0]}: leave it out",
                code="option-of-another-method",
            )
    return {
        name: tuple(word for field, text in given.items() if field not in of_others for word in (f"--{field}", text))
        for name, of_others in others_fields.items()
    }


def _numbers(flag: str, text: str, *, lowest: int) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(word) for word in text.replace(",", " ").split()))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < lowest:
        raise UserError(f"{flag} takes whole numbers from {lowest}, such as 1,2,3, not {text}", code="flag-invalid")
    return numbers
