"""Build the command line from the recipe: one flag per field, from the metadata of the fields.

A flag is the dotted name of a field (``--training.omega_1``), or its last part if only one component has it
(``--omega_1``). Mistakes are reported in one line.
"""

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from transfgu.errors import UserError
from transfgu.fields import FieldInfo, convert, kind_name, written
from transfgu.methods import METHODS, TRANSFGU
from transfgu.presets import PRESETS, published
from transfgu.pretraining.recipe import PRETRAINING_FIELDS, VIEWS, PretrainingRecipe
from transfgu.recipe import FIELDS, SHORT_NAMES, ComputeRecipe, Recipe, from_yaml, preset
from transfgu.runtime import stopping
from transfgu.runtime.failures import find_user_error
from transfgu.store import storage, waits

if TYPE_CHECKING:
    from transfgu.store.artifacts import Run

GROUPS = {
    "": "data and seed",
    "dataset": "images and labels",
    "encoder": "encoder (frozen, self-supervised ViT)",
    "windows": "features: sliding windows",
    "concepts": "concepts: K-Means over class tokens",
    "pseudo_labels": "pseudo labels: concept maps",
    "decoder": "mask decoder",
    "training": "bootstrapped training",
    "iic": "method iic",
    "picie": "methods picie and picie-no-aux",
    "maskcontrast": "method maskcontrast",
    "evaluation": "evaluation",
    "compute": "resources, cache and tracking (do not change results)",
}
"""Titles of the recipe's components, in the order of the method."""


COMMON = (
    *(
        "method",
        "data",
        "labels",
        "limit",
        "seed",
        "encoder.name",
        "encoder.weights",
        "concepts.things",
        "concepts.stuff",
    ),
    *("training.epochs", "training.lr", "training.batch_size", "evaluation.protocol"),
    *("compute.workers", "compute.actors", "compute.track"),
)
"""Fields shown by `--help`; `--help-all` shows every field."""

EVALUATED = ("data", "labels", "limit", "dataset", "encoder", "concepts.things", "concepts.stuff", "decoder.weights")
"""Fields and components on which the score of a decoder depends, besides `evaluation` and :data:`UNTRAINED`."""

_OF_TRAINING = tuple(
    f"compute.{name}" for name in ("workers", "resize_seconds", "resident_gib", "cache_folder", "cache_gib", "track")
)
UNTRAINED = tuple(name for name in FIELDS if name.startswith("compute.") and name not in _OF_TRAINING)
"""Fields of `compute` that have an effect without training."""


def program(command: str) -> str:
    """Return the name by which a command was called: `transfgu train`, or `python jobs/train.py` in a clone."""
    script = Path(sys.argv[0])
    return f"python jobs/{command}.py" if script.parent.name == "jobs" else f"transfgu {command}"


