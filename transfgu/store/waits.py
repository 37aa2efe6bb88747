"""Tell the user what this process is waiting for, so that a storage that does not answer is noticed."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

_AGAIN_SECONDS = 60.0

_lock = threading.Lock()
_begun: dict[object, tuple[float, str]] = {}
_told_by: threading.Thread | None = None


def tell(say: Callable[[str], None], *, after_seconds: float = 10.0, look_seconds: float = 1.0) -> None:
    """Call `say` with a line after some seconds of waiting, and again after each minute.

    Args:
        say: takes a line; it replaces that of an earlier call.
        after_seconds: length of a wait that is told.
        look_seconds: time between two looks at the waits.
    """
    global _told_by
    _told_by = threading.Thread(target=_watch, args=(say, after_seconds, look_seconds), name="waits", daemon=True)
    _told_by.start()


def are_told() -> bool:
    """Return True once :func:`tell` was called in this process."""
    return _told_by is not None


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Count the time of the block as waiting; `what` is the reason: "to read s3://bucket/file"."""
    key = object()
    with _lock:
        _begun[key] = (time.monotonic(), what)
    try:
        yield
    finally:
        with _lock:
            del _begun[key]


def _watch(say: Callable[[str], None], after_seconds: float, look_seconds: float) -> None:
    told = -_AGAIN_SECONDS
    while _told_by is threading.current_thread():
        time.sleep(look_seconds)
        with _lock:
            since, what = min(_begun.values(), default=(0.0, ""))
        now = time.monotonic()
        if what and now - since >= after_seconds and now - told >= _AGAIN_SECONDS:
            told = now
            with contextlib.suppress(OSError, ValueError):  # standard error may be closed
                say(f"waiting for {now - since:.0f} s {what}")
