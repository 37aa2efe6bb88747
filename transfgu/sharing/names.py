"""Store the names that a user gives to the classes of a finished run.

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
"""File name of the names in the run's folder."""
IGNORE = "ignore"
"""Name for clusters that are no class: they form the last class, which matches no label and is not exported."""

_GREY = (128, 128, 128)
_NAMES = "names"


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassTable:
    """The classes of predictions, after names were given.

    Args:
        names: one unique name per class; :data:`IGNORE`, if present, is the last.
        colours: red, green, blue (0 to 255) of each class: the colour of the first unnamed class in it.
        index_of: index of the class by index of the unnamed class.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    index_of: Int[np.ndarray, " unnamed"]

    @property
    def merged(self) -> bool:
        """Return True if the classes differ from the unnamed ones in more than their names."""
        return len(self.names) < len(self.index_of) or self.ignored > 0

    @property
    def ignored(self) -> int:
        """Return the number of ignored classes at the end: 0 or 1."""
        return int(self.names[-1] == IGNORE)


def named(names: Sequence[str], colours: Sequence[Colour], given: Mapping[int, str]) -> ClassTable:
    """Merge classes with the same name.

    A merged class takes the position of the first class with its name.

    Args:
        names: names of the unnamed classes.
        colours: colours of the unnamed classes.
        given: new names by index of the unnamed class; classes without an entry keep their names.
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
    """Parse names as a user writes them, in YAML.

    Args:
        text: a mapping from the index or unnamed name of a class to its new name; or a list, or lines, of all names in
            the order of the indices.
        names: names of the unnamed classes.
        file: name of the file in error messages.

    Returns:
        The new names by index.

    Raises:
        UserError: not such a mapping, an index or a name without a class, or a list of another length.
    """
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not YAML in UTF-8: {error}", code="names-unreadable") from None
    if isinstance(tree, str):
        tree = [line.strip() for line in (text.decode("utf-8-sig") if isinstance(text, bytes) else text).splitlines()]
        tree = [line for line in tree if line]
    if isinstance(tree, list):
        if len(tree) != len(names):
            raise UserError(
                f"{file} lists {len(tree)} names, but there are {len(names)} classes: list one for each, in the order "
                "of their indices, or name some, such as {3: cow}",
                code="names-count",
            )
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{file} names no class: write one line per class, such as 3: cow", code="names-unreadable")
    found = {}
    for key, value in tree.items():
        index = names.index(key) if key in names else key
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(names):
            raise UserError(
                f"{file} names {key}, which is not a class: give an index from 0 to {len(names) - 1}, or one of "
                f"{', '.join(names[:3])}, ...",
                code="names-class-unknown",
            )
        if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value).strip():
            raise UserError(
                f'{file} gives class {key} the name {value!r}, which is not text: quote it, as in "{key}: "no""',
                code="names-unreadable",
            )
        found[index] = " ".join(str(value).split())
    return found


def read(run: Run) -> dict[int, str]:
    """Return the names that were given to a run's classes, by index; empty if there are none.

    Raises:
        UserError: the file is damaged, or has a newer format.
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
    """Return the content of a file of names, which :func:`read` reads."""
    tree: dict[str, Any] = formats.stamp({_NAMES: {int(index): name for index, name in sorted(given.items())}})
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def write(run: Run, given: Mapping[int, str]) -> None:
    """Store names in a run's folder; without names, remove stored ones."""
    if given:
        storage.write_bytes(run.file(FILE), to_yaml(given).encode())
    elif storage.exists(run.file(FILE)):
        storage.delete(run.file(FILE))
