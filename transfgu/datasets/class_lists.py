"""Read the classes of each benchmark from a JSON file: names, colours, and the class of each pixel value.

The classes of a benchmark are in the order of the published results, things first, then stuff; with a background it is
class 0. A pixel value is a class, or is ignored, or can't occur, which reveals a wrong data set.
"""

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import TypedDict

import numpy as np
from jaxtyping import Bool, Int16

from transfgu.errors import UserError
from transfgu.recipe import Recipe

Colour = tuple[int, int, int]


class _Entry(TypedDict):
    """One class list as stored: `values` is the class of each pixel value, None if it can't occur."""

    names: list[str]
    colours: list[str] | None  # hexadecimal
    values: list[int | None]
    ignored: list[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Classes:
    """The C classes of a data set's labels.

    Args:
        names: one per class; the background, if there is one, is class 0.
        colours: red, green, blue of each class, 0 to 255.
        label_map: class of each pixel value; -1 if it is ignored or can't occur.
        known: True for pixel values that can occur in a label.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    label_map: Int16[np.ndarray, "256"]
    known: Bool[np.ndarray, "256"]


def classes(recipe: Recipe) -> Classes:
    """Return the classes of a recipe: labels are read as these, and results have their names and colours.

    Raises:
        UserError: no such class list, or the recipe has another number of concepts.
    """
    name, count = recipe.dataset.classes, recipe.classes
    if name == "auto":
        # Values of such labels are bare numbers, so a name shows the index in the masks.
        word = "class" if recipe.labels else "concept"
        first = int(recipe.background)
        names = [f"{word} {i}" for i in range(first, recipe.classes)]
        return _as_indices((["background"] if recipe.background else []) + names, None)
    if name == "shapes":
        from transfgu.datasets import shapes

        found = _as_indices(list(shapes.CLASS_NAMES), shapes.CLASS_COLOURS)
    else:
        found = _benchmark(name)
    if len(found.names) != count:
        raise UserError(
            f"the class list {name} has {len(found.names)} classes, background included, but the recipe makes {count}: "
            "leave out --things and --stuff, or set --dataset.classes auto",
            code="classes-mismatch",
        )
    return found


def class_lists() -> tuple[str, ...]:
    """Return the names for `dataset.classes`."""
    return (*_data(), "shapes", "auto")


def index_type(classes: int) -> type[np.uint8] | type[np.uint16]:
    """Return the integer type of masks with so many classes."""
    return np.uint8 if classes <= 256 else np.uint16


@functools.cache
def palette(count: int) -> tuple[Colour, ...]:
    """Return `count` colours, each as far from the earlier ones as 9³ candidates allow; the first is black.

    Distances weight red, green and blue as eyes do (the "redmean" formula), so that colours next to each other in the
    list are distinguishable; a longer palette starts with a shorter one.
    """
    steps = np.linspace(0, 255, 9).round()
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    chosen = [0]
    distance = np.full(len(candidates), np.inf)
    while len(chosen) < min(count, len(candidates)):
        last = candidates[chosen[-1]]
        red = (candidates[:, 0] + last[0]) / 2
        weights = np.stack([2 + red / 256, np.full_like(red, 4), 2 + (255 - red) / 256], -1)
        distance = np.minimum(distance, (weights * (candidates - last) ** 2).sum(-1))
        chosen.append(int(distance.argmax()))
    colours = [(int(r), int(g), int(b)) for r, g, b in candidates[chosen]]
    return tuple(colours[i % len(colours)] for i in range(count))


def _as_indices(names: list[str], colours: tuple[Colour, ...] | None) -> Classes:
    """Return classes whose pixel values are their indices; 255 is ignored."""
    label_map = np.full(256, -1, np.int16)
    count = min(len(names), 255)
    label_map[:count] = np.arange(count)
    known = label_map >= 0
    known[255] = True
    # Without a background, black is used for ignored pixels.
    skip = 0 if names[0] == "background" else 1
    return Classes(
        names=tuple(names), colours=colours or palette(len(names) + skip)[skip:], label_map=label_map, known=known
    )


@functools.cache
def _data() -> dict[str, _Entry]:
    text = (resources.files("transfgu.datasets") / "class_lists.json").read_text()
    tree: dict[str, _Entry] = json.loads(text)
    return tree


def _benchmark(name: str) -> Classes:
    if name not in _data():
        raise UserError(
            f"there is no class list {name}; choose one of {', '.join(class_lists())}", code="class-list-unknown"
        )
    entry = _data()[name]
    names = tuple(entry["names"])
    label_map = np.full(256, -1, np.int16)
    known = np.zeros(256, bool)
    for value, index in enumerate(entry["values"]):
        if index is not None:
            label_map[value], known[value] = index, True
    for value in entry["ignored"]:
        known[value] = True
    skip = 0 if names[0] == "background" else 1
    listed = [tuple(bytes.fromhex(c)) for c in entry["colours"] or []]
    colours = tuple((r, g, b) for r, g, b in listed) or palette(len(names) + skip)[skip:]
    return Classes(names=names, colours=colours, label_map=label_map, known=known)
