"""Pretrain on one worker: the training that the trainer runs, from parts of small images to student and teacher."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import UInt8
from numpy import ndarray
from torch.nn.parallel import DistributedDataParallel

from transfgu.errors import UserError
from transfgu.learner import Batch, Pending
from transfgu.pretraining.objective import (
    StepSchedule,
    Student,
    Teacher,
    Views,
    apply_schedule,
    encoder_state,
    new_optimizer,
    pretraining_loss,
)
from transfgu.pretraining.recipe import PretrainingRecipe
from transfgu.store import parquet
from transfgu.training.batches import Resident, Share, Source, Streamed, load
from transfgu.training.copies import on_device
from transfgu.training.job import Place
from transfgu.training.order import Order
from transfgu.training.state import State, Tensors

REMEDY = "delete it, and run again"  # a damaged part


@dataclass(frozen=True, kw_only=True)
class Part:
    """A Parquet file of small images."""

    uri: str
    images: int


@dataclass(frozen=True, kw_only=True)
class PretrainingInputs:
    """Images and settings of a pretraining."""

    recipe: PretrainingRecipe
    parts: tuple[Part, ...]
    side: int
    """Side of the small images, px."""
    resident_gib: float
    """Maximum size of the images that a worker keeps in memory, GiB."""


def worker_batch(recipe: PretrainingRecipe, world: int) -> int:
    """Return the number of images of a global batch for each of `world` workers.

    Raises:
        UserError: they do not fill whole mosaics.
    """
    tiles = math.lcm(recipe.global_mosaic, recipe.local_mosaic) ** 2
    local, rest = divmod(recipe.batch_size, world)
    if rest or local % tiles:
        raise UserError(
            f"a batch of {recipe.batch_size} images does not give {world} workers whole mosaics of {tiles} tiles: "
            f"use a multiple of {world * tiles}",
            code="batch-size",
        )
    return local


class Pretraining:
    """A student, its teacher and the images; see `transfgu.training.job.Training`."""

    def __init__(self, inputs: PretrainingInputs, place: Place) -> None:
        self.recipe, self.seed, self._place = inputs.recipe, inputs.recipe.seed, place
        self.steps = self.recipe.steps
        self.order = Order(
            images=sum(part.images for part in inputs.parts),
            passes=1,
            batch_size=self.recipe.batch_size,
            seed=self.seed,
        )
        self.epochs = math.ceil(self.steps / self.order.steps)
        self.remedy = f"now {self.recipe.learning_rate:g}, set --learning_rate"
        torch.manual_seed(self.seed)  # initial weights, the same on every worker
        self._student = Student(self.recipe).to(place.device)
        self._teacher = Teacher(self._student).to(place.device)
        self._optimizer = new_optimizer(self._student)
        self.state = State(student=self._student, optimiser=self._optimizer, teacher=self._teacher.average)
        self._parallel = DistributedDataParallel(self._student) if place.world > 1 else self._student
        self._generator = torch.Generator()
        self._source = self._open(inputs)

    def _open(self, inputs: PretrainingInputs) -> Source:
        share = Share(
            order=self.order,
            rows=rows_of(inputs.parts),
            size=(inputs.side, inputs.side),
            maps=(0, 0, 0),
            rank=self._place.rank,
            world=self._place.world,
            max_pixels=inputs.side**2,
            read_rows=partial(read_small_images, side=inputs.side),
        )
        if share.bytes > inputs.resident_gib * 2**30:
            return Streamed(share, self.epochs)
        return Resident(share, *load(share, lambda images: images, self.recipe.batch_size))

    def load(self, tensors: Tensors, history: list[dict[str, Any]]) -> None:
        """See `Training`."""
        self.state.take(tensors, history)

    def begin(self, epoch: int) -> None:
        """Seed the views, so that a repeated epoch has the same ones."""
        numbers = np.random.SeedSequence((self.seed, epoch, self._place.rank))
        self._generator.manual_seed(int(numbers.generate_state(1)[0]))

    def batches(self, epoch: int) -> Iterator[Batch]:
        """See `Training`; the last epoch ends with the last step."""
        batches = islice(self._source.epoch(epoch), self.steps - epoch * self.order.steps)
        return on_device(batches, self._place.device)

    def step(self, batch: Batch, epoch: int, index: int) -> Pending:
        """Take one step of AdamW; both losses are those of this worker's slice."""
        recipe = self.recipe
        now = StepSchedule.at(epoch * self.order.steps + index, recipe)
        apply_schedule(self._optimizer, now)
        images = batch.inputs.to(self._place.device).float() / 255
        views = Views.draw(images, recipe, self._generator)
        unit, cosines = self._parallel(views, self._generator)
        loss = pretraining_loss(unit, cosines, self._teacher(views), now.clustering_weight, recipe)
        self._optimizer.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        if not now.train_prototypes:
            self._student.head.prototypes.grad = None
        # The norm of averaged gradients is the same on all workers, so all stop at the same step.
        norm = torch.nn.utils.clip_grad_norm_(self._student.parameters(), recipe.clip).item()
        if math.isfinite(norm):
            self._optimizer.step()
            self._teacher.follow(self._student, now.teacher_momentum)
        return partial(_values, loss.contrast.item(), loss.clustering.item(), norm)

    def end(self, epoch: int, results: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """Return mean losses, and the number of finished steps."""
        means = {name: float(np.mean([result[name] for result in results])) for name in results[0]}
        return {**means, "step": epoch * self.order.steps + len(results)}

    def epoch_ended(self, epoch: int) -> None:
        """See `Training`."""

    def files(self) -> tuple[Tensors, dict[str, str]]:
        """Return the teacher's encoder, the result of a pretraining."""
        return {"encoder": encoder_state(self._teacher)}, {}

    def line(self, row: Mapping[str, Any]) -> str:
        """See `Training`."""
        return f"step {row['step']} of {self.steps}: contrast {row['contrast']:.3f}, clustering {row['clustering']:.3f}"


def _values(contrast: float, clustering: float, norm: float) -> Mapping[str, float]:
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"training diverged: contrast {contrast}, clustering {clustering}, gradient norm {norm}; try a lower "
            "learning rate"
        )
    return {"contrast": contrast, "clustering": clustering}


