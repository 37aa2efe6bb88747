"""Define what a method provides to the trainer: a network, a step, actions between epochs, and a model that predicts.

The trainer does everything else: workers, the order of batches, checkpoints, scores, resuming. So a method is one class
without Ray.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Int16, Shaped, UInt8
from torch import Tensor, nn
from torch.optim import Optimizer

from transfgu.recipe import Recipe, Size


class Batch(NamedTuple):
    """One worker's slice of a global batch; it may be empty."""

    slots: Int[np.ndarray, " B"]
    """Positions in the epoch: image `slot % images` of the training set, on pass `slot // images`."""
    inputs: Shaped[Tensor, "B ..."]
    """Decoded images (B, 3, H, W) uint8, or the results of a model's frozen part."""
    maps: Int16[Tensor, "B planes h w"]
    """Packed maps of the images (`transfgu.datasets.packed_maps`), without planes for methods that need none."""


Pending = Callable[[], Mapping[str, float]]
"""Returns the values of a step, including `total`, and waits for the device that computes them.

It raises FloatingPointError, on all workers at once, if the loss or its gradient was not a number; then weights and
moments are unchanged.
"""

Batches = Callable[[], Iterator[Batch]]
"""Iterates once over this worker's slices of an epoch's global batches, from the first; may be called again."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The environment of a learner."""

    recipe: Recipe
    device: torch.device
    rank: int
    """Index of this worker, from 0."""
    world: int
    """Number of workers."""
    images: int
    """Total number of training images."""
    steps: int
    """Number of global batches in an epoch."""


@runtime_checkable
class Model(Protocol):
    """A trained method on a device: maps images to logits, in a frozen part and a trained part."""

    device: torch.device
    patch_size: int
    """Sides of images must be multiples of it, pixels; 1 if any side is allowed."""

    def normalise(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Return the pixels for :meth:`frozen`, on the device; they may be resized."""
        ...

    def frozen(self, images: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]) -> Shaped[Tensor, "B ..."]:
        """Return the frozen part's result for decoded images (uint8) or for pixels of :meth:`normalise`."""
        ...

    def logits(self, seen: Shaped[Tensor, "B ..."], size: Size) -> Float[Tensor, "B C h w"]:
        """Return logits of the clusters, at any resolution, from the result of :meth:`frozen` for images of `size`."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trained part's weights, as stored in the model's file."""
        ...


@runtime_checkable
class Learner(Protocol):
    """The training of a worker. All workers have the same weights before and after each call."""

    network: nn.Module
    """The trained network; a checkpoint and the model's file hold its `state_dict`."""
    optimiser: Optimizer | None
    """None: the method takes no optimiser steps."""
    teacher: nn.Module | None
    """A second network of the same kind in checkpoints; None: there is none (yet)."""
    model: Model
    """Predicts with the present network."""
    whole: bool
    """True if it trains on the frozen part's results for whole images, which may then be computed once."""

    def begin(self, epoch: int, batches: Batches) -> None:
        """Prepare an epoch, counted from 0."""
        ...

    def step(self, batch: Batch, epoch: int, index: int) -> Pending:
        """Queue one optimiser step over the global batch, the `index`-th of the epoch."""
        ...

    def end(self, epoch: int, batches: Batches, *, scored: bool) -> Mapping[str, Any]:
        """Finish an epoch, before its score if it is `scored`; returns further columns of the history."""
        ...
