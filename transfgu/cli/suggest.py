"""Suggest the number of concepts from the features of a run.

`transfgu suggest RUN` clusters the features into each number K of a range and measures, without labels, whether two
halves of the images give the same clusters (stability), the distance between clusters (silhouette), and the distance of
windows from their centroids (inertia). It suggests the smallest of the most stable K, and writes `suggestion.svg` and
`suggestion.json` into the run's folder. It reads only the features, which `transfgu train ... --until features`
computes.
"""

from collections.abc import Sequence

from transfgu.cli.command_line import Parser
from transfgu.errors import UserError
from transfgu.recipe import SUGGESTION_WINDOWS
from transfgu.runtime.progress import Progress
from transfgu.store import storage
from transfgu.store.artifacts import Run


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser."""
    made = Parser(__doc__ or "", "suggest", "RUN")
    made.add_argument("run", metavar="RUN", help="a run with features: the --run of `transfgu train`")
    add = made.add_argument
    add("--least", metavar="N", type=int, default=2, help="smallest number of things, and of stuff (default: 2)")
    add(
        "--most",
        metavar="N",
        type=int,
        default=0,
        help="largest number of things, and of stuff (default: twice that of the run, at least 12)",
    )
    add(
        "--windows",
        metavar="N",
        type=int,
        default=SUGGESTION_WINDOWS,
        help=f"maximum number of foreground windows, and of background windows (default: {SUGGESTION_WINDOWS})",
    )
    add("--seed", metavar="N", type=int, default=0, help="seed of random samples and of K-Means (default: 0)")
    add("--quiet", action="store_true", help="print only the measures")
    return made


def main(words: Sequence[str]) -> None:
    """Measure, write the picture, print the table."""
    given = parser(words).parse(words)
    run = Run(given.run)
    recipe = run.recipe()
    if "features" not in recipe.stages:
        raise UserError(
            f"method {recipe.method} has no concepts to count: give a run of method transfgu",
            code="option-of-another-method",
        )
    if not 2 <= given.least <= (given.most or 12):
        raise UserError(
            f"--least and --most must be 2 or more and rise, not {given.least} and {given.most or 12}",
            code="flag-range",
        )
    if given.windows < 100:
        raise UserError(f"--windows must be 100 or more, not {given.windows}", code="flag-range")
    # Import NumPy and FAISS only now, because they take seconds: mistakes on the command line are reported at once.
    from transfgu.report import suggestion

    progress = Progress("suggest", quiet=given.quiet)
    found = suggestion.find(
        recipe,
        run,
        least=given.least,
        most=given.most,
        windows=given.windows,
        seed=given.seed,
        after=lambda done, total: progress.update(done, total, "numbers of concepts"),
    )
    where = suggestion.write(run, found)
    print(suggestion.table(found))
    if given.quiet:
        return
    print(f"picture: {storage.shown(where)}")
    changed = [group for group in found if group.suggestion != group.present]
    if changed and recipe.windows.groups != "all":
        uri, flags = storage.shown(run.uri).rstrip("/"), " ".join(f"{g.flag} {g.suggestion}" for g in changed)
        print(f"next: transfgu train --reuse {uri} --run {uri}-K {flags}")
