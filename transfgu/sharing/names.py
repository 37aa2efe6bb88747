"""Keep the names that a user gives to the classes of a finished run in a file.

A name belongs to a cluster, and clusters with the same name are one class. So naming and merging are a table of
integers from clusters to classes, and deleting the file undoes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from jaxtyping import Int

from transfgu import formats
from transfgu.datasets.class_lists import Colour
from transfgu.errors import UserError
from transfgu.store import storage
from transfgu.store.artifacts import Run

FILE = "names.yaml"
"""The names, in the run's folder."""
IGNORE = "ignore"
"""The name of clusters that stand for nothing: the last class, matched to no label, left out of exports."""

_GREY = (128, 128, 128)
_NAMES = "names"


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassTable:
    """The classes that predictions are in, after names were given.

    Args:
        names: one per class, each once; :data:`IGNORE` is the last where there is one.
        colours: red, green, blue of each class, 0 to 255: that of the first class that it was made of.
        index_of: the class of each unnamed class, by its index.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    index_of: Int[np.ndarray, " unnamed"]

    @property
    def merged(self) -> bool:
        """Whether classes are other than the unnamed ones by more than their names."""
        return len(self.names) < len(self.index_of) or self.ignored > 0

    @property
    def ignored(self) -> int:
        """How many of the last classes stand for nothing: 0 or 1."""
        return int(self.names[-1] == IGNORE)


def named(names: Sequence[str], colours: Sequence[Colour], given: Mapping[int, str]) -> ClassTable:
    """Join the classes of one name.

    Classes keep their order: each stands where the first class of its name stood.

    Args:
        names: of the unnamed classes.
        colours: of the unnamed classes.
        given: names by the index of an unnamed class; a class without one keeps its name.
    """
    new = [given.get(index, name) for index, name in enumerate(names)]
    ordered = [name for name in dict.fromkeys(new) if name != IGNORE]
    painted = [colours[new.index(name)] for name in ordered]
    if IGNORE in new:
        ordered, painted = [*ordered, IGNORE], [*painted, _GREY]
    return ClassTable(
        names=tuple(ordered), colours=tuple(painted), index_of=np.array([ordered.index(name) for name in new])
    )


def parse(text: str | bytes, names: Sequence[str], file: str) -> dict[int, str]:
    """Read names as a user writes them, in YAML.

    Args:
        text: a mapping of a class's index, or its present unnamed name, to its new name; or a list, or lines, of all
            names in the order of the indices.
        names: of the unnamed classes.
        file: what an error calls the text.

    Returns:
        The new names by index.

    Raises:
        UserError: no such mapping, an index or a name that is no class, or a list of another length.
    """
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is no YAML in UTF-8: {error}", code="names-unreadable") from None
    if isinstance(tree, str):
        tree = [line.strip() for line in (text.decode("utf-8-sig") if isinstance(text, bytes) else text).splitlines()]
        tree = [line for line in tree if line]
    if isinstance(tree, list):
        if len(tree) != len(names):
            raise UserError(
                f"{file} lists {len(tree)} names, and there are {len(names)} classes: list one for each, in the order "
                "of their indices, or name some as in {3: cow}",
                code="names-count",
            )
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{file} names no class: write a line for each, as in 3: cow", code="names-unreadable")
    found = {}
    for key, value in tree.items():
        index = names.index(key) if key in names else key
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(names):
            raise UserError(
                f"{file} names {key}, which is no class: give an index from 0 to {len(names) - 1}, or one of "
                f"{', '.join(names[:3])}, ...",
                code="names-class-unknown",
            )
        if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value).strip():
            raise UserError(
                f'{file} gives class {key} the name {value!r}, which is no text: put it in quotes, as in "{key}: "no""',
                code="names-unreadable",
            )
        found[index] = " ".join(str(value).split())
    return found


def read(run: Run) -> dict[int, str]:
    """Return the names that were given to a run's classes, by index; empty where there are none.

    Raises:
        UserError: the file is damaged, or of a format to come.
    """
    uri = run.file(FILE)
    text = storage.read_bytes_or_none(uri)
    if text is None:
        return {}
    name = storage.shown(uri)
    with formats.damage(name, "delete it, and name the classes again"):
        try:
            tree = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError from error
        formats.check(tree.get(formats.KEY), name)
        return {int(index): str(value) for index, value in tree[_NAMES].items()}


def to_yaml(given: Mapping[int, str]) -> str:
    """Return names as a run keeps them; :func:`read` reads them back."""
    tree: dict[str, Any] = formats.stamp({_NAMES: {int(index): name for index, name in sorted(given.items())}})
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def write(run: Run, given: Mapping[int, str]) -> None:
    """Keep names in a run's folder, or take back those that are there where none are given."""
    if given:
        storage.write_bytes(run.file(FILE), to_yaml(given).encode())
    elif storage.exists(run.file(FILE)):
        storage.delete(run.file(FILE))
