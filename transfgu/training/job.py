"""Define the inputs of a worker, and the interface between the trainer and a training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from transfgu.learner import Pending
from transfgu.training.order import Order
from transfgu.training.state import State


@dataclass(frozen=True, kw_only=True)
class Place:
    """The position of a worker among all workers."""

    device: torch.device
    rank: int
    world: int


@runtime_checkable
class Training(Protocol):
    """A training, with one worker's share of the data."""

    seed: int
    order: Order
    """Order of the images in the global batches."""
    epochs: int
    steps: int
    """Steps of all epochs."""
    state: State
    remedy: str
    """Remedy for a loss that is not a number, written after a colon."""

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], history: list[dict[str, Any]]) -> None:
        """Restore a checkpoint's tensors, by file and name, and its history."""
        ...

    def begin(self, epoch: int) -> None:
        """Prepare an epoch, counted from 0."""
        ...

    def batches(self, epoch: int) -> Iterator[Any]:
        """Return this worker's share of each of an epoch's global batches."""
        ...

    def step(self, batch: Any, epoch: int, index: int) -> Pending:
        """Queue one optimiser step, the `index`-th of the epoch."""
        ...

    def end(self, epoch: int, results: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """Finish an epoch; returns the columns of its row of the history, from the results of its steps."""
        ...

    def epoch_ended(self, epoch: int) -> None:
        """Called on the first worker after the row was added to the history, before the checkpoint is written."""
        ...

    def files(self) -> tuple[Mapping[str, Mapping[str, Tensor]], dict[str, str]]:
        """Return further weight files of a checkpoint, by name, and the metadata of all."""
        ...

    def line(self, row: Mapping[str, Any]) -> str:
        """Return an epoch's row of the history as text for the user."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """Inputs of every worker."""

    make: Callable[[Place], Training]
    """Creates the training on a worker."""
    checkpoints: str
    """URI of Ray Train's folder of checkpoints."""
    board: Any
    """Handle of the driver's `board.ProgressBoard`."""
    beside: int = 1
    """Number of trainings, including this one, that share a machine's cores."""
    asks: bool = False
    """True if the driver decides after each epoch whether training continues."""
