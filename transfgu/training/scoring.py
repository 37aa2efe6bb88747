"""Scores of a decoder while it trains: each worker scores its share, and the counts are added up."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int16
from torch import Tensor

from transfgu.datasets.rows import read_labelled_rows, read_plain_rows, usable
from transfgu.decoder import MaskDecoder, all_winners
from transfgu.encoder import patch_grid
from transfgu.inference.tokens import PatchTokens
from transfgu.losses import worker_count
from transfgu.metrics import Scores, batch_confusion, invariant_information, scores
from transfgu.store import parquet
from transfgu.training.batches import stream
from transfgu.training.job import Job


class Validation:
    """One worker's share of the validation images, scored with all workers'."""

    def __init__(self, job: Job, encode: PatchTokens, rank: int, world: int) -> None:
        self._recipe, self._encode, self._world = job.recipe, encode, world
        rows = parquet.read(job.validation)
        self._rows = rows.take(np.arange(rank, len(rows), world))
        size, patch = self._recipe.dataset.image_size, encode.encoder.patch_size
        self._grid = (size[0] // patch, size[1] // patch)
        # The encoder is frozen: what it makes of a small set is kept.
        image = 4 * self._grid[0] * self._grid[1] * encode.encoder.width + 2 * size[0] * size[1]
        self._keep = len(self._rows) * image <= job.recipe.compute.resident_gib * 2**30
        self._kept: list[tuple[Tensor, Int16[Tensor, "B H W"]]] | None = None

    def score(self, decoder: MaskDecoder) -> Scores:
        """The scores of the whole validation set; every worker must call it."""
        decoder.eval()
        classes, size = self._recipe.classes, self._recipe.dataset.image_size
        confusion = torch.zeros(classes, classes, dtype=torch.int64, device=self._encode.device)
        for patches, labels in self._batches():
            with torch.inference_mode():
                logits = decoder(patches.to(self._encode.device))[0].mT.unflatten(2, self._grid)
                predicted = all_winners(logits, size)
            confusion += batch_confusion(labels.to(self._encode.device), predicted, classes)
        decoder.train()
        if worker_count() > 1:
            dist.all_reduce(confusion)
        return scores(confusion.cpu().numpy())

    def _batches(self) -> Iterator[tuple[Float[Tensor, "B hw d"], Int16[Tensor, "B H W"]]]:
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        read = partial(read_labelled_rows, recipe=self._recipe)
        for columns in stream(self._rows, read, self._recipe.evaluation.batch_size, world=self._world):
            images, labels = usable(columns)
            if not labels:
                continue
            batch = (self._encode(torch.from_numpy(images)).cpu(), torch.from_numpy(np.stack(labels)))
            if self._keep:
                kept.append(batch)
            yield batch
        if self._keep:
            self._kept = kept


class Mirror:
    """One worker's share of images and their mirror images, on which predictions are compared without labels."""

    def __init__(self, job: Job, encode: PatchTokens, rank: int, world: int) -> None:
        self._recipe, self._encode, self._world = job.recipe, encode, world
        rows = parquet.read(job.unlabelled)
        self._rows = rows.take(np.arange(rank, len(rows), world))
        self._grid = patch_grid(self._recipe.dataset.image_size, encode.encoder.patch_size)
        image = 2 * 4 * self._grid[0] * self._grid[1] * encode.encoder.width
        self._keep = len(self._rows) * image <= job.recipe.compute.resident_gib * 2**30
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    def score(self, decoder: MaskDecoder) -> float:
        """See :func:`transfgu.metrics.invariant_information`; every worker must call it."""
        classes = self._recipe.classes
        joint = torch.zeros(classes * classes, dtype=torch.int64, device=self._encode.device)
        decoder.eval()
        with torch.inference_mode():
            for pair in self._batches():
                one, other = (
                    decoder(patches.to(self._encode.device))[0].argmax(dim=2).unflatten(1, self._grid)
                    for patches in pair
                )  # (B, hw, C) -> (B, h, w)
                joint += torch.bincount((one * classes + other.flip(2)).flatten(), minlength=classes * classes)
        decoder.train()
        if worker_count() > 1:
            dist.all_reduce(joint)
        return invariant_information(joint.reshape(classes, classes).cpu().numpy())

    def _batches(self) -> Iterator[tuple[Float[Tensor, "B hw d"], Float[Tensor, "B hw d"]]]:
        """Patch tokens of images and of their mirror images."""
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        read = partial(read_plain_rows, size=self._recipe.dataset.image_size, orient=self._recipe.dataset.orient)
        for columns in stream(self._rows, read, self._recipe.evaluation.batch_size, world=self._world):
            images = torch.from_numpy(columns["image"][columns["good"]])
            if not len(images):
                continue
            pair = (self._encode(images).cpu(), self._encode(images.flip(3)).cpu())
            if self._keep:
                kept.append(pair)
            yield pair
        if self._keep:
            self._kept = kept
