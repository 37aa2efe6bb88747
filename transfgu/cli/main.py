"""The command `transfgu`: its first word names the command that gets the other words.

Only the module of that command is imported, and torch and Ray not before its command line is read. So `--help` answers
at once, and so does a mistake on the command line.
"""

import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from types import MappingProxyType, ModuleType
from typing import NoReturn

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "train": "segment a data set without labels: features, concepts, pseudo labels, training, evaluation, report",
        "check": "check what a training would read, do and cost; or verify all files of a run",
        "predict": "make masks of a folder of images with a trained run",
        "evaluate": "score a run, a decoder or a folder of masks on labelled images",
        "name": "give names to a run's classes, and merge those of one name; nothing is trained again",
        "serve": "serve a page to try a run with: photographs, masks, names of concepts",
        "export": "write masks as COCO, CVAT, Label Studio or GeoJSON files",
        "suggest": "suggest how many concepts a run's features hold, without labels",
        "tune": "search for a better recipe by many short trainings",
        "compare": "compare methods on the same images, over several seeds; or show runs side by side",
        "pretrain": "train a small self-supervised encoder on a folder of images",
        "runs": "list the runs in a folder",
        "status": "show how far a run is, its scores, and the command to use next",
        "benchmark": "time each stage beside its lower bound",
        "plan": "plan a full data set from such timings",
        "schema": "print the JSON Schema of a recipe",
        "completion": "print the completion script of a shell: bash, zsh or fish",
    }
)
"""Each command, and what it does. `transfgu/cli/NAME.py` has its functions `parser(words)` and `main(words)`."""


def command_module(name: str) -> ModuleType:
    """Import the module of a command.

    Raises:
        UserError: there is no such command; the message names near ones.
    """
    if name not in COMMANDS:
        from transfgu.errors import UserError

        near = difflib.get_close_matches(name, COMMANDS, n=3)
        raise UserError(
            f"there is no command {name}; choose one of {', '.join(near or COMMANDS)} (transfgu --help shows all)",
            code="command-unknown",
        )
    return importlib.import_module(f"transfgu.cli.{name}")


def help_text() -> str:
    """Return what `transfgu --help` prints."""
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
    """Run the command that the first word names on the other words.

    Raises:
        UserError: there is no such command, or it ends in a mistake of the user's.
    """
    first = words[0] if words else "--help"
    if first in ("-h", "--help", "help"):
        print(help_text())
    elif first == "--version":
        print(f"transfgu {metadata.version('transfgu')}")
    else:
        command_module(first).main(words[1:])


def main() -> NoReturn:
    """Run `transfgu` on the process's arguments, and exit."""
    from transfgu.runtime import stopping

    stopping.install()
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help", "--version"):
        run_command(words)
        sys.exit(0)
    from transfgu.cli.command_line import run_job

    run_job(lambda: run_command(words))
