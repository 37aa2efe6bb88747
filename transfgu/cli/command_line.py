"""The command line is the recipe: one flag a field, made from the fields' own metadata.

A flag is the field's dotted name (``--training.omega_1``), or its last part where just one component has it
(``--omega_1``). Whatever a user gets wrong is answered in one line.
"""

import argparse
import dataclasses
import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from transfgu.errors import UserError
from transfgu.fields import FieldInfo, convert, kind_name
from transfgu.presets import PRESETS
from transfgu.pretraining.recipe import PRETRAINING_FIELDS, PretrainingRecipe
from transfgu.recipe import FIELDS, SHORT_NAMES, ComputeRecipe, Recipe, from_yaml, preset
from transfgu.runtime.failures import find_user_error
from transfgu.store import storage

GROUPS = {
    "": "data and seed",
    "dataset": "images and labels",
    "encoder": "encoder (frozen, self-supervised ViT)",
    "windows": "features: sliding windows",
    "concepts": "concepts: K-Means over class tokens",
    "pseudo_labels": "pseudo labels: concept maps",
    "decoder": "mask decoder",
    "training": "bootstrapped training",
    "evaluation": "evaluation",
    "compute": "where it runs, and who is told (changes no result)",
}
"""Titles of the recipe's components, in the order of the method."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and name near flags for a misspelt one."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        """Raise UserError in place of printing the usage."""
        raise UserError(f"{message} (--help shows every flag)", code="flag-invalid")

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """The parsed arguments.

        Raises:
            UserError: an unknown flag, a missing value, or one word too many.
        """
        known, rest = self.parse_known_args(arguments)
        if rest:
            if not rest[0].startswith("-"):
                raise UserError(
                    f"{rest[0]} is one word too many (--help shows how to call this)", code="word-unexpected"
                )
            flag = rest[0].split("=")[0]
            flags = [f for action in self._actions for f in action.option_strings]
            near = difflib.get_close_matches(flag, flags, n=3, cutoff=0.5)
            raise UserError(
                f"there is no flag {flag}; {'near ones: ' + ', '.join(near) if near else '--help shows all'}",
                code="flag-unknown",
            )
        return known


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)


def add_recipe(parser: argparse.ArgumentParser, preset_flag: str = "") -> None:
    """Add the preset, positional or by `preset_flag`, and a flag for every field of the recipe."""
    named: dict[str, Any] = {"dest": "preset"} if preset_flag else {"nargs": "?"}
    what = f"one of {', '.join(PRESETS)} (default: shapes)"
    parser.add_argument(preset_flag or "preset", metavar="PRESET", help=what, **named)
    parser.add_argument("--recipe", metavar="URI", help="start from this YAML recipe instead of a preset")
    groups = {c: parser.add_argument_group(title) for c, title in GROUPS.items()}
    for name, default in preset("shapes").flat().items():
        if name != "preset":
            _add_recipe_field(groups[name.rpartition(".")[0]], name, default, "default for shapes")


def add_compute(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of `compute` that counts where nothing is trained."""
    group = parser.add_argument_group("where it runs (changes no result)")
    for name, default in preset("shapes").flat().items():
        if name.startswith("compute.") and name not in ("compute.workers", "compute.track"):
            _add_recipe_field(group, name, default, "default")


def compute_of(arguments: argparse.Namespace) -> ComputeRecipe:
    """`compute` with the fields that the arguments of :func:`add_compute` set.

    Raises:
        UserError: a bad value.
    """
    given = given_fields(arguments).items()
    return ComputeRecipe(
        **{name.removeprefix("compute."): convert(name, FIELDS[name].kind, text) for name, text in given}
    )


def _add_recipe_field(group: argparse._ArgumentGroup, name: str, default: Any, what: str) -> None:
    short = [f"--{brief}" for brief, full in SHORT_NAMES.items() if full == name]
    _add_field(group, [f"--{name}", *short], FIELDS[name], default, what)


