"""Suggest how many concepts to ask for, from a run's features alone.

`transfgu suggest RUN` clusters the features into each number of a range, and measures without labels: whether two
halves of the images find the same clusters (stability), how far clusters lie apart (silhouette), and how much closer
windows come to their centroids (inertia). It writes `suggestion.svg` and `suggestion.json` into the run's folder, and
trains nothing. The features are all that it needs: `transfgu train ... --until features` is enough.
"""

import sys
from collections.abc import Sequence

from transfgu.cli.command_line import Parser
from transfgu.errors import UserError
from transfgu.store import storage
from transfgu.store.artifacts import Run


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser."""
    made = Parser(__doc__ or "", "suggest", "RUN")
    made.add_argument("run", metavar="RUN", help="a run with features: the --run of `transfgu train`")
    made.add_argument("--least", metavar="N", type=int, default=2, help="fewest concepts of a kind (default: 2)")
    made.add_argument(
        "--most",
        metavar="N",
        type=int,
        default=0,
        help="most concepts of a kind (default: twice as many as in the run)",
    )
    made.add_argument(
        "--windows",
        metavar="N",
        type=int,
        default=10_000,
        help="windows of a kind to measure, at most (default: 10000)",
    )
    made.add_argument("--seed", metavar="N", type=int, default=0, help="of the draws and of K-Means (default: 0)")
    made.add_argument("--quiet", action="store_true", help="print the measures alone")
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write the picture, print the table."""
    words = sys.argv[1:] if words is None else words
    given = parser(words).parse(words)
    run = Run(given.run)
    recipe = run.recipe()
    if "features" not in recipe.stages:
        raise UserError(
            f"method {recipe.method} has no concepts to count: give a run of method transfgu",
            code="option-of-another-method",
        )
    most = given.most or max(8, 2 * max(recipe.concepts.things, recipe.concepts.stuff))
    if not 2 <= given.least <= most:
        raise UserError(
            f"--least and --most must be 2 or more and rise, not {given.least} and {most}", code="flag-range"
        )
    if given.windows < 100:
        raise UserError(f"--windows must be 100 or more, not {given.windows}", code="flag-range")
    # Only now NumPy and FAISS: a mistake on the command line is answered at once.
    from transfgu.report import suggestion
    from transfgu.runtime.progress import Progress

    progress = Progress("suggest", quiet=given.quiet)
    found = suggestion.find(
        recipe,
        run,
        range(given.least, most + 1),
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
