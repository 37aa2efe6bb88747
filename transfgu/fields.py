"""Declare, check and describe the fields of a recipe: each has its meaning and unit once, as metadata.

The command line's ``--help`` and the documents are generated from the metadata.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from transfgu.errors import UserError

MISSING = object()
"""Marks a missing value where None is a valid one."""


def field(default: Any, doc: str, unit: str = "", **history: Any) -> Any:
    """Declare one field of a recipe.

    Args:
        default: its value unless a preset or the user sets another.
        doc: its meaning, for `--help` and the documents.
        unit: unit of its value.
        history: `before`, for a field that is newer than the first format: the value that earlier runs had; `was`, a
            tuple of its former dotted names.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "unit": unit, **history})


def check(good: bool, message: str, code: str = "field-range") -> None:
    """Raise UserError with `message` and `code` unless `good`."""
    if not good:
        raise UserError(message, code)


def listed(value: Any) -> Any:
    """Return a tuple as a list, as in YAML and JSON; other values are unchanged."""
    return list(value) if isinstance(value, tuple) else value


def written(value: Any) -> str:
    """Return a field's value in the syntax of flags: `320x320`, `0.5,0.4`, `true`; :func:`convert` reads it."""
    if isinstance(value, list | tuple):
        is_size = len(value) == 2 and all(isinstance(v, int) for v in value)
        return ("x" if is_size else ",").join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class FieldInfo:
    """One field as users see it: dotted name, type, meaning and unit."""

    name: str
    kind: Any
    doc: str
    unit: str
    before: Any = MISSING
    """The value that runs had before the field existed; MISSING for a field of the first format."""
    was: tuple[str, ...] = ()
    """Its former dotted names, the oldest first."""


def field_infos(recipe: type, prefix: str = "") -> dict[str, FieldInfo]:
    """Return every field of a recipe's dataclass by dotted name, including fields of components."""
    hints = get_type_hints(recipe)
    infos: dict[str, FieldInfo] = {}
    for f in dataclasses.fields(recipe):
        name, kind = prefix + f.name, hints[f.name]
        if dataclasses.is_dataclass(kind):
            infos |= field_infos(cast(type, kind), f"{name}.")
        else:
            infos[name] = FieldInfo(name, kind, **f.metadata)
    return infos


def convert(name: str, kind: Any, value: Any) -> Any:
    """Convert `value`, which may be text, to the type `kind` of field `name`.

    Lists are written ``1,2`` or ``1 2`` or ``1x2``.

    Raises:
        UserError: it is not of that type.
    """
    origin, args = get_origin(kind), get_args(kind)
    try:
        if origin is Literal:
            if value not in args:
                raise UserError(f"{name} must be one of {', '.join(map(str, args))}, not {value}", code="field-choice")
            return value
        if origin is tuple:
            items = (
                value.replace("x", " ").replace(",", " ").strip("[]() ").split()
                if isinstance(value, str)
                else list(value)
            )
            if args[-1] is not Ellipsis and len(items) != len(args):
                raise UserError(
                    f"{name} takes {len(args)} numbers, such as {'x'.join(['320'] * len(args))}, not {value}",
                    code="field-length",
                )
            return tuple(convert(name, args[0], i) for i in items)
        if kind is bool:
            words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            return value if isinstance(value, bool) else words[str(value).lower()]
        if kind is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        converted = kind(value)
        if kind is float and not math.isfinite(converted):
            raise ValueError
        return converted
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{name} must be {kind_name(kind)}, not {value!r}", code="field-type") from None


def kind_name(kind: Any) -> str:
    """Return a field's type as text."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        many = "a list of" if args[-1] is Ellipsis else f"{len(args)}"
        return f"{many} {'numbers' if args[0] is float else 'whole numbers'}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[cast(type, kind)]
