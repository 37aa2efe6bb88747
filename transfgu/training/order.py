"""Compute the order of images in an epoch, on any worker and without communication.

A worker takes every `world`-th row of each global batch, so any number of workers trains on the same batches.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from transfgu.recipe import Recipe


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
    published: bool = False
    """Shuffle as the published code's DistributedSampler: with torch's generator and seed 0, alike in each epoch."""

    @classmethod
    def of(cls, recipe: Recipe, images: int) -> "Order":
        """Return the order of a recipe's training over so many images."""
        training = recipe.training
        return cls(
            images=images,
            passes=training.passes,
            batch_size=training.batch_size,
            seed=recipe.seed,
            published=training.sampler == "published",
        )

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
        places = self.images * self.passes
        if self.published:
            import torch  # a dry run, which counts steps, need not load it

            slots = torch.randperm(places, generator=torch.Generator().manual_seed(0)).numpy()
        else:
            slots = np.random.default_rng([self.seed, epoch]).permutation(places)
        return slots[: self.steps * self.batch].reshape(self.steps, self.batch)

    def share(self, epoch: int, rank: int, world: int) -> Int[np.ndarray, "steps rows"]:
        """Return the slots of worker `rank` of `world` in each global batch; possibly none if images are few."""
        return self.epoch(epoch)[:, rank::world]
