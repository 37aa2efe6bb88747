"""Damage bytes and trees of plain values, reproducibly."""

import copy
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1e308,
        float("inf"),
        float("nan"),
        2**63,
        -(2**31),
        "",
        "\0",
        "é" * 300,
        [],
        {},
        [[]],
        {"a": None},
    ),
    *("../../etc", "s3://", "!!python/object:os.system", "1e999", "=cmd", [1, "a", None], {"": {"": {}}}),
)
_EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\x01\0\0\0", b"\0\0\x10\0")


def damaged(data: bytes, others: Sequence[bytes], random: np.random.Generator) -> bytes:
    """Return `data` after one to four changes.

    Args:
        data: bytes to change.
        others: files from which pieces are taken.
        random: source of random numbers.
    """
    found = bytearray(data)
    for _ in range(int(random.integers(1, 5))):
        at = int(random.integers(0, len(found) + 1))
        if random.random() < 0.5:  # headers lie in front
            at = min(at, int(random.integers(0, 64)))
        length = int(random.choice([1, 2, 4, 16, 256]))
        kind = int(random.integers(0, 7))
        if kind == 0 and at < len(found):
            found[at] ^= int(random.integers(1, 256))
        elif kind == 1:
            del found[at:]
        elif kind == 2:
            del found[at : at + length]
        elif kind == 3:
            found[at:at] = random.bytes(length)
        elif kind == 4:
            extreme = _EXTREMES[int(random.integers(len(_EXTREMES)))]
            found[at : at + len(extreme)] = extreme
        elif kind == 5:
            found[at:at] = found[at : at + length] * int(random.integers(1, 20))
        else:
            other = others[int(random.integers(len(others)))]
            start = int(random.integers(0, len(other) + 1))
            found[at : at + length] = other[start : start + length]
    return bytes(found)


def odd_tree(tree: Any, random: np.random.Generator) -> Any:
    """Return a tree of plain values with one to three values replaced by unusual ones, removed, or nested deeply."""
    found = json.loads(json.dumps(tree))
    for _ in range(int(random.integers(1, 4))):
        places: list[tuple[Any, Any]] = []
        waiting = [found]
        while waiting:
            node = waiting.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
            for key in keys:
                places.append((node, key))
                waiting.append(node[key])
        value = copy.deepcopy(ODD[int(random.integers(len(ODD)))])
        if not places:
            return value
        node, key = places[int(random.integers(len(places)))]
        kind = random.random()
        if kind < 0.2:
            del node[key]
        elif kind < 0.3:
            for _ in range(60):
                value = [value]
            node[key] = value
        else:
            node[key] = value
    return found
