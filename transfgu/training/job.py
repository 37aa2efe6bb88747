"""What a worker is told, and what it trains: the trainer knows of a training no more than stands here."""

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
    """A worker among its equals."""

    device: torch.device
    rank: int
    world: int


@runtime_checkable
class Training(Protocol):
    """What is trained, with one worker's share of the data."""

    seed: int
    order: Order
    """Its global batches."""
    epochs: int
    steps: int
    """Of all epochs."""
    state: State
    remedy: str
    """What to do about a loss that is not a number, after a colon."""

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], history: list[dict[str, Any]]) -> None:
        """Take a checkpoint's tensors, by file and name, and its history."""
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
        """Conclude an epoch; returns the columns of its row of the history, from the results of its steps."""
        ...

    def epoch_ended(self, epoch: int) -> None:
        """Called on the first worker after the row has joined the history, before the checkpoint is written."""
        ...

    def files(self) -> tuple[Mapping[str, Mapping[str, Tensor]], dict[str, str]]:
        """Weight files of a checkpoint beside the state's, by name, and the metadata of all."""
        ...

    def line(self, row: Mapping[str, Any]) -> str:
        """An epoch's row of the history, for the user."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker is told."""

    make: Callable[[Place], Training]
    """Makes the training on a worker."""
    checkpoints: str
    """URI of the folder that Ray Train puts them in."""
    board: Any
    """Handle of the driver's `board.ProgressBoard`."""
    beside: int = 1
    """Trainings, this one included, that share a machine's cores."""
    asks: bool = False
    """Whether the driver says after each epoch if training goes on."""
