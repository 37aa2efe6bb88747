"""End a job with one line if a process of Ray without which it can't work dies.

Without it, Ray's core ends the job a quarter of a minute later, without a message and with the run's lock held, or the
job waits for a minute and ends with a stack trace. A thread that looks at the processes sees their end long before.
"""

import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from functools import partial

import psutil

from transfgu.errors import UserError
from transfgu.runtime import ray_internals, stopping

_SECONDS = 0.2  # between two looks

_over = threading.Event()
_looks: Sequence[Callable[[], UserError | None]] = ()


def start() -> None:
    """Watch the cluster that this process has started, if :func:`stopping.install` was called.

    Other programs that use the package decide themselves what the end of Ray means to them.
    """
    if not stopping.installed():
        return
    stopping.adopt_orphans()  # Ray's workers are children of its raylet
    _begin([partial(_look_at_child, name, process) for name, process in ray_internals.main_processes().items()])


def start_joined() -> None:
    """Watch the raylet that connects this machine to the cluster that this process has joined, as :func:`start`."""
    if stopping.installed() and (raylet := ray_internals.raylet_of_this_machine()):
        _begin([partial(_look_at_raylet, raylet)])


def stop() -> None:
    """Stop watching, before Ray is shut down."""
    global _looks
    _over.set()
    _looks = ()


def check() -> None:
    """End this process with status 2 and one line if a watched process has ended, except after a signal to stop."""
    if stopping.requested():  # it may have been sent to Ray's processes, too
        return
    for look in _looks:
        if error := look():
            stopping.end(error.line, 2)


def _begin(looks: Sequence[Callable[[], UserError | None]]) -> None:
    global _over, _looks
    _over, _looks = threading.Event(), looks
    threading.Thread(target=_watch, args=(_over,), name="Ray's processes", daemon=True).start()


def _watch(over: threading.Event) -> None:
    while not over.wait(_SECONDS):
        check()


def _look_at_child(name: str, process: "subprocess.Popen[bytes]") -> UserError | None:
    status = process.poll()
    if status is None:
        return None
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
    cause = ", as the system does when memory runs out" if status == -signal.SIGKILL else ""
    return UserError(
        f"Ray's process {name} {how}{cause}: check that the machine has free memory, and run the same command, which "
        "continues where it stopped",
        code="ray-died",
    )


def _look_at_raylet(raylet: psutil.Process) -> UserError | None:
    try:
        if raylet.is_running() and raylet.status() != psutil.STATUS_ZOMBIE:
            return None
    except psutil.NoSuchProcess:
        pass
    return UserError(
        "Ray's process raylet on this machine, its connection to the cluster at RAY_ADDRESS, has ended: check that the "
        "machine has free memory, start Ray on it again, and run the same command, which continues where it stopped",
        code="ray-died",
    )
