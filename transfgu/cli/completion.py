"""Print the completion script of a shell, which completes commands, flags, presets, choices and files.

bash: `transfgu completion bash > ~/.local/share/bash-completion/completions/transfgu`;
zsh: `transfgu completion zsh > FOLDER/_transfgu`, a folder of `$fpath`;
fish: `transfgu completion fish > ~/.config/fish/completions/transfgu.fish`.
"""

import argparse
from collections.abc import Sequence
from typing import get_args, get_origin

import shtab

from transfgu.cli.command_line import Parser
from transfgu.cli.main import COMMANDS, command_module
from transfgu.errors import UserError
from transfgu.methods import METHODS, STAGES
from transfgu.presets import PRESETS
from transfgu.recipe import FIELDS

SHELLS = ("bash", "zsh", "fish")


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser."""
    made = Parser(__doc__ or "", "completion", "SHELL")
    made.add_argument("shell", metavar="SHELL", help=f"one of {', '.join(SHELLS)}")
    return made


def script(shell: str) -> str:
    """Return the completion script of a shell.

    Raises:
        UserError: no such shell.
    """
    if shell not in SHELLS:
        raise UserError(f"there is no completion for {shell}; choose one of {', '.join(SHELLS)}", code="shell-unknown")
    root = argparse.ArgumentParser(prog="transfgu")
    root.add_argument("--version", action="store_true", help="show the version")
    commands = root.add_subparsers()
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, parents=[command_module(name).parser()], add_help=False, help=what)
        for action in command._actions:
            _complete(action, shtab.FILE)
    made: str = shtab.complete(root, shell)
    return made


def _complete(action: argparse.Action, file: object) -> None:
    field = FIELDS.get(action.dest.removeprefix("field:"))
    if action.dest == "preset":
        action.choices = PRESETS
    elif action.dest == "field:method":
        action.choices = tuple(METHODS)
    elif action.dest == "until":
        action.choices = STAGES
    elif action.dest == "shell":
        action.choices = SHELLS
    elif field and get_origin(field.kind) is not None and isinstance(get_args(field.kind)[0], str):
        action.choices = get_args(field.kind)
    elif action.metavar == "URI":
        action.complete = file  # type: ignore[attr-defined]  # an attribute that shtab reads


def main(words: Sequence[str]) -> None:
    """Print the script."""
    print(script(parser(words).parse(words).shell))