class Parser(argparse.ArgumentParser):
    """An argument parser with errors of one line, which suggests similar flags for a misspelt one.

    `--help` shows the flags that most runs need, `--help-all` shows every flag.

    Args:
        description: description of the command.
        command: its name, for the usage line.
        words: positional arguments, for the usage line.
    """

    def __init__(self, description: str, command: str = "", words: str = "") -> None:
        prog = program(command) if command else None
        usage = " ".join(filter(None, (prog, words, "[--FLAG VALUE ...]"))) if command else None
        super().__init__(
            prog=prog, usage=usage, description=description, allow_abbrev=False, formatter_class=_Help, add_help=False
        )
        self._rare: list[argparse.Action] = []
        self.add_argument("-h", "--help", action=_ShowHelp, help="show the flags that most runs need")
        self.add_argument("--help-all", action=_ShowHelp, help="show every flag")

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        raise UserError(f"{message} (--help shows the flags)", code="flag-invalid")

    def mark_rare(self, action: argparse.Action) -> None:
        """Hide a flag from `--help`; `--help-all` shows it."""
        self._rare.append(action)

    def short_help(self) -> str:
        """Return the text of `--help`: all flags except the rare ones, and the number of those."""
        texts = [(action, action.help) for action in self._rare]
        for action in self._rare:
            action.help = argparse.SUPPRESS
        shown = self.format_help()
        for action, text in texts:
            action.help = text
        more = sum(text != argparse.SUPPRESS for _, text in texts)
        return shown + (f"\n--help-all shows {more} more settings.\n" if more else "")

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the arguments.

        Raises:
            UserError: an unknown flag, a missing value, or an extra word.
        """
        known, rest = self.parse_known_args(arguments)
        if rest:
            if not rest[0].startswith("-"):
                raise UserError(f"{rest[0]} is an extra word (--help shows the usage)", code="word-unexpected")
            flag = rest[0].split("=")[0]
            flags = [f for action in self._actions for f in action.option_strings if action.help != argparse.SUPPRESS]
            near = difflib.get_close_matches(flag, flags, n=3, cutoff=0.5)
            raise UserError(
                f"there is no flag {flag}; {'similar: ' + ', '.join(near) if near else '--help-all shows all'}",
                code="flag-unknown",
            )
        return known


class _ShowHelp(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *given: Any, **_: Any) -> NoReturn:
        """Print the help and exit."""
        assert isinstance(parser, Parser)
        print(parser.format_help() if given[-1] == "--help-all" else parser.short_help(), end="")
        parser.exit()


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **{**settings, "max_help_position": 34, "width": 120})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Return the names of a flag, the shortest first, followed by its value once."""
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(sorted(action.option_strings, key=len))
        if action.nargs == 0:
            return names
        return f"{names} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


def named_preset(words: Sequence[str]) -> str:
    """Return the preset whose defaults the help shows: the first preset among the words, or `shapes`."""
    return next((word for word in words if word in PRESETS), "shapes")


def named_method(words: Sequence[str]) -> str:
    """Return the method whose flags and defaults the help shows: the value of `--method`, or TransFGU."""
    after = ("--method", "")
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, _, value = word.partition("=")
        if name == after[0]:
            after = (name, value or following)
    return after[1] if after[1] in METHODS else TRANSFGU


def add_recipe(
    parser: Parser, words: Sequence[str] = (), preset_flag: str = "", shown: Collection[str] | None = None
) -> None:
    """Add the preset, positional or as `preset_flag`, and one flag per field of the recipe.

    Args:
        parser: receives the flags.
        words: the command line; the help shows the defaults of its preset and method, and the method's flags.
        preset_flag: name of the flag for the preset; empty: the preset is a positional argument.
        shown: fields or whole components that the command depends on; None: all. Flags of other fields are accepted, so
            that all commands take the same flags, but not shown.
    """
    named: dict[str, Any] = {"dest": "preset"} if preset_flag else {"nargs": "?"}
    what = f"one of {', '.join(PRESETS)} (default: shapes)"
    parser.add_argument(preset_flag or "preset", metavar="PRESET", help=what, **named)
    parser.add_argument("--recipe", metavar="URI", help="start from this YAML recipe instead of a preset")
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe as YAML and exit")
    parser.mark_rare(
        parser.add_argument(
            "--published",
            action="store_true",
            help="do as the published code where this project does otherwise: K-Means' start, order of images, colours "
            "per batch, and for COCO nearest-neighbour images",
        )
    )
    base = named_preset(words)
    usual = preset(base, named_method(words))
    of_method = "" if usual.method == TRANSFGU else f" and method {usual.method}"
    parser.epilog = f"Defaults are those of preset {base}{of_method}; give another preset to see its defaults."
    groups = {c: parser.add_argument_group(title) for c, title in GROUPS.items()}
    of_others = usual.others_fields()
    for name, default in usual.flat().items():
        if name == "preset":
            continue
        component = name.rpartition(".")[0]
        action = _add_recipe_field(groups[component], name, default)
        is_shown = (shown is None or name in shown or component in shown) and name not in of_others
        if not is_shown:
            action.help = argparse.SUPPRESS
        if not is_shown or not (name in COMMON or (shown and name == "decoder.weights")):
            parser.mark_rare(action)


