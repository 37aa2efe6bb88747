"""Stop a job on SIGINT or SIGTERM: one line, exit code 130 or 143, no process left, and the run's lock released.

Python runs a signal's handler in the main thread between two of its instructions, so not while that thread waits inside
Ray's core. Ray also replaces handlers: its core aborts on SIGTERM. Therefore the main thread is interrupted first, and
a thread that reads Python's wake-up pipe ends the process if the main thread does not end in time.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

LINE = "stopped; the same command continues where it stopped"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE_SECONDS = 7.0  # for the work in progress to stop; a second signal ends this time
_AGAIN_SECONDS = 1.0  # some programs send a signal to a process and to its group: within this time both count as one
_CLEANUP_SECONDS = 3.0
_CHECK_SECONDS = 0.005
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux's prctl
_TIED = "TRANSFGU_END_WITH_STDIN"

_installed = False
_stderr = 2  # replaced by its own file descriptor in install(), because Ray redirects the other one while it starts
_interrupted = False
_first = 0
_ending = threading.Lock()
_cleanups: list[Callable[[], None]] = []


def install() -> None:
    """Handle SIGINT and SIGTERM in this process, even if inherited as ignored. Call it in the main thread.

    The first signal raises KeyboardInterrupt in the main thread, and its handler calls :func:`end`. A process of
    :func:`start_tied` gets SIGTERM when its parent ends.
    """
    global _installed, _stderr
    if _installed:
        return
    with contextlib.suppress(OSError):  # it may be closed
        _stderr = os.dup(2)
    receive, send = os.pipe()
    os.set_blocking(send, False)
    threading.Thread(target=_watch, args=(receive,), name="signals", daemon=True).start()
    sys.excepthook = _end_or_print
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Tune's handler returns as if the search were finished
    _installed = True
    signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    for number in _SIGNALS:  # last, because a signal may come at once and needs all of the above
        signal.signal(number, _interrupt)
    if os.environ.pop(_TIED, ""):  # not passed to child processes, whose standard input is another
        threading.Thread(target=_end_with_stdin, name="parent", daemon=True).start()


def start_tied(command: Sequence[str], **how: Any) -> subprocess.Popen[str]:
    """Start a command that calls :func:`install`, and that ends when this process ends for any reason.

    Its standard input is a pipe whose other end is held by this process only. The operating system closes that end with
    this process, even after SIGKILL, and the command then ends as after SIGTERM.

    Args:
        command: the program and its arguments.
        how: further arguments of `subprocess.Popen`, except `stdin` and `text`.
    """
    environment = {**(how.pop("env", None) or os.environ), _TIED: "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment, **how)


def installed() -> bool:
    """Return True if :func:`install` was called in this process."""
    return _installed


def requested() -> bool:
    """Return True once a signal has asked this process to end."""
    return bool(_first)


def at_end(cleanup: Callable[[], None]) -> None:
    """Call `cleanup` when a signal ends the process, within three seconds for all, after its children have ended."""
    if cleanup not in _cleanups:
        _cleanups.append(cleanup)


def ignore() -> None:
    """Ignore signals from now on, when nothing is left to do except to exit."""
    if _installed:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def end(line: str = LINE, status: int = 0) -> NoReturn:
    """Print a line, end all descendants, release the locks, call the clean-ups, and exit.

    Args:
        line: the reason.
        status: exit code; 0: 128 + signal.
    """
    _ending.acquire()  # a second thread waits here for the exit
    told = "\n" if sys.stderr and sys.stderr.isatty() else ""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(_stderr, f"{told}{line}\n".encode())
    with contextlib.suppress(OSError):  # output of processes that end now is not needed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    thread = threading.Thread(target=_clean_up, daemon=True)
    thread.start()
    thread.join(_CLEANUP_SECONDS)
    os._exit(status or 128 + (_first or signal.SIGINT))


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Keep the handlers of :func:`install` in the block, even if Ray and its core install others."""
    if not _installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    libc = ctypes.CDLL(None)

    def handler(number: int) -> Any:
        found = ctypes.create_string_buffer(512)  # of a `struct sigaction`, whose layout differs between machines
        libc.sigaction(number, None, found)
        return found

    ours, over = {number: handler(number) for number in _SIGNALS}, threading.Event()

    def keep() -> None:
        while not over.wait(_CHECK_SECONDS):
            for number, kept in ours.items():
                if handler(number).raw != kept.raw:
                    libc.sigaction(number, kept, None)

    thread = threading.Thread(target=keep, name="signal handlers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for number in _SIGNALS:
            signal.signal(number, _interrupt)


@contextmanager
def interrupt_restored() -> Iterator[None]:
    """Restore the handler of SIGINT after the block, even if this process has not called :func:`install`.

    Ray Train leaves a handler that keeps its controller alive, a process of 120 MB that keeps another one, and that
    would abort a finished training instead of stopping this process.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        # None: installed by a library in C, which Python can't do.
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends from now on, so that :func:`end` finds them (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def end_processes(processes: Iterable[Any], seconds: float = 2.0) -> None:
    """Kill processes (of psutil), and wait until they are gone."""
    import psutil

    found = list(processes)
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(found, timeout=seconds)


def _end_with_stdin() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 64):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    _note(number)
    if not _interrupted:
        _interrupted = True
        raise KeyboardInterrupt


def _note(number: int) -> None:
    global _first
    if not _first:
        _first = number
        # An exception can't be raised inside a destructor or a callback, and other threads may see processes end.
        sys.unraisablehook = _say_nothing
        threading.excepthook = _say_nothing


def _say_nothing(*_: Any) -> None:
    pass


def _watch(receive: int) -> None:
    """Read the numbers of signals as they arrive; end the process after the grace period."""
    while not (found := [n for n in os.read(receive, 64) if n in _SIGNALS]):
        pass
    _note(found[0])
    begun = time.monotonic()
    while (left := begun + _GRACE_SECONDS - time.monotonic()) > 0:
        if select.select([receive], [], [], left)[0]:
            again = any(n in _SIGNALS for n in os.read(receive, 64))
            if again and time.monotonic() > begun + _AGAIN_SECONDS:
                break
    end()


def _end_or_print(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if _first:
        end()
    sys.__excepthook__(kind, error, trace)


def _clean_up() -> None:
    with contextlib.suppress(Exception):
        _end_descendants()
    lock = sys.modules.get("transfgu.store.lock")
    for cleanup in [*([lock.release_held] if lock else []), *_cleanups]:
        with contextlib.suppress(Exception):
            cleanup()


def _end_descendants() -> None:
    import psutil

    adopt_orphans()
    deadline = time.monotonic() + 2
    while (found := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        end_processes(found, 0.3)
        for process in found:
            with contextlib.suppress(OSError):
                os.waitpid(process.pid, os.WNOHANG)
