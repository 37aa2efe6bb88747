"""List the runs in a folder: preset, classes, complete stages, scores.

`transfgu runs` lists those in ~/transfgu.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow.fs as pafs

from transfgu.cli.command_line import Parser
from transfgu.cli.status import state_of
from transfgu.errors import UserError
from transfgu.store import storage
from transfgu.store.artifacts import Run


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser."""
    made = Parser(__doc__ or "", "runs", "[FOLDER]")
    made.add_argument("folder", metavar="FOLDER", nargs="?", help="a path or URI (default: ~/transfgu)")
    return made


def runs_in(folder: str) -> list[Run]:
    """Return the runs in a folder, by name.

    Raises:
        UserError: there is no such folder.
    """
    storage.check_readable(folder)
    files, path = storage.filesystem(folder)
    names = [
        info.base_name for info in files.get_file_info(pafs.FileSelector(path)) if info.type == pafs.FileType.Directory
    ]
    found = [Run(storage.join(folder, name)) for name in sorted(names)]
    return [run for run in found if storage.exists(run.file("recipe.yaml"))]


def table(folder: str) -> str:
    """Return a table of the runs in a folder, one line each.

    Raises:
        UserError: the folder does not exist, or has no run.
    """
    rows = [("run", "preset", "classes", "epochs", "stages", "mIoU", "accuracy")]
    for run in runs_in(folder):
        name = run.uri.rstrip("/").rpartition("/")[2]
        try:
            state = state_of(run)
        except UserError as error:
            rows.append((name, str(error), "", "", "", "", ""))
            continue
        done = "finished" if state.finished else f"{len(state.complete)} of {len(state.recipe.stages)}"
        done += ", at work" if state.holder else ""
        scores = [state.metrics.get(key) for key in ("mean_iou", "pixel_accuracy")]
        shown = ["" if value is None else f"{value:.2f}" for value in scores]
        recipe = state.recipe
        rows.append((name, recipe.preset, f"{recipe.classes}", f"{recipe.training.epochs}", done, shown[0], shown[1]))
    if len(rows) == 1:
        raise UserError(
            f"{storage.shown(folder)} has no run: give the folder that contains the --run folders", code="runs-missing"
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main(words: Sequence[str]) -> None:
    """Print the table."""
    given = parser(words).parse(words)
    print(table(given.folder or str(Path.home() / "transfgu")))
