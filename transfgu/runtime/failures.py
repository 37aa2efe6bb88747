"""Extract a UserError from the errors in which Ray wraps exceptions of tasks, actors and training workers."""

import importlib.util
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


def check_ray() -> None:
    """Raise UserError if Ray is not installed; nothing is imported."""
    if importlib.util.find_spec("ray") is None:
        raise _no_ray()


def _no_ray() -> UserError:
    return UserError(
        "this command requires Ray, which is not installed: install transfgu with all requirements, or pip install "
        "'ray[data,default,train,tune]'",
        code="ray-missing",
    )


def no_faiss() -> UserError:
    """Return the error of a command that requires FAISS where it is not installed."""
    return UserError(
        "this command requires FAISS, which is not installed: pip install faiss-cpu, or on a machine with a GPU pip "
        "install faiss-gpu (the extras cpu and gpu of transfgu)",
        code="faiss-missing",
    )


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError in Ray's own errors, or one that names Ray or FAISS as missing; None for other errors."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        cause = getattr(error, "cause", None)
        # An exception of a task is both Ray's error and ours; its text is a stack trace, that of its cause is the
        # line.
        if isinstance(error, UserError) and not isinstance(cause, UserError):
            return error
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing == "ray":
            return _no_ray()
        if missing == "faiss":
            return no_faiss()
        seen.add(id(error))
        failures = getattr(error, "worker_failures", None)
        inner = next(iter(failures.values()), None) if isinstance(failures, dict) else cause
        # For an exception in an actor's constructor, Ray keeps only the text.
        if getattr(error, "actor_init_failed", False) and (told := _TOLD.findall(str(error))):
            message, code = told[-1]
            return UserError(message, code)
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return None
