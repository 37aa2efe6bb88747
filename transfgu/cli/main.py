"""Run `transfgu`: the first word selects the command, which receives the other words.

Only the module of that command is imported, and torch and Ray only after its command line has been parsed. So `--help`
and mistakes on the command line are answered at once.
"""

import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from types import MappingProxyType, ModuleType
from typing import NoReturn

from transfgu.errors import UserError
from transfgu.runtime import stopping

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "train": "segment a data set without labels: features, concepts, pseudo labels, training, evaluation, report",
        "check": "check data and resources and estimate the cost of a training; or verify all files of a run",
        "predict": "predict masks for a folder of images with a trained run",
        "frames": "write frames of videos as images",
        "rescale": "map DICOM files and grey images of more than 8 bits to 8 bits by a window",
        "evaluate": "score a run, a decoder or a folder of masks on labelled images",
        "name": "name and merge the classes of a run, without training again",
        "serve": "serve a page to try a run: photographs, masks, names of concepts",
        "export": "write masks as COCO, CVAT, Label Studio, GeoJSON or GeoTIFF files",
        "suggest": "suggest the number of concepts from the features of a run, without labels",
        "tune": "search for a better recipe in many short trainings",
        "compare": "compare methods on the same images, over several seeds; or show runs side by side",
        "pretrain": "train a small self-supervised encoder on a folder of images",
        "runs": "list the runs in a folder",
        "status": "show the state of a run, its scores, and the next command",
        "benchmark": "time each stage and compare it with its lower bound",
        "plan": "estimate time and cost of a full data set from measurements",
        "schema": "print the JSON Schema of a recipe",
        "completion": "print the completion script of a shell: bash, zsh or fish",
    }
)
"""Commands and their descriptions. `transfgu/cli/NAME.py` has its functions `parser(words)` and `main(words)`."""


def command_module(name: str) -> ModuleType:
    """Import the module of a command.

    Raises:
        UserError: there is no such command; the message names similar ones.
    """
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=3)
        raise UserError(
            f"there is no command {name}; choose one of {', '.join(near or COMMANDS)} (transfgu --help shows all)",
            code="command-unknown",
        )
    return importlib.import_module(f"transfgu.cli.{name}")


def help_text() -> str:
    """Return the text of `transfgu --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: transfgu COMMAND [WORD ...] [--FLAG VALUE ...]",
            "",
            "Semantic segmentation without labels: TransFGU on Ray.",
            "",
            *lines,
            "",
            "transfgu COMMAND --help    show the flags that most runs need; --help-all shows every flag",
            "transfgu --version         show the version",
            "",
            "Start with: transfgu check folder --data FOLDER",
        ]
    )


def run_command(words: Sequence[str]) -> None:
    """Run the command named by the first word with the other words.

    Raises:
        UserError: there is no such command, or the user made a mistake in it.
    """
    first = words[0] if words else "--help"
    if first in ("-h", "--help", "help"):
        print(help_text())
    elif first == "--version":
        print(f"transfgu {metadata.version('transfgu')}")
    else:
        command_module(first).main(words[1:])


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Run `transfgu` with these words, by default the arguments of the process, and exit."""
    stopping.install()
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help", "help", "--version"):
        run_command(words)
        sys.exit(0)
    from transfgu.cli.command_line import run_job

    run_job(lambda: run_command(words))