def rows_of(parts: Sequence[Part]) -> pa.Table:
    """Return all images of the parts by position: `part` (URI), `row` (within it)."""
    uris = pa.array([part.uri for part in parts], pa.string())
    counts = [part.images for part in parts]
    numbers = pa.array(np.repeat(np.arange(len(parts), dtype=np.int32), counts))
    rows = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    return pa.table({"part": pa.DictionaryArray.from_arrays(numbers, uris), "row": rows})


def read_small_images(rows: pa.Table, *, side: int) -> dict[str, Any]:
    """Read rows of parts.

    Args:
        rows: columns `part` (URI), `row`; others are passed on.
        side: of the images, px.

    Returns:
        The other columns, `image` as (n, 3, side, side) uint8, and `maps` without planes.

    Raises:
        UserError: a part that is missing or damaged.
    """
    pixels: UInt8[ndarray, "n 3 side side"] = np.empty((len(rows), 3, side, side), np.uint8)
    parts, numbers = np.array(rows["part"].to_pylist(), object), rows["row"].to_numpy()
    for part in sorted(set(parts)):
        places = np.flatnonzero(parts == part)
        with parquet.opened(part, remedy=REMEDY) as file:
            sizes = np.array([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
            groups = np.searchsorted(sizes.cumsum(), numbers[places], "right")
            needed, found = np.unique(groups, return_inverse=True)
            column = file.read_row_groups(needed.tolist(), columns=["pixels"])["pixels"]
        # Map a row of the part to a row of what was read.
        skipped = (sizes.cumsum() - sizes)[needed] - (sizes[needed].cumsum() - sizes[needed])
        for place, row in zip(places, numbers[places] - skipped[found], strict=True):
            image = np.frombuffer(column[int(row)].as_buffer(), np.uint8)
            pixels[place] = image.reshape(side, side, 3).transpose(2, 0, 1)
    passed = {name: rows[name].to_numpy() for name in rows.column_names if name not in ("part", "row")}
    return {**passed, "image": pixels, "maps": np.empty((len(rows), 0, 0, 0), np.int16)}
