"""The format of the files that a run writes: a number in each, so that any later version can read or refuse them.

A version reads every format up to its own. What changed from one to the next is written down here and in
`transfgu.recipe`, where a field that came later says which value the runs before it had.

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
"""The number's name in JSON and YAML."""
WEIGHTS_KEY = "transfgu_format"
"""Its name in the metadata of a weight file, where `format` means the library that wrote it."""


def stamp(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return `tree` with the format's number in front, ready to be written."""
    return {KEY: FORMAT, **tree}


def check(number: object, name: str) -> int:
    """Return the format of a file, 1 where it carries no number.

    Args:
        number: what the file says; None: nothing.
        name: what an error calls the file.

    Raises:
        UserError: a later version wrote the file, or `number` is no format.
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
            f"{name} has format {found}, and this version of transfgu reads formats up to {FORMAT}: "
            "install the version that wrote it, or a later one",
            code="format-newer",
        )
    return found


def read_json(data: bytes | str, name: str, remedy: str) -> dict[str, Any]:
    """Parse a JSON object of ours and check its format.

    Args:
        data: the file's content.
        name: what an error calls the file.
        remedy: what the user should do about a damaged file.

    Returns:
        The object without its format's number.

    Raises:
        UserError: the file is damaged, or of a format to come.
    """
    with damage(name, remedy):
        tree = json.loads(data)
        if not isinstance(tree, dict):
            raise ValueError("no JSON object")
    check(tree.pop(KEY, None), name)
    return tree


@contextlib.contextmanager
def damage(name: str, remedy: str) -> Iterator[None]:
    """Turn whatever a reader of our own files stumbles over into one line.

    Args:
        name: what the error calls the file.
        remedy: what the user should do about it.

    Raises:
        UserError: the body raised an error of a parser, or of a value that is missing or of another type.
    """
    try:
        yield
    # JSON's and UTF-8's are ValueErrors; a bracket that is opened ten thousand times is a RecursionError.
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError):
        raise UserError(f"{name} is damaged: {remedy}", code="file-damaged") from None
