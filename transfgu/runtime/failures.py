"""Take a UserError out of the errors in which Ray wraps what tasks, actors and training workers raise."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager

from transfgu.errors import UserError

_TOLD = re.compile(r"^(?:transfgu\.errors\.)?UserError: (.+)\n\[([a-z-]+)\]$", re.MULTILINE)


@contextmanager
def raises_user_errors() -> Iterator[None]:
    """Raise the UserError that lies under an error of Ray's in its place, without Ray's stack traces."""
    try:
        yield
    except Exception as error:
        mistake = find_user_error(error)
        if mistake is None or mistake is error:
            raise
        raise UserError(str(mistake), code=mistake.code) from None


def check_ray() -> None:
    """Raise UserError if Ray is not installed; nothing is imported."""
    if importlib.util.find_spec("ray") is None:
        raise _no_ray()


def _no_ray() -> UserError:
    return UserError(
        "Ray is not installed, and this command needs it: install transfgu with all that it needs, or pip install "
        "'ray[data,default,train,tune]'",
        code="ray-missing",
    )


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError that lies under Ray's own errors, or that stands for an import of Ray that failed."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        cause = getattr(error, "cause", None)
        # What a task raised is both, Ray's error and ours; its text is a stack trace, that of its cause the line.
        if isinstance(error, UserError) and not isinstance(cause, UserError):
            return error
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "ray":
            return _no_ray()
        seen.add(id(error))
        failures = getattr(error, "worker_failures", None)
        inner = next(iter(failures.values()), None) if isinstance(failures, dict) else cause
        # Of what an actor's constructor raised, Ray keeps the text alone.
        if getattr(error, "actor_init_failed", False) and (told := _TOLD.findall(str(error))):
            message, code = told[-1]
            return UserError(message, code)
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return None
