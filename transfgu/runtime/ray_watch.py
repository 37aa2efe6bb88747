"""End a job with one line if a main process of its embedded Ray cluster dies.

Without it, Ray's core ends the job a quarter of a minute later, without a message and with the run's lock held, or the
job waits for a minute and ends with a stack trace. A thread that looks at the processes sees their end long before.
"""

import signal
import subprocess
import threading
from collections.abc import Mapping

from transfgu.errors import UserError
from transfgu.runtime import ray_internals, stopping

_SECONDS = 0.2  # between two looks

_over = threading.Event()
_watched: Mapping[str, "subprocess.Popen[bytes]"] = {}


def start() -> None:
    """Watch the cluster that this process has started, if :func:`stopping.install` was called.

    Other programs that use the package decide themselves what the end of Ray means to them.
    """
    global _over, _watched
    if not stopping.installed():
        return
    stopping.adopt_orphans()  # Ray's workers are children of its raylet
    _over, _watched = threading.Event(), ray_internals.main_processes()
    threading.Thread(target=_watch, args=(_over,), name="Ray's processes", daemon=True).start()


def stop() -> None:
    """Stop watching, before Ray is shut down."""
    global _watched
    _over.set()
    _watched = {}


def check() -> None:
    """End this process with status 2 and one line if a watched process has ended, except after a signal to stop."""
    if stopping.requested():  # it may have been sent to Ray's processes, too
        return
    for name, process in _watched.items():
        if (status := process.poll()) is not None:
            stopping.end(_died(name, status).line, 2)


def _watch(over: threading.Event) -> None:
    while not over.wait(_SECONDS):
        check()


def _died(name: str, status: int) -> UserError:
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
    cause = ", as the system does when memory runs out" if status == -signal.SIGKILL else ""
    return UserError(
        f"Ray's process {name} {how}{cause}: check that the machine has free memory, and run the same command, which "
        "continues where it stopped",
        code="ray-died",
    )
