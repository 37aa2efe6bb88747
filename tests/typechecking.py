"""Check arguments and results of a function from its first call on.

Decorating takes beartype a millisecond for each of the library's functions, and a process of the suite calls few of
them.
"""

import functools
from collections.abc import Callable
from typing import Any

from beartype import beartype


def check_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, decorated by beartype as soon as it is called."""
    checked: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if checked is None:
            checked = beartype(function)
        return checked(*args, **kwargs)

    return call
