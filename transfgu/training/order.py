"""Compute the order of images in an epoch, on any worker and without communication.

A worker takes every `world`-th row of each global batch, so any number of workers trains on the same batches.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of images in an epoch.

    An epoch is `passes` over the images, shuffled as a whole and cut into global batches of `batch_size`; images that
    fill no batch are left out of this epoch, as published. Fewer images than a batch make one batch.

    A *slot* is one of the `passes * images` positions of an epoch: image `slot % images`, on pass `slot // images`.
    """

    images: int
    passes: int
    batch_size: int
    seed: int

    @property
    def batch(self) -> int:
        """The number of images in a global batch."""
        return min(self.batch_size, self.images * self.passes)

    @property
    def steps(self) -> int:
        """The number of global batches in an epoch."""
        return self.images * self.passes // self.batch

    def epoch(self, epoch: int) -> Int[np.ndarray, "steps batch"]:
        """Return the slots of each global batch of an epoch."""
        slots = np.random.default_rng([self.seed, epoch]).permutation(self.images * self.passes)
        return slots[: self.steps * self.batch].reshape(self.steps, self.batch)

    def share(self, epoch: int, rank: int, world: int) -> Int[np.ndarray, "steps rows"]:
        """Return the slots of worker `rank` of `world` in each global batch; possibly none if images are few."""
        return self.epoch(epoch)[:, rank::world]
