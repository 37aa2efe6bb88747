"""Expect a user's mistake by its code, whatever the words of its message are."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from transfgu.errors import UserError


@contextmanager
def refused(refusal: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Fail unless the body raises a UserError in one line.

    Args:
        refusal: the code, then the names and numbers that the line must hold, as in `file-missing scene.png`.
    """
    code, *named = refusal.split()
    with pytest.raises(UserError) as caught:
        yield caught
    message = str(caught.value)
    assert (caught.value.code, message.count("\n")) == (code, 0), message
    for name in named:
        assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message), f"{name} is missing from: {message}"
