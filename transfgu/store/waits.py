"""Tell the user what this process is waiting for, so that a storage that does not answer is noticed."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

_FIRST_SECONDS = 10.0
_AGAIN_SECONDS = 60.0
_LOOK_SECONDS = 1.0

_lock = threading.Lock()
_begun: dict[object, tuple[float, str]] = {}
_say: Callable[[str], None] | None = None
_watched = False


def tell(say: Callable[[str], None]) -> None:
    """Call `say` with a line after ten seconds of waiting, and again after each minute."""
    global _say, _watched
    _say = say
    if not _watched:
        _watched = True
        threading.Thread(target=_watch, name="waits", daemon=True).start()


def are_told() -> bool:
    """Return True once :func:`tell` was called in this process."""
    return _say is not None


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


def _watch() -> None:
    told = -_AGAIN_SECONDS
    while True:
        time.sleep(_LOOK_SECONDS)
        with _lock:
            since, what = min(_begun.values(), default=(0.0, ""))
        now = time.monotonic()
        if what and now - since >= _FIRST_SECONDS and now - told >= _AGAIN_SECONDS and _say:
            told = now
            with contextlib.suppress(OSError, ValueError):  # standard error may be closed
                _say(f"waiting for {now - since:.0f} s {what}")
