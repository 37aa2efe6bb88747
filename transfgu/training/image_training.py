"""Train any method on a run's images: sources of its batches, its scores, its history."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from transfgu import formats
from transfgu.datasets.map_files import maps_shape
from transfgu.inference.device import allow_tf32
from transfgu.inference.mask_model import MaskModel
from transfgu.inference.models import CLASSES, METHOD
from transfgu.learner import Batch, Learner, Pending, Setting
from transfgu.methods import method
from transfgu.recipe import Recipe
from transfgu.store import parquet
from transfgu.training.batches import Resident, Share, Source, Streamed, load, open_cache
from transfgu.training.checkpoints import merit
from transfgu.training.copies import on_device
from transfgu.training.epoch_pictures import Shown
from transfgu.training.job import Place
from transfgu.training.order import Order
from transfgu.training.scoring import Mirror, Validation
from transfgu.training.state import State, Tensors

_LOAD_BATCH = 64  # images per batch of the frozen part, if it is computed once


@dataclass(frozen=True, kw_only=True)
class ImageJob:
    """Inputs of a run's training."""

    recipe: Recipe
    images: str
    """URI of the table of training images by position: `image`, `part`, `row`."""
    validation: str = ""
    """URI of the table of labelled validation images (`image`, `label`); empty if there are none."""
    pictures: str = ""
    """URI of a folder for a picture of each epoch; empty: no pictures."""
    unlabelled: str = ""
    """URI of a table of images (`image`) for the label-free score; empty: none."""