def add_output(parser: Parser, quiet: str = "print nothing but errors") -> None:
    """Add `--quiet` and `--verbose`."""
    parser.add_argument("--quiet", action="store_true", help=quiet)
    parser.add_argument("--verbose", action="store_true", help="show Ray's own messages")


def check_out(out: str, inputs: str) -> None:
    """Raise UserError if the folder `out` can't be written, or is inside the folder `inputs`, which is read."""
    if storage.within(out, inputs):
        raise UserError(
            f"--out {storage.shown(out)} is inside {storage.shown(inputs)}: choose a separate folder",
            code="folders-nested",
        )
    storage.check_writable(out)


def files_below(folder: str) -> dict[str, str]:
    """Return the URIs of all files below a folder by their relative path, in the order of these.

    Raises:
        UserError: the folder can't be read.
    """
    storage.check_readable(folder)
    root = storage.absolute(folder).rstrip("/")
    return dict(sorted((storage.absolute(uri)[len(root) + 1 :], uri) for uri in storage.list_files(folder)))


def print_config(recipe: Recipe, run: "Run | None" = None) -> None:
    """Print the resolved recipe as YAML, as it would be written to `recipe.yaml` of the run."""
    given = run.given(recipe) if run else None
    print((run.continued(recipe) if run else recipe).to_yaml(given), end="")


def add_compute(parser: Parser) -> None:
    """Add one flag per field of `compute` that has an effect without training."""
    group = parser.add_argument_group("resources (do not change results)")
    flat = preset("shapes").flat()
    for name in FIELDS:
        if name.startswith("compute.") and name not in ("compute.workers", "compute.track"):
            action = _add_recipe_field(group, name, flat[name])
            if name not in UNTRAINED:
                action.help = argparse.SUPPRESS
            if name not in COMMON:
                parser.mark_rare(action)


def compute_of(arguments: argparse.Namespace) -> ComputeRecipe:
    """Return `compute` with the fields set by the arguments of :func:`add_compute`.

    Raises:
        UserError: a bad value.
    """
    given = given_fields(arguments).items()
    return ComputeRecipe(
        **{name.removeprefix("compute."): convert(name, FIELDS[name].kind, text) for name, text in given}
    )


def _add_recipe_field(group: argparse._ArgumentGroup, name: str, default: Any) -> argparse.Action:
    short = [f"--{brief}" for brief, full in SHORT_NAMES.items() if full == name]
    return _add_field(group, [f"--{name}", *short], FIELDS[name], default)


def add_pretraining_recipe(parser: Parser) -> None:
    """Add one flag per field of the pretraining's recipe."""
    group = parser.add_argument_group("pretraining")
    for field in dataclasses.fields(PretrainingRecipe):
        action = _add_field(group, [f"--{field.name}"], PRETRAINING_FIELDS[field.name], field.default)
        if field.name not in ("steps", "batch_size", "learning_rate", "patch_size", "width", "depth", "heads", "seed"):
            parser.mark_rare(action)


def _add_field(group: argparse._ArgumentGroup, flags: list[str], info: FieldInfo, default: Any) -> argparse.Action:
    unit = f" [{info.unit}]" if info.unit else ""
    note = f" (default: {written(default)})" if default != "" else ""
    extra: dict[str, Any] = {"nargs": "?", "const": "true"} if info.kind is bool else {}
    return group.add_argument(
        *flags,
        dest=f"field:{info.name}",
        metavar="URI" if info.name in ("data", "labels") else _metavar(info.kind),
        help=f"{info.doc}{unit}{note}".replace("%", "%%"),
        **extra,
    )


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X", str: "TEXT", bool: "BOOL"}.get(kind) or (
        "|".join(kind_name(kind).removeprefix("one of ").split(", ")) if kind_name(kind).startswith("one of") else "N,N"
    )


