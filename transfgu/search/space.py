"""Parse and sample the search space: one range per searched field, such as ``omega_1=loguniform(0.1,10)``.

Errors in a range are found before anything starts, by building the recipes at its ends.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from transfgu.errors import UserError
from transfgu.fields import convert, kind_name
from transfgu.methods import TRANSFGU
from transfgu.recipe import FIELDS, Recipe, field_name

Number = int | float
Parameters = dict[str, Number]
"""Values of the searched fields in one trial, by the names of the ranges."""

ALPHA = "alpha"
"""A shorthand, not a field: a constant alpha, instead of one that rises after each teacher update as published."""

DEFAULT = (
    "omega_1=loguniform(0.1,10)",
    "omega_2=loguniform(0.03,3)",
    "alpha_start=uniform(0,0.1)",
    "alpha_step=choice(0,0.01)",
)
"""A decade around the published values (1, 0.3, 0.03 rising by 0.01); with a step of 0 alpha is constant."""
DEFAULT_OF_OTHERS = ("lr=loguniform(1e-5,1e-2)",)
"""For methods that have no loss weights to search."""
DEFAULT_GRID = (
    "omega_1=grid(0.3,1,3)",
    "omega_2=grid(0.1,0.3,1)",
    "alpha_start=grid(0.03,0.1)",
    "alpha_step=grid(0,0.01)",
)
"""The same, for a grid."""

KINDS = {
    "uniform": "uniform(low,high)",
    "loguniform": "loguniform(low,high)",
    "randint": "randint(low,high)",
    "choice": "choice(a,b,...)",
    "grid": "grid(a,b,...)",
}
"""Kinds of ranges and their syntax; randint includes both ends."""

_LISTED = ("choice", "grid")


@dataclass(frozen=True, kw_only=True)
class Range:
    """The range of one field."""

    name: str
    """The field's dotted name, or `alpha`."""
    kind: str
    """One of `KINDS`."""
    values: tuple[Number, ...]
    """Low and high, or the values themselves."""

    @property
    def log(self) -> bool:
        """True if its axis is logarithmic."""
        return self.kind == "loguniform"

    @property
    def listed(self) -> tuple[Number, ...] | None:
        """Its values, if they are countable."""
        if self.kind == "randint":
            return tuple(range(int(self.values[0]), int(self.values[1]) + 1))
        return self.values if self.kind in _LISTED else None

    def draw(self, random: np.random.Generator) -> Number:
        """Draw a random value."""
        if self.kind in _LISTED:
            return self.values[int(random.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "randint":
            return int(random.integers(int(low), int(high) + 1))
        if self.log:
            return float(np.clip(math.exp(random.uniform(math.log(low), math.log(high))), low, high))
        return float(random.uniform(low, high))

    def __str__(self) -> str:
        return f"{self.name}={self.kind}({','.join(f'{v:g}' for v in self.values)})"


@dataclass(frozen=True)
class Space:
    """All ranges of a search."""

    ranges: tuple[Range, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The searched fields, in order."""
        return tuple(r.name for r in self.ranges)

    def draw(self, seed: int, number: int) -> Parameters:
        """Draw the values of trial `number` in a random search; they depend on the seed and the number only."""
        random = np.random.default_rng([seed, number])
        return {r.name: r.draw(random) for r in self.ranges}

    def grid(self) -> list[Parameters]:
        """Return every combination; the last field changes fastest.

        Raises:
            UserError: a range whose values can't be counted.
        """
        axes = []
        for r in self.ranges:
            if r.listed is None:
                raise UserError(
                    f"a grid needs values, and {r} is a range: write {r.name}=grid(a,b,...)",
                    code="search-grid-unlisted",
                )
            axes.append(r.listed)
        return [dict(zip(self.names, values, strict=True)) for values in itertools.product(*axes)]

    def touches(self, fields: Mapping[str, object]) -> bool:
        """Return True if one of these fields is searched."""
        return any(name in fields for r in self.ranges for name in _fields({r.name: 0}))

    def shown(self) -> list[str]:
        """Return the ranges as text."""
        return [str(r) for r in self.ranges]


def default(recipe: Recipe, searcher: str) -> tuple[str, ...]:
    """Return the ranges that are searched by default."""
    if recipe.method == TRANSFGU:
        return DEFAULT_GRID if searcher == "grid" else DEFAULT
    return ("lr=grid(1e-4,1e-3,1e-2)",) if searcher == "grid" else DEFAULT_OF_OTHERS


def parse(texts: Sequence[str], recipe: Recipe) -> Space:
    """Parse ``FIELD=KIND(...)`` texts to a space.

    Args:
        texts: one per field; the name may be short if only one component has the field.
        recipe: the recipe into which a trial's values are put.

    Raises:
        UserError: an unknown field, a field that is not numeric or changes no result, a range that is empty or can't be
            read, or a range with ends that the recipe refuses.
    """
    ranges = [_parse(text, recipe) for text in texts]
    fields = [name for r in ranges for name in _fields({r.name: 0})]
    twice = next((name for i, name in enumerate(fields) if name in fields[:i]), None)
    if twice:
        raise UserError(f"--search sets {twice} twice: give each field one range", code="search-field-twice")
    return Space(tuple(ranges))


def apply(recipe: Recipe, parameters: Mapping[str, Number]) -> Recipe:
    """Return the recipe of a trial.

    Raises:
        UserError: values that the recipe refuses.
    """
    return recipe.with_fields(_fields(parameters))


def _fields(parameters: Mapping[str, Number]) -> Parameters:
    """Return a trial's values as fields of the recipe."""
    fields = {name: value for name, value in parameters.items() if name != ALPHA}
    if ALPHA in parameters:
        held = parameters[ALPHA]
        fields |= {"training.alpha_start": held, "training.alpha_step": 0.0, "training.alpha_end": held}
    return fields


def _parse(text: str, recipe: Recipe) -> Range:
    match = re.fullmatch(r"\s*([\w.]+)\s*=\s*(\w+)\s*\(([^()]*)\)\s*", text)
    if not match or match[2] not in KINDS:
        raise UserError(
            f"--search {text} can't be read: write FIELD={', FIELD='.join(KINDS.values())}", code="search-range-invalid"
        )
    given, kind, inside = match[1], match[2], match[3]
    name = ALPHA if given == ALPHA else field_name(given)
    whole = _check_field(name, recipe)
    words = [word.strip() for word in inside.split(",")] if inside.strip() else []
    values: tuple[Number, ...] = tuple(convert(name, int if whole else float, word) for word in words)
    _check_values(text, kind, values, whole=whole)
    found = Range(name=name, kind=kind, values=values)
    for value in values:
        try:
            apply(recipe, {name: value})
        except UserError as error:
            raise UserError(f"--search {text}: {error}", code=error.code) from None
    return found


def _check_field(name: str, recipe: Recipe) -> bool:
    """Return True if the field has whole numbers; raise UserError if it can't be searched."""
    if other := recipe.others_fields().get("training.alpha_start" if name == ALPHA else name):
        raise UserError(
            f"{name} can't be searched: method {recipe.method} does not have it ({other} has)",
            code="option-of-another-method",
        )
    if name == ALPHA:
        return False
    kind = FIELDS[name].kind
    if kind not in (int, float):
        raise UserError(
            f"{name} can't be searched: it is {kind_name(kind)}, and a search needs a numeric field",
            code="search-field-unsupported",
        )
    if name.startswith("compute.") or name in ("encoder.batch_size", "evaluation.batch_size"):
        raise UserError(f"{name} can't be searched: it changes no result", code="search-field-unsupported")
    return bool(kind is int)


def _check_values(text: str, kind: str, values: tuple[Number, ...], *, whole: bool) -> None:
    if kind in _LISTED:
        if not values:
            raise UserError(f"--search {text} is an empty range: write at least one value", code="search-range-empty")
        if len(set(values)) < len(values):
            raise UserError(f"--search {text} names a value twice", code="search-range-invalid")
        return
    if len(values) != 2:
        raise UserError(f"--search {text} can't be read: write {KINDS[kind]}", code="search-range-invalid")
    low, high = values
    if low > high or (low == high and kind != "randint"):
        raise UserError(
            f"--search {text} is an empty range: the first value must be the smaller", code="search-range-empty"
        )
    if kind == "loguniform" and low <= 0:
        raise UserError(f"--search {text} must start above 0, because of the logarithm", code="search-range-invalid")
    if whole != (kind == "randint"):
        remedy = "randint(low,high), choice or grid" if whole else "uniform(low,high), loguniform, choice or grid"
        raise UserError(
            f"--search {text}: that field takes {'whole ' if whole else ''}numbers; write {remedy}",
            code="search-range-invalid",
        )