class ImageTraining:
    """A method's training on one worker; see `transfgu.training.job.Training`."""

    def __init__(self, job: ImageJob, place: Place) -> None:
        recipe = job.recipe
        self.recipe, self.seed, self.epochs = recipe, recipe.seed, recipe.training.epochs
        rows = parquet.read(job.images)
        self.order = Order.of(recipe, len(rows))
        self.steps = self.epochs * self.order.steps
        self.remedy = f"now {recipe.training.scaled_lr:g}, set --training.lr"
        allow_tf32(recipe.training, place.device)
        setting = Setting(
            recipe=recipe,
            device=place.device,
            rank=place.rank,
            world=place.world,
            images=self.order.images,
            steps=self.order.steps,
        )
        self.learner: Learner = method(recipe.method).load("learner")(setting)
        self.state = State(student=self.learner.network, optimiser=self.learner.optimiser, teacher=self.learner.teacher)
        self._frozen: Callable[[Tensor], Tensor] | None = self.learner.model.frozen if self.learner.whole else None
        self._source = self._open(rows, place)
        model = self.learner.model
        self._validation = Validation(recipe, job.validation, model, place) if job.validation else None
        shown = job.pictures and place.rank == 0
        self._shown = Shown(recipe, rows, model, job.pictures) if shown else None
        self._mirror = Mirror(recipe, job.unlabelled, model, place) if job.unlabelled else None

    def _open(self, rows: pa.Table, place: Place) -> Source:
        """Return the source of batches, with the frozen part's results if these are computed once."""
        recipe = self.recipe
        maps = (0, 0, 0)
        if "part" in rows.column_names:
            maps = maps_shape(rows)
        share = Share(
            order=self.order,
            rows=rows,
            size=recipe.dataset.training_size,
            maps=maps,
            rank=place.rank,
            world=place.world,
            orient=recipe.dataset.orient,
            max_pixels=recipe.dataset.max_pixels,
        )
        if share.bytes > recipe.compute.resident_gib * 2**30:
            return open_cache(share, recipe.compute, self.epochs) or Streamed(share, self.epochs)
        if self._frozen is None:
            return Resident(share, *load(share, lambda images: images, _LOAD_BATCH))
        # Without random crops, the frozen part's result for an image is the same in every epoch.
        resident = Resident(share, *load(share, self._frozen, _LOAD_BATCH))
        self._frozen = None
        return resident

    def load(self, tensors: Tensors, history: list[dict[str, Any]]) -> None:
        """See `Training`."""
        self.state.take(tensors, history)
        self.learner.teacher = self.state.teacher

    def begin(self, epoch: int) -> None:
        """See `Training`."""
        self.learner.begin(epoch, partial(self.batches, epoch))

    def batches(self, epoch: int) -> Iterator[Batch]:
        """See `Training`; inputs are the frozen part's results if the method trains on whole images."""
        for batch in on_device(self._source.epoch(epoch), self.learner.model.device):
            yield batch if self._frozen is None else batch._replace(inputs=self._frozen(batch.inputs))

    def step(self, batch: Batch, epoch: int, index: int) -> Pending:
        """See `Training`."""
        return self.learner.step(batch, epoch, index)

    def end(self, epoch: int, results: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """Return mean losses, the method's own columns and the scores; `skipped_steps` is a sum."""
        training = self.recipe.training
        last = epoch + 1 == self.epochs
        due = self._validation is not None and ((epoch + 1) % training.evaluate_every == 0 or last)
        row: dict[str, Any] = {name: float(np.mean([r[name] for r in results])) for name in results[0]}
        if "skipped_steps" in row:
            row["skipped_steps"] = sum(r["skipped_steps"] > 0 for r in results)
        wanted = due or last or self._shown is not None or self._mirror is not None
        row |= self.learner.end(epoch, partial(self.batches, epoch), scored=wanted)
        self.state.teacher = self.learner.teacher
        with self._evaluating():
            row |= self._score(due)
            if self._mirror:
                row["label_free"] = self._mirror.score()
        return row

    def _score(self, due: bool) -> dict[str, float | None]:
        """Score the validation images in epochs in which this is due; the best weights so far are kept."""
        if not (self._validation and due):
            return {"mean_iou": None, "pixel_accuracy": None}
        started = time.monotonic()
        score = self._validation.score()
        seconds = {"score_seconds": round(time.monotonic() - started, 3)}
        if math.isnan(score.pixel_accuracy):  # no label was readable
            return {"mean_iou": None, "pixel_accuracy": None, **seconds}
        best = max((merit(row) for row in self.state.history), default=-1.0)
        row: dict[str, float | None] = {"mean_iou": score.mean_iou, "pixel_accuracy": score.pixel_accuracy}
        if merit(row) > best:
            weights = self.learner.network.state_dict()
            self.state.best = {name: tensor.detach().clone() for name, tensor in weights.items()}
        return row | seconds

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.learner.network.eval()
        with torch.no_grad():
            yield
        self.learner.network.train()

    def epoch_ended(self, epoch: int) -> None:
        """Draw the epoch's picture if requested."""
        if self._shown:
            with self._evaluating():
                self._shown.paint(epoch + 1)

    def files(self) -> tuple[Tensors, dict[str, str]]:
        """Return no further files; the metadata describe the model."""
        recipe = self.recipe
        metadata = {
            formats.WEIGHTS_KEY: str(formats.FORMAT),
            CLASSES: str(recipe.classes),
            "recipe": recipe.digest("training"),
        }
        model = self.learner.model
        if isinstance(model, MaskModel):
            encoder = model.encode.encoder
            sides = {"num_heads": str(encoder.num_heads), "patch_size": str(encoder.patch_size)}
            return {}, {**metadata, **sides, "encoder": recipe.encoder.name}
        return {}, {**metadata, METHOD: recipe.method}

    def line(self, row: Mapping[str, Any]) -> str:
        """See `Training`."""
        score = ""
        if row["mean_iou"] is not None:
            score = f", mIoU {row['mean_iou']:.1f}, accuracy {row['pixel_accuracy']:.1f}"
        teacher = ", new teacher" if row.get("teacher_updated") else ""
        return f"epoch {row['epoch']} of {self.epochs}: loss {row['total']:.3f}{score}{teacher}, {row['seconds']:.1f} s"
