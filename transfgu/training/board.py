"""Collect the workers' progress and errors in an actor, which the driver reads twice a second.

The driver never waits for workers. This module does not import torch, so that the actor's process starts quickly.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from transfgu.runtime.progress import Progress
from transfgu.runtime.threads import in_thread

ATTEMPTS = 5
"""Failed attempts at one epoch after which a fault counts as permanent."""
_WATCH_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Status:
    """The contents of the board."""

    done: int
    total: int
    """Steps of the whole training."""
    notes: list[str]
    """Lines for the user that have not been read yet."""
    rows: list[dict[str, Any]]
    """Rows of the history that have not been read yet."""
    failure: str
    is_mistake: bool
    """True if the failure is a user's mistake."""
    code: str = ""
    """The mistake's kind."""


class ProgressBoard:
    """An actor to which workers report their progress, and errors that must not be retried."""

    def __init__(self, attempts: int = ATTEMPTS) -> None:
        """Start without reports; `attempts` failures at one epoch end the training."""
        self._limit = attempts
        self._done = self._total = 0
        self._notes: list[str] = []
        self._rows: list[dict[str, Any]] = []
        self._failure = ""
        self._is_mistake, self._code = False, ""
        self._last_error = "a worker died"
        self._attempts: tuple[tuple[int, int], int] = ((-1, 0), 0)
        self._errors: set[str] = set()
        self._errors_before: set[str] = set()  # of the previous attempt at the same epoch
        self._answered, self._goes_on = 0, True

    def begin(self, epoch: int, workers: int) -> bool:
        """Return True if `workers` workers should continue from `epoch`; each attempt asks once."""
        key, count = self._attempts
        same = key == (epoch, workers)
        count = count + 1 if same else 1
        self._errors, self._errors_before = set(), self._errors if same else set()
        self._attempts = ((epoch, workers), count)
        if count > self._limit and not self._failure:
            self._failure = f"training failed {self._limit} times in epoch {epoch + 1}, at last with {self._last_error}"
        return not self._failure

    def step(self, done: int, total: int) -> None:
        """Report the number of steps done of the whole training."""
        self._done, self._total = done, total

    def note(self, text: str) -> None:
        """Report a line for the user."""
        self._notes.append(text)

    def epochs(self, rows: list[dict[str, Any]]) -> None:
        """Report rows of the history, each with its `epoch`; a repeated epoch counts once."""
        self._rows += [row for row in rows if row["epoch"] > len(self._rows)]

    def answer(self, epoch: int, goes_on: bool) -> None:
        """Set whether training continues after its first `epoch` epochs; once it does not, this is final."""
        self._answered, self._goes_on = max(self._answered, epoch), self._goes_on and goes_on

    def goes_on(self, epoch: int) -> bool | None:
        """Return the answer for the first `epoch` epochs; None if there is none yet."""
        return self._goes_on if not self._goes_on or self._answered >= epoch else None

    def fail(self, error: str, *, is_mistake: bool, may_pass: bool = False, code: str = "") -> None:
        """Report that an attempt ended in an error.

        There is no other after a user's mistake, nor after an error that comes a second time at the same epoch, unless
        it `may_pass`. The first mistake is kept: a full disk, for instance, also fails other writes.
        """
        if is_mistake:
            if not self._is_mistake:
                self._failure, self._is_mistake, self._code = error, True, code
        elif error in self._errors_before and not may_pass:
            epoch = self._attempts[0][0]
            self._failure = self._failure or f"training failed twice alike in epoch {epoch + 1}, with {error}"
        self._errors.add(error)
        # If one worker runs out of memory, the others fail because it is gone.
        if not self._last_error.startswith("out of memory"):
            self._last_error = error

    def read(self, notes: int, rows: int = 0) -> Status:
        """Return the contents without the first `notes` notes and `rows` rows."""
        return Status(
            done=self._done,
            total=self._total,
            notes=self._notes[notes:],
            rows=self._rows[rows:],
            failure=self._failure,
            is_mistake=self._is_mistake,
            code=self._code,
        )


def may_pass(error: BaseException) -> bool:
    """Return True if an error comes from other processes, machines or the network, not from the computation."""
    if isinstance(error, (OSError, RayError)):
        return True
    # Errors of torch's collectives when another worker is gone, recognised without torch.
    text = str(error).lower()
    return type(error).__module__.startswith("torch.distributed") or "gloo" in text or "nccl" in text


def put_up(attempts: int = ATTEMPTS) -> Any:
    """Start a board on the driver's node and return its handle; `attempts` failures at one epoch end the training."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(ProgressBoard).options(num_cpus=0, scheduling_strategy=here).remote(attempts)


@contextmanager
def watched(
    board: Any,
    progress: Progress,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    goes_on: Callable[[dict[str, Any]], bool] | None = None,
) -> Iterator[None]:
    """Pass the content of the board to `progress` and `on_epoch`, and the answers of `goes_on` to the board.

    Args:
        board: its handle.
        progress: the driver's.
        on_epoch: called with each epoch's row.
        goes_on: called with each epoch's row; returns False to end training. An exception ends it, too.

    Raises:
        Exception: raised by `goes_on`.
    """
    raised: list[Exception] = []

    def watch(ended: threading.Event) -> None:
        seen, told, done, over = 0, 0, 0, False
        while not over:
            over = ended.wait(_WATCH_SECONDS)  # read once more after the end
            status: Status = ray.get(board.read.remote(seen, told))
            seen += len(status.notes)
            told += len(status.rows)
            if status.done > done:
                done = status.done
                progress.update(done, status.total, "steps")
            for text in status.notes:
                progress.note(text)
            for row in status.rows:
                if on_epoch:
                    on_epoch(row)
                if goes_on:
                    try:
                        answer = goes_on(row)
                    except Exception as error:  # workers wait for an answer in any case
                        raised.append(error)
                        answer = False
                    ray.get(board.answer.remote(row["epoch"], answer))

    with in_thread(watch, "training progress"):
        yield
    if raised:
        raise raised[0]
