"""Extract a UserError from the errors in which Ray wraps exceptions of tasks, actors and training workers."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from transfgu.errors import UserError

_TOLD = re.compile(r"^(?:transfgu\.errors\.)?UserError: (.+)\n\[([a-z-]+)\]$", re.MULTILINE)


@contextmanager
def raises_user_errors() -> Iterator[None]:
    """Raise the UserError in an error of Ray, without Ray's stack traces."""
    try:
        yield
    except Exception as error:
        mistake = find_user_error(error)
        if mistake is None or mistake is error:
            raise
        raise UserError(str(mistake), code=mistake.code) from None


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError in Ray's own errors, if there is one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        cause = getattr(error, "cause", None)
        # An exception of a task is both Ray's error and ours; its text is a stack trace, that of its cause is the
        # line.
        if isinstance(error, UserError) and not isinstance(cause, UserError):
            return error
        seen.add(id(error))
        failures = getattr(error, "worker_failures", None)
        inner = next(iter(failures.values()), None) if isinstance(failures, dict) else cause
        # For an exception in an actor's constructor, Ray keeps only the text.
        if getattr(error, "actor_init_failed", False) and (told := _TOLD.findall(str(error))):
            message, code = told[-1]
            return UserError(message, code)
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return None
