"""A run folder has one writer: its lock says who, and a heartbeat in it says that the writer lives.

Storage has no locks that end with their holder, so a dead run's must be told from a living one's. Where holder and
newcomer share a process table that is asked; elsewhere the newcomer watches the heartbeat for longer than a living
holder lets pass. Clocks are not compared: those of two machines need not agree.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transfgu.errors import UserError
from transfgu.store import storage

FILE = "run.lock"
_BEAT_SECONDS = 10.0
_PATIENCE_SECONDS = 90.0  # a holder whose storage fails for a minute still lives
_SETTLE_SECONDS = 1.0  # after which, of two that took a dead run's lock at once, both see the last one's


_held: set["Lock"] = set()


def release_held() -> None:
    """Release the locks that this process holds. For its last moments, when the body of :func:`hold` no longer runs."""
    for lock in list(_held):
        lock.release()


class Lock:
    """A run's lock, held."""

    def __init__(self, uri: str, flag: str = "--run") -> None:
        self.uri = storage.join(uri, FILE)
        self._flag = flag
        self._run = uri
        self._me = {"id": uuid.uuid4().hex, "host": platform.node(), "process": _process(os.getpid())}
        self._beats = 0
        self._lost = threading.Event()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def take(self, say: Callable[[str], None]) -> None:
        """Take it, from a dead run if need be; `say` is told what is waited for.

        Raises:
            UserError: another run holds it.
        """
        # Read first: a server that does not know the condition would replace a living run's lock.
        found, made = self._read(), False
        if found is None:
            made = storage.create(self.uri, self._content())
            # A request that was repeated because its answer got lost may find what it made itself.
            found = None if made else self._read()
        if not made and not self._is_mine(found):
            self._take_over(found, say)
        _held.add(self)
        self._thread.start()

    def check(self) -> None:
        """Raises UserError where another run took the lock, which it does only from one that seemed dead."""
        if self._lost.is_set():
            raise UserError(
                f"another run took over {storage.shown(self._run)} while this one could not reach it: let that one end",
                code="run-taken",
            )

    def release(self) -> None:
        """Let go."""
        _held.discard(self)
        self._end.set()
        self._thread.join()
        if not self._lost.is_set():
            with suppress(UserError):  # the folder may be gone, or out of reach: the next run sees that this one is
                if self._is_mine(self._read()):  # it may have been taken over since the last beat
                    storage.delete(self.uri)

    def _take_over(self, found: bytes | None, say: Callable[[str], None]) -> None:
        holder = _holder(found)
        if holder and not _is_dead(holder):
            if _is_here(holder):
                raise self._refused(holder)
            say(f"the run on {holder.get('host')} may be dead: watching its lock for {_PATIENCE_SECONDS:g} s")
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while time.monotonic() < deadline:
                time.sleep(min(1.0, _PATIENCE_SECONDS / 10))
                now = self._read()
                if now is None:
                    found = None
                    break
                if now != found:
                    raise self._refused(_holder(now))
        if found is None:
            storage.create(self.uri, self._content())
        else:
            storage.replace(self.uri, found, self._content())
        time.sleep(_SETTLE_SECONDS)
        now = self._read()
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

    def _read(self) -> bytes | None:
        return storage.read_bytes_or_none(self.uri)

    def _beat(self) -> None:
        while not self._end.wait(_BEAT_SECONDS):
            with suppress(UserError):  # out of reach for now: others can't reach it either
                if not self._is_mine(self._read()):
                    self._lost.set()
                    return
                self._beats += 1
                storage.write_bytes(self.uri, self._content())


@contextmanager
def hold(uri: str, say: Callable[[str], None], flag: str = "--run") -> Iterator[Lock]:
    """Hold the lock of the run folder `uri`, which `flag` names, while the body runs.

    Raises:
        UserError: another run holds it.
    """
    lock = Lock(uri, flag)
    lock.take(say)
    try:
        yield lock
    finally:
        lock.release()


def holder_of(uri: str) -> str | None:
    """Return who works on the run folder `uri`, such as `process 12 on host`; None where nobody is known to.

    A process of another machine counts as living, as only its heartbeat could tell.
    """
    found = _holder(storage.read_bytes_or_none(storage.join(uri, FILE)))
    return None if not found or _is_dead(found) else _named(found)


def _named(holder: dict[str, Any]) -> str:
    return f"process {str(holder.get('process')).split('/')[-1].split('@')[0]} on {holder.get('host')}"


def _process_table() -> str:
    """Where process numbers mean what they mean here: this boot of this machine, in this container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - it is no path


def _process(pid: int) -> str:
    """A process, told from a later one of the same number by its start, in ticks since boot."""
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    started = "" if state == "Z" else fields[18]  # what is left of a process until its parent has seen it end
    return f"{_process_table()}/{pid}@{started}"


def _holder(found: bytes | None) -> dict[str, Any]:
    """Who holds a lock of this content; empty where nobody does, or whoever did died writing it."""
    try:
        tree = json.loads(found or b"")
    except ValueError:
        tree = {}
    return tree if isinstance(tree, dict) else {}


def _is_here(holder: dict[str, Any]) -> bool:
    return str(holder.get("process")).startswith(f"{_process_table()}/")


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder is known to be dead."""
    process = str(holder.get("process"))
    if "id" not in holder:
        return True
    if not _is_here(holder):
        return False
    try:
        return _process(int(process.rpartition("/")[2].partition("@")[0])) != process
    except (OSError, ValueError):
        return True
