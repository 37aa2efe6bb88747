"""A user's mistake inside a task or a worker reaches the driver wrapped in Ray's errors; here it is taken out again."""

import re

from transfgu.errors import UserError

_TOLD = re.compile(r"^(?:transfgu\.errors\.)?UserError: (.+)\n\[([a-z-]+)\]$", re.MULTILINE)


def find_user_error(error: BaseException | None) -> UserError | None:
    """The UserError that lies under Ray's own errors, if one does."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        cause = getattr(error, "cause", None)
        # What a task raised is both, Ray's error and ours; its text is a stack trace, that of its cause the line.
        if isinstance(error, UserError) and not isinstance(cause, UserError):
            return error
        seen.add(id(error))
        failures = getattr(error, "worker_failures", None)
        inner = next(iter(failures.values()), None) if isinstance(failures, dict) else cause
        # Of what an actor's constructor raised, Ray keeps the text alone.
        if getattr(error, "actor_init_failed", False) and (told := _TOLD.findall(str(error))):
            message, code = told[-1]
            return UserError(message, code)
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return None
