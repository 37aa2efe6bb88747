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
    """Places in the epoch: image `slot % images` of the training set, on pass `slot // images`."""
    inputs: Shaped[Tensor, "B ..."]
    """Decoded images (B, 3, H, W) uint8, or what a model's frozen part made of them."""
    maps: Int16[Tensor, "B planes h w"]
    """Packed maps of the images (`transfgu.datasets.packed_maps`); no planes for methods that need none."""


Pending = Callable[[], Mapping[str, float]]
"""Returns the values of a step, `total` among them, and waits for the device that computes them.

It raises FloatingPointError, on all workers at once, where the loss or its gradient was not a number; then weights and
moments stayed as they were.
"""

Batches = Callable[[], Iterator[Batch]]
"""Goes once through this worker's slices of an epoch's global batches, from the first on; may be called again."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a learner works."""

    recipe: Recipe
    device: torch.device
    rank: int
    """Of this worker, from 0."""
    world: int
    """Number of workers."""
    images: int
    """Training images in all."""
    steps: int
    """Global batches of an epoch."""


@runtime_checkable
class Model(Protocol):
    """What a method has learned, on a device: images to logits, in a frozen part and a trained part."""

    device: torch.device
    patch_size: int
    """Sides of images must be multiples of it, pixels; 1 where any side will do."""

    def normalise(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels as :meth:`frozen` takes them, on the device; they may be resized."""
        ...

    def frozen(self, images: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]) -> Shaped[Tensor, "B ..."]:
        """What training does not change: of decoded images (uint8) or of pixels of :meth:`normalise`."""
        ...

    def logits(self, seen: Shaped[Tensor, "B ..."], size: Size) -> Float[Tensor, "B C h w"]:
        """Logits of the clusters, at any resolution, of what :meth:`frozen` returned for images of `size`."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trained part's weights, as the model's file holds them."""
        ...


@runtime_checkable
class Learner(Protocol):
    """What a worker trains. All workers hold the same weights before and after each call."""

    network: nn.Module
    """What is trained; a checkpoint and the model's file hold its `state_dict`."""
    optimiser: Optimizer | None
    """None: the method takes no optimiser steps."""
    teacher: nn.Module | None
    """A second network of the same make that a checkpoint holds; None: there is none (yet)."""
    model: Model
    """Predicts by the network as it is."""
    whole: bool
    """It trains on what the model's frozen part makes of whole images, which may then be computed once."""

    def begin(self, epoch: int, batches: Batches) -> None:
        """Prepare an epoch, counted from 0."""
        ...

    def step(self, batch: Batch, epoch: int, index: int) -> Pending:
        """Queue one optimiser step over the global batch, the `index`-th of the epoch."""
        ...

    def end(self, epoch: int, batches: Batches, *, scored: bool) -> Mapping[str, Any]:
        """Conclude an epoch, before its score where it is `scored`; returns further columns of the history."""
        ...
