"""Score a model during training: each worker scores its share, and the counts are added up."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int16, Shaped
from torch import Tensor

from transfgu.datasets.rows import read_labelled_rows, read_plain_rows, usable
from transfgu.decoder import all_winners
from transfgu.learner import Model
from transfgu.metrics import Scores, batch_confusion, invariant_information, scores
from transfgu.recipe import Recipe
from transfgu.store import parquet
from transfgu.training.batches import stream
from transfgu.training.job import Place
from transfgu.workers import sum_over_workers


class Kept:
    """Batches that are computed again in each pass, or kept after the first if they are small."""

    def __init__(self, images: int, gib: float) -> None:
        """Set up batches of `images` images, kept if they take at most `gib` GiB (estimated from the first batch)."""
        self._images, self._limit = images, gib * 2**30
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    def batches(self, computed: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the kept batches, or those of `computed`: pairs with equal numbers of rows."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[tuple[Tensor, Tensor]] = []
        keep = True
        for pair in computed:
            if not kept:
                keep = sum(t.nbytes for t in pair) / len(pair[0]) * self._images <= self._limit
            if keep:
                kept.append(pair)
            yield pair
        if keep:
            self._kept = kept


class _Share:
    """One worker's share of a table of images, and the model that is scored on it."""

    def __init__(self, recipe: Recipe, table: str, model: Model, place: Place) -> None:
        """Read the worker's rows of the table at the URI `table`."""
        self._recipe, self._model, self._world = recipe, model, place.world
        rows = parquet.read(table)
        self._rows: pa.Table = rows.take(np.arange(place.rank, len(rows), place.world))
        self._kept = Kept(len(self._rows), recipe.compute.resident_gib)

    def _decoded(self, read: Callable[[pa.Table], dict[str, Any]]) -> Iterator[dict[str, np.ndarray]]:
        """Yield the columns that `read` makes of the worker's rows, a batch at a time."""
        how = self._recipe
        return stream(self._rows, read, how.evaluation.batch_size, world=self._world, max_pixels=how.dataset.max_pixels)


class Validation(_Share):
    """One worker's share of the validation images (`image`, `label`), scored together with those of all workers."""

    def score(self) -> Scores:
        """Return the scores on all validation images; every worker must call it, with the network in eval mode."""
        classes, size, device = self._recipe.classes, self._recipe.dataset.image_size, self._model.device
        confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        for seen, labels in self._kept.batches(self._batches()):
            predicted = all_winners(self._model.logits(seen.to(device), size), size)
            confusion += batch_confusion(labels.to(device), predicted, classes)
        return scores(sum_over_workers(confusion).cpu().numpy())

    def _batches(self) -> Iterator[tuple[Shaped[Tensor, "B ..."], Int16[Tensor, "B H W"]]]:
        read = partial(read_labelled_rows, recipe=self._recipe)
        for columns in self._decoded(read):
            images, labels = usable(columns)
            if labels:
                yield self._model.frozen(torch.from_numpy(images)).cpu(), torch.from_numpy(np.stack(labels))


class Mirror(_Share):
    """One worker's share of images (`image`) and their mirror images: predictions are compared without labels."""

    def score(self) -> float:
        """See :func:`transfgu.metrics.invariant_information`; every worker must call it, as `Validation.score`."""
        classes, size, device = self._recipe.classes, self._recipe.dataset.image_size, self._model.device
        joint = torch.zeros(classes * classes, dtype=torch.int64, device=device)
        for pair in self._kept.batches(self._batches()):
            one, other = (self._model.logits(seen.to(device), size).argmax(dim=1) for seen in pair)  # (B, h, w)
            joint += torch.bincount((one * classes + other.flip(2)).flatten(), minlength=classes * classes)
        return invariant_information(sum_over_workers(joint).reshape(classes, classes).cpu().numpy())

    def _batches(self) -> Iterator[tuple[Shaped[Tensor, "B ..."], Shaped[Tensor, "B ..."]]]:
        """Return the frozen part's results for images and their mirror images."""
        how = self._recipe.dataset
        read = partial(read_plain_rows, size=how.image_size, orient=how.orient, max_pixels=how.max_pixels)
        for columns in self._decoded(read):
            images = torch.from_numpy(columns["image"][columns["good"]])
            if len(images):
                yield self._model.frozen(images).cpu(), self._model.frozen(images.flip(3)).cpu()
