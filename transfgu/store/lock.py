"""Lock a run folder, so that one process writes to it; the holder renews the lock by a heartbeat.

Object storage has no locks that end with their holder, so a process that finds a lock has to know whether the holder
is alive. On the same machine it looks up the holder's process. Otherwise it watches the heartbeat for longer than a
living holder needs for one. Clocks are not compared, because those of two machines may differ.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfgu.errors import UserError
from transfgu.store import storage

FILE = "run.lock"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Waiting times of a lock, s."""

    beat: int | float = 10.0
    """Time between two heartbeats of the holder."""
    patience: int | float = 90.0
    """Time to wait for a heartbeat of a holder that may be dead; a holder whose storage fails for a minute is alive."""
    settle: int | float = 1.0
    """Time to wait after taking over a dead run's lock: if two runs took it at once, both then see the last one's."""


_held: set["Lock"] = set()


def release_held() -> None:
    """Release the locks that this process holds. For its last moments, when the body of :func:`hold` no longer runs."""
    for lock in list(_held):
        lock.release()


class Lock:
    """The lock of a run folder."""

    def __init__(self, uri: str, flag: str = "--run", timing: Timing | None = None) -> None:
        self._timing = timing or Timing()
        self.uri = storage.join(uri, FILE)
        self._flag = flag
        self._run = uri
        self._me = {"id": uuid.uuid4().hex, "host": platform.node(), "process": _process(os.getpid())}
        self._beats = 0
        self._lost = threading.Event()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def take(self, say: Callable[[str], None]) -> None:
        """Take the lock, from a dead run if necessary; `say` is called with the reason for waiting.

        Raises:
            UserError: another run holds it.
        """
        # Read first: a server that does not know the condition would replace a living run's lock.
        found, made = self.read(), False
        if found is None:
            made = storage.create(self.uri, self._content())
            # A request repeated after a lost answer may find the lock that it created itself.
            found = None if made else self.read()
        if not made and not self._is_mine(found):
            self.take_over(found, say)
        _held.add(self)
        self._thread.start()

    def check(self) -> None:
        """Read the lock; raises UserError if another run took it, which it does only from one that seemed dead."""
        if not self._lost.is_set():
            with suppress(UserError):  # not reachable now: others can't reach it either
                self._look()
        if self._lost.is_set():
            raise UserError(
                f"another run took over {storage.shown(self._run)} while this one could not reach it: let that one end",
                code="run-taken",
            )

    def release(self) -> None:
        """Release the lock."""
        _held.discard(self)
        self._end.set()
        self._thread.join()
        if not self._lost.is_set():
            with suppress(UserError):  # the folder may be unreachable; the next run sees that this one has ended
                if self._is_mine(self.read()):  # it may have been taken over since the last beat
                    storage.delete(self.uri)

    def take_over(self, found: bytes | None, say: Callable[[str], None]) -> None:
        """Replace the lock of a holder that is dead, or does not beat.

        Args:
            found: the lock as it was read.
            say: called with the reason for waiting.

        Raises:
            UserError: the holder lives, or another run took the lock over at the same time.
        """
        holder = _holder(found)
        if holder and not _is_dead(holder):
            if _is_here(holder):
                raise self._refused(holder)
            say(f"the run on {holder.get('host')} may be dead: watching its lock for {self._timing.patience:g} s")
            deadline = time.monotonic() + self._timing.patience
            while time.monotonic() < deadline:
                time.sleep(min(1.0, self._timing.patience / 10))
                now = self.read()
                if now is None:
                    found = None
                    break
                if now != found:
                    raise self._refused(_holder(now))
        if found is None:
            storage.create(self.uri, self._content())
        else:
            storage.replace(self.uri, found, self._content())
        time.sleep(self._timing.settle)
        now = self.read()
        if not self._is_mine(now):
            raise self._refused(_holder(now))
        say("took over the lock of a run that died")

    def _is_mine(self, found: bytes | None) -> bool:
        return _holder(found).get("id") == self._me["id"]

    def _refused(self, holder: dict[str, Any]) -> UserError:
        who = _named(holder)
        return UserError(
            f"another run is writing {storage.shown(self._run)} ({who}): wait for it, stop it, or choose another "
            f"{self._flag}",
            code="run-locked",
        )

    def _content(self) -> bytes:
        return json.dumps({**self._me, "beats": self._beats}, indent=1).encode()

    def read(self) -> bytes | None:
        """Return the content of the lock file; None without one."""
        return storage.read_bytes_or_none(self.uri)

    def _look(self) -> None:
        if not self._is_mine(self.read()):
            self._lost.set()

    def _beat(self) -> None:
        while not self._end.wait(self._timing.beat):
            with suppress(UserError):  # not reachable now: others can't reach it either
                self._look()
                if self._lost.is_set():
                    return
                self._beats += 1
                storage.write_bytes(self.uri, self._content())


@contextmanager
def hold(uri: str, say: Callable[[str], None], flag: str = "--run", timing: Timing | None = None) -> Iterator[Lock]:
    """Hold the lock of the run folder `uri`, which `flag` names, while the body runs.

    Raises:
        UserError: another run holds it.
    """
    lock = Lock(uri, flag, timing)
    lock.take(say)
    try:
        yield lock
    finally:
        lock.release()


def holder_of(uri: str) -> str | None:
    """Return the holder of the run folder `uri`, such as `process 12 on host`; None if there is none.

    A process on another machine counts as alive, because only its heartbeat could show that it is not.
    """
    found = _holder(storage.read_bytes_or_none(storage.join(uri, FILE)))
    return None if not found or _is_dead(found) else _named(found)


def _named(holder: dict[str, Any]) -> str:
    return f"process {str(holder.get('process')).split('/')[-1].split('@')[0]} on {holder.get('host')}"


def _process_table() -> str:
    """Return an identifier of the process namespace: the boot of this machine, and the container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - it is no path


def _process(pid: int) -> str:
    """Return an identifier of a process: its number, and its start in ticks since boot."""
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    started = "" if state == "Z" else fields[18]  # a process that has ended, until its parent has noticed
    return f"{_process_table()}/{pid}@{started}"


def _holder(found: bytes | None) -> dict[str, Any]:
    """Return the holder in a lock's content; empty if there is none, or if it died while writing."""
    try:
        tree = json.loads(found or b"")
    except ValueError:
        tree = {}
    return tree if isinstance(tree, dict) else {}


def _is_here(holder: dict[str, Any]) -> bool:
    return str(holder.get("process")).startswith(f"{_process_table()}/")


def _is_dead(holder: dict[str, Any]) -> bool:
    """Return True if the holder is known to be dead."""
    process = str(holder.get("process"))
    if "id" not in holder:
        return True
    if not _is_here(holder):
        return False
    try:
        return _process(int(process.rpartition("/")[2].partition("@")[0])) != process
    except (OSError, ValueError):
        return True
