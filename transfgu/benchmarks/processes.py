"""Measure the memory of a command and of the processes it starts, and the time of each line that it prints.

Only Linux reports this memory (`/proc`). Memory shared with Ray's object store is not counted for the processes; the
store is counted once.
"""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_SAMPLE_SECONDS = 0.5
_END_SECONDS = 60.0
_STORE_FILE = re.compile(r"/plasma")


@dataclass(kw_only=True)
class Memory:
    """Peaks, in bytes."""

    by_kind: dict[str, int] = field(default_factory=dict)
    """Peak of the largest process of each kind (`driver`, `raylet`, `gcs_server`, class of an actor or function of a
    task), without shared memory."""
    processes: dict[str, int] = field(default_factory=dict)
    """Maximum number of processes of each kind at a time."""
    together: int = 0
    """Peak of all processes together."""
    object_store: int = 0
    """Peak of Ray's object store."""

    def take(self, own: Mapping[str, Sequence[int]], store: int) -> None:
        """Add one measurement: bytes of each process by kind, and of the object store."""
        for kind, sizes in own.items():
            self.by_kind[kind] = max(self.by_kind.get(kind, 0), *sizes)
            self.processes[kind] = max(self.processes.get(kind, 0), len(sizes))
        self.together = max(self.together, sum(sum(sizes) for sizes in own.values()))
        self.object_store = max(self.object_store, store)


@dataclass(frozen=True)
class Line:
    """A line that a command printed."""

    seconds: float
    """Seconds since the command started."""
    text: str


class Command:
    """A command that runs in its own terminal, so that it prints progress at once."""

    def __init__(
        self, command: Sequence[str], memory: Memory, said: Callable[[Line], None], environment: Mapping[str, str]
    ) -> None:
        """Start `command`; `said` is called with each of its lines, from another thread."""
        self._memory, self._said = memory, said
        self.lines: list[Line] = []
        self.started, self.seconds = time.monotonic(), 0.0
        master, slave = os.openpty()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        os.close(slave)
        self._seen: set[tuple[int, str]] = set()  # process ids and start times, because ids are reused
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._listen, args=(master,), daemon=True),
            threading.Thread(target=self._watch, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def ended(self) -> bool:
        """True if the command has ended."""
        return self._process.poll() is not None

    def wait(self) -> int:
        """Return the exit status once the command has ended."""
        status = self._process.wait()
        self.seconds = time.monotonic() - self.started
        self._conclude()
        return status

    def living(self) -> list[int]:
        """Return the ids of its known processes that are still running."""
        return [process for process, began in self._seen if _began(process) == began]

    def kill(self, patience: float = _END_SECONDS) -> float:
        """Kill the command by SIGKILL, and wait until the processes that it started have ended.

        Args:
            patience: seconds after which the remaining processes are killed, too.

        Returns:
            Seconds from the command's start to the signal.
        """
        self._process.kill()
        self._process.wait()
        self.seconds = time.monotonic() - self.started
        deadline = time.monotonic() + patience
        while self.living() and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in self.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        deadline = time.monotonic() + _END_SECONDS
        while self.living() and time.monotonic() < deadline:
            time.sleep(0.05)
        self._conclude()
        return self.seconds

    def _conclude(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(_END_SECONDS)

    def _listen(self, terminal: int) -> None:
        rest = b""
        with os.fdopen(terminal, "rb", buffering=0) as stream:
            while True:
                try:
                    data = stream.read(1 << 16)
                except OSError:  # the other end is closed
                    return
                *whole, rest = re.split(rb"[\r\n]+", rest + (data or b""))
                for text in whole:
                    if text.strip():
                        line = Line(time.monotonic() - self.started, text.decode(errors="replace").rstrip())
                        self.lines.append(line)
                        self._said(line)
                if not data:
                    return

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLE_SECONDS):
            own: dict[str, list[int]] = {}
            store = 0
            for process in descendants(self._process.pid):
                if began := _began(process):
                    self._seen.add((process, began))
                kind = "driver" if process == self._process.pid else kind_of(process)
                if kind and (size := own_memory(process)):
                    own.setdefault(kind, []).append(size)
                if kind == "raylet":
                    store += _object_store(process)
            if own:
                self._memory.take(own, store)


def descendants(root: int) -> Iterator[int]:
    """Yield the ids of a running process and of all its running descendants."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    pending = [root]
    while pending:
        process = pending.pop()
        yield process
        pending += children.get(process, [])


def kind_of(process: int) -> str:
    """Return the kind of a process: class of a Ray actor, function of a task, or its program; empty if it ended."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return kind_of_title(words[0].decode(errors="replace"))


def kind_of_title(title: str) -> str:
    """Return the kind of a process with this title, such as `EncodeWindows` for Ray Data's actor of that class."""
    if not title.startswith("ray::"):
        return title.rpartition("/")[2].split(" ")[0]
    inner = re.search(r"MapBatches\((\w+)\)", title)
    return inner[1] if inner else re.split(r"[.(: ]", title.removeprefix("ray::"))[0]


def own_memory(process: int) -> int:
    """Return the bytes of a process's memory that belong to no file and no other process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def _object_store(raylet: int) -> int:
    """Return the peak size of a raylet's object store in bytes; its file in shared memory never shrinks."""
    found = Counter[int]()
    with contextlib.suppress(OSError):
        for handle in Path(f"/proc/{raylet}/fd").iterdir():
            with contextlib.suppress(OSError):
                if _STORE_FILE.search(str(handle.readlink())):
                    about = handle.stat()
                    found[about.st_ino] = about.st_blocks * 512
    return sum(found.values())


def _began(process: int) -> str:
    """Return the start time of a process, in ticks since boot; empty if it has ended."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]