def add_pretraining_recipe(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of the pretraining's recipe."""
    group = parser.add_argument_group("what is learned, and how")
    for field in dataclasses.fields(PretrainingRecipe):
        _add_field(group, [f"--{field.name}"], PRETRAINING_FIELDS[field.name], field.default, "default")


def _add_field(group: argparse._ArgumentGroup, flags: list[str], info: FieldInfo, default: Any, what: str) -> None:
    unit = f" [{info.unit}]" if info.unit else ""
    shown = ",".join(map(str, default)) if isinstance(default, list | tuple) else default
    note = f" ({what}: {shown})" if shown != "" else ""
    extra: dict[str, Any] = {"nargs": "?", "const": "true"} if info.kind is bool else {}
    group.add_argument(
        *flags,
        dest=f"field:{info.name}",
        metavar=_metavar(info.kind),
        help=f"{info.doc}{unit}{note}".replace("%", "%%"),
        **extra,
    )


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X", str: "TEXT", bool: "BOOL"}.get(kind) or (
        "|".join(kind_name(kind).removeprefix("one of ").split(", ")) if kind_name(kind).startswith("one of") else "N,N"
    )


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the arguments ask for.

    Raises:
        UserError: unknown preset, or a bad value.
    """
    if arguments.recipe:
        if arguments.preset:
            raise UserError("give a PRESET or --recipe, not both", code="flags-conflict")
        recipe = from_yaml(storage.read_bytes(arguments.recipe), storage.shown(arguments.recipe))
    else:
        recipe = preset(arguments.preset or "shapes")
    return recipe.with_fields(given_fields(arguments))


def pretraining_recipe_of(arguments: argparse.Namespace) -> PretrainingRecipe:
    """The pretraining's recipe that the arguments ask for.

    Raises:
        UserError: a bad value.
    """
    given = given_fields(arguments)
    return PretrainingRecipe(**{name: convert(name, PRETRAINING_FIELDS[name].kind, v) for name, v in given.items()})


def given_fields(arguments: argparse.Namespace) -> dict[str, str]:
    """The recipe's fields that the arguments set, by dotted name, as text."""
    fields = {
        name.removeprefix("field:"): value for name, value in vars(arguments).items() if name.startswith("field:")
    }
    return {name: value for name, value in fields.items() if value is not None}


def preset_table() -> str:
    """The presets and what sets them apart, a line each."""
    rows = [("preset", "things", "stuff", "images (h x w)", "epochs", "batch", "lr", "layout of --data")]
    for name in PRESETS:
        r = preset(name)
        size = " x ".join(map(str, r.dataset.image_size))
        kinds = (f"{r.concepts.things}", f"{r.concepts.stuff}" if r.concepts.stuff else "background")
        epochs = f"{r.training.epochs}" + (f" of {r.training.passes} passes" if r.training.passes > 1 else "")
        layout = "none: drawn" if r.dataset.layout == "shapes" else r.dataset.layout
        rows.append((name, *kinds, size, epochs, f"{r.training.batch_size}", f"{r.training.lr:g}", layout))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def run_job(job: Callable[[], None]) -> NoReturn:
    """Run a job's main function and exit; a user's mistake or Ctrl-C ends in one line, never a stack trace."""
    if "--verbose" not in sys.argv:
        # A thread of Ray's prints what its core tells of lost processes, past all loggers; read when Ray is imported.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        job()
    except KeyboardInterrupt:
        _fail("stopped; the same command goes on from what is done", 130)
    except Exception as error:
        # Ray wraps what a task or actor raised in errors of its own.
        cause = find_user_error(error)
        if cause is None:
            raise
        _fail(cause.line, 2)
    sys.exit(0)


def _fail(message: str, status: int) -> NoReturn:
    print(f"\n{message}" if sys.stderr.isatty() else message, file=sys.stderr, flush=True)
    sys.exit(status)
