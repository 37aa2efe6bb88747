"""Check the format number in the files of a run, so that any later version can read or refuse them.

A version reads every format up to its own. The changes from one format to the next are listed here and in
`transfgu.recipe`, where a later field declares the value that earlier runs had.

==  ==========================================================================================================
1   No number in the files; recipes, manifests, checkpoints and trials as of version 0.1.0 at its first golden run.
2   Files carry the number: JSON and YAML as `format`, checkpoints in `digests.json` (which then lists its files
    under `files`), weight files as `transfgu_format` in their metadata.
==  ==========================================================================================================
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from transfgu.errors import UserError

FORMAT = 2
"""The format that this version writes."""
KEY = "format"
"""Name of the number in JSON and YAML."""
WEIGHTS_KEY = "transfgu_format"
"""Name of the number in the metadata of a weight file, where `format` is the library that wrote it."""


def stamp(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return `tree` with the format number added in front."""
    return {KEY: FORMAT, **tree}


def check(number: object, name: str) -> int:
    """Return the format of a file; 1 if it has no number.

    Args:
        number: the number in the file; None: none.
        name: name of the file in error messages.

    Raises:
        UserError: a later version wrote the file, or `number` is not a format.
    """
    if number is None:
        return 1
    try:
        found = int(str(number))
    except ValueError:
        found = 0
    if found < 1:
        raise UserError(
            f"{name} is damaged: {number!r} is not a format number; restore the file, or delete it", code="file-damaged"
        )
    if found > FORMAT:
        raise UserError(
            f"{name} has format {found}, but this version of transfgu reads formats up to {FORMAT}: "
            "install the version that wrote it, or a later one",
            code="format-newer",
        )
    return found


def read_json(data: bytes | str, name: str, remedy: str) -> dict[str, Any]:
    """Parse a JSON object of a run and check its format.

    Args:
        data: the file's content.
        name: name of the file in error messages.
        remedy: remedy for a damaged file.

    Returns:
        The object without its format number.

    Raises:
        UserError: the file is damaged, or has a newer format.
    """
    with damage(name, remedy):
        tree = json.loads(data)
        if not isinstance(tree, dict):
            raise ValueError("no JSON object")
    check(tree.pop(KEY, None), name)
    return tree


@contextlib.contextmanager
def damage(name: str, remedy: str) -> Iterator[None]:
    """Turn errors of parsing a run's own file into one line.

    Args:
        name: name of the file in the error message.
        remedy: remedy for a damaged file.

    Raises:
        UserError: the block raised a parser's error, or found a value missing or of another type.
    """
    try:
        yield
    # Errors of JSON and UTF-8 are ValueErrors; ten thousand nested brackets give a RecursionError.
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError):
        raise UserError(f"{name} is damaged: {remedy}", code="file-damaged") from None