def recipe_of(arguments: argparse.Namespace, base: Recipe | None = None) -> Recipe:
    """Return the recipe that the arguments describe.

    Args:
        arguments: the parsed command line.
        base: the recipe to start from; None: that of `--recipe`, or the preset.

    Raises:
        UserError: unknown preset or method, a bad value, or a field that the method does not have.
    """
    given = given_fields(arguments)
    if base:
        recipe = base
    elif arguments.recipe:
        if arguments.preset:
            raise UserError("give a PRESET or --recipe, not both", code="flags-conflict")
        recipe = from_yaml(storage.read_bytes(arguments.recipe), storage.shown(arguments.recipe))
    else:
        recipe = preset(arguments.preset or "shapes", given.get("method", TRANSFGU))
    if arguments.published:
        asked = given.get("method", recipe.method)
        if asked != TRANSFGU:
            raise UserError(
                f"--published is an option of method transfgu only, not of {asked}: leave it out",
                code="option-of-another-method",
            )
        recipe = recipe.with_fields(published(recipe.dataset.layout))
    return _with_given(recipe, given)


def _with_given(recipe: Recipe, given: Mapping[str, str]) -> Recipe:
    """Return a recipe with the fields from a command line.

    Raises:
        UserError: a bad value, or a field that the method does not have.
    """
    made = recipe.with_fields(given)
    others = made.others_fields()
    for name in given:
        if other := others.get(name):
            raise UserError(
                f"--{name} is not an option of method {made.method}, only of others, such as {other}: leave it out",
                code="option-of-another-method",
            )
    return made


def pretraining_recipe_of(arguments: argparse.Namespace, views: str = "drawn") -> PretrainingRecipe:
    """Return the recipe of pretraining that the arguments describe.

    Args:
        arguments: of a parser with :func:`add_pretraining_recipe`.
        views: the entry of `VIEWS` with the defaults of values that the arguments don't set.

    Raises:
        UserError: a bad value.
    """
    fields = {**VIEWS[views], **given_fields(arguments)}
    return PretrainingRecipe(**{name: convert(name, PRETRAINING_FIELDS[name].kind, v) for name, v in fields.items()})


def given_fields(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the recipe's fields set by the arguments, by dotted name, as text."""
    fields = {
        name.removeprefix("field:"): value for name, value in vars(arguments).items() if name.startswith("field:")
    }
    return {name: value for name, value in fields.items() if value is not None}


def preset_table() -> str:
    """Return a table of the presets and their main fields, one line each."""
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
    """Run a job's main function and exit; mistakes of users, SIGINT and SIGTERM print one line and no stack trace."""
    if "--verbose" not in sys.argv:
        # A thread of Ray prints messages about lost processes past all loggers; this is read when Ray is imported.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    stopping.install()
    waits.tell(_say)
    status = 0
    try:
        job()
    except BaseException as error:
        if stopping.requested() or isinstance(error, KeyboardInterrupt):
            stopping.end()
        if not isinstance(error, Exception):
            raise
        if "transfgu.runtime.connect" in sys.modules:
            from transfgu.runtime import ray_watch

            ray_watch.check()  # the error may be a consequence of the end of Ray's processes
        # Ray wraps exceptions of tasks and actors in its own.
        cause = find_user_error(error)
        if cause is None:
            raise
        _say(cause.line)
        status = 2
    try:
        if stopping.requested():  # code that caught the interrupt continued
            stopping.end()
        if "transfgu.runtime.connect" in sys.modules:
            from transfgu.runtime import connect

            connect.disconnect()
        stopping.ignore()
    except KeyboardInterrupt:
        stopping.end()
    sys.exit(status)


def _say(line: str) -> None:
    """Print a line on standard error, below a line of progress if there is one."""
    print(f"\n{line}" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)
