"""One worker's training: run, epoch, step. All that is random follows from the seed and a counter.

So a state is weights, moments and counters; there is no generator's state to save, and an epoch that is begun again,
by fewer workers or by more, sees the same images in the same views, the same permutations and the same order.
"""

import errno
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
from jaxtyping import Float
from ray.train import Checkpoint
from ray.train.collective import broadcast_from_rank_zero
from torch import Tensor, nn
from torch.nn import functional as F

from transfgu import formats
from transfgu.datasets.packed_maps import maps_of_planes, packed_planes, unpack_planes
from transfgu.decoder import MaskDecoder
from transfgu.encoder import patch_grid
from transfgu.errors import UserError, in_words
from transfgu.inference.device import allow_tf32, in_bfloat16, own_device, use_cores
from transfgu.inference.tokens import PatchTokens
from transfgu.runtime.failures import find_user_error
from transfgu.store import parquet, storage
from transfgu.training import checkpoints, schedule
from transfgu.training.batches import Batch, Resident, Share, Source, Streamed, load
from transfgu.training.board import may_pass
from transfgu.training.checkpoints import merit
from transfgu.training.copies import on_device
from transfgu.training.epoch_pictures import Shown
from transfgu.training.job import Job
from transfgu.training.order import Order
from transfgu.training.scoring import Mirror, Validation
from transfgu.training.state import State
from transfgu.training.step import PendingStep, StepResult, make_optimiser, start_step
from transfgu.views import apply_views, draw_views

View = Callable[[Batch, int], tuple[Tensor, Tensor]]
"""From a batch and its epoch to patch tokens (B, hw, d) and maps (B, K, h, w) on the device."""

_LOAD_BATCH = 64  # images that are encoded at a time where they are encoded once
_TELL_SECONDS = 0.3  # between two words to the driver
_ASK_SECONDS = 0.1
_QUEUED = 1  # steps that a GPU may be behind the host, which prepares the next batch meanwhile


def work(job: Job) -> None:
    """What Ray Train runs on each worker, from the last checkpoint on."""
    try:
        may_begin, checkpoint = _begin(job)
        if may_begin:
            Worker(job, checkpoint).run()
    except Exception as error:
        mistake = find_user_error(error)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            # Trying again would fill no less.
            mistake = UserError(
                f"can't write {storage.shown(job.checkpoints)}: {error.strerror or error}: make room", code="disk-full"
            )
        passing = mistake is None and may_pass(error)
        text = in_words(mistake or error)
        code = mistake.code if mistake else ""
        ray.get(job.board.fail.remote(text, is_mistake=mistake is not None, may_pass=passing, code=code))
        # Raised, so that workers which wait for this one are ended too; the board keeps it from being tried again.
        if mistake is None or ray.train.get_context().get_world_size() > 1:
            raise


def _begin(job: Job) -> tuple[bool, str]:
    """Ask the board, once for all workers, whether one more attempt makes sense; and the checkpoint to go on from."""
    context = ray.train.get_context()
    answer = None
    if context.get_world_rank() == 0:
        found = checkpoints.newest(job.checkpoints, job.board.note.remote)
        if found:
            ray.get(job.board.epochs.remote(found.history))
        may_begin = ray.get(job.board.begin.remote(len(found.history) if found else 0, context.get_world_size()))
        answer = (bool(may_begin), found.uri if found else "")
    answered: tuple[bool, str] = broadcast_from_rank_zero(answer)
    return answered


class Worker:
    """One worker of the training, its model and its data at hand."""

    def __init__(self, job: Job, checkpoint: str) -> None:
        """`checkpoint` is the URI of the one to go on from; empty: from the beginning."""
        context = ray.train.get_context()
        self.job, self.recipe = job, job.recipe
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device() if own_device().type == "cuda" else torch.device("cpu")
        self.half = in_bfloat16(self.recipe.training, self.device)
        allow_tf32(self.recipe.training, self.device)
        if self.device.type == "cpu":
            use_cores(context.get_local_world_size() * job.beside)
        self.encode = PatchTokens(self.recipe.encoder, self.device)
        self.state = self._restore(checkpoint)
        self.student: nn.Module = ray.train.torch.prepare_model(self.state.student, move_to_device=self.device)
        rows = parquet.read(job.images)
        training = self.recipe.training
        self.order = Order(
            images=len(rows), passes=training.passes, batch_size=training.batch_size, seed=self.recipe.seed
        )
        self.source, self.view = self._source(rows)
        self.validation = Validation(job, self.encode, self.rank, self.world) if job.validation else None
        self.shown = Shown(self.recipe, rows, self.encode, job.pictures) if job.pictures and self.rank == 0 else None
        self.mirror = Mirror(job, self.encode, self.rank, self.world) if job.unlabelled else None
        self.part: int | None = None  # images the decoder takes at a time; None until memory ran out
        self._told = 0.0

    def _restore(self, checkpoint: str) -> State:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            decoder = MaskDecoder(
                self.encode.encoder.width,
                self.recipe.classes,
                num_heads=self.encode.encoder.num_heads,
                depth=self.recipe.decoder.depth,
                dropout=self.recipe.decoder.dropout,
            )
        self.initial = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
        decoder = decoder.to(self.device)
        training = self.recipe.training
        state = State(student=decoder, optimiser=make_optimiser(decoder, training.lr, training.weight_decay))
        if checkpoint:
            with tempfile.TemporaryDirectory() as folder:
                checkpoints.download(checkpoint, Path(folder))
                state.load(Path(folder), self.device)
        return state

    def _source(self, rows: pa.Table) -> tuple[Source, View]:
        """Where batches come from, and how they become what the decoder sees."""
        recipe, patch = self.recipe, self.encode.encoder.patch_size
        height, width = recipe.dataset.image_size
        share = Share(
            order=self.order,
            rows=rows,
            size=recipe.dataset.training_size,
            maps=(packed_planes(recipe.concepts.count), height // patch, width // patch),
            rank=self.rank,
            world=self.world,
        )
        view = self._random_views if recipe.training.views else self._whole_images
        if share.bytes > recipe.compute.resident_gib * 2**30:
            return Streamed(share, recipe.training.epochs), view
        if recipe.training.views:
            return Resident(share, *load(share, lambda images: images, _LOAD_BATCH)), view
        # Seen whole, an image has the same patch tokens in every epoch.
        return Resident(share, *load(share, self.encode, _LOAD_BATCH)), self._known_tokens

    def _random_views(self, batch: Batch, epoch: int) -> tuple[Float[Tensor, "B hw d"], Float[Tensor, "B K h w"]]:
        encoder = self.encode.encoder
        # By slots: an image that an epoch passes twice is seen in two views.
        views = draw_views(batch.slots.tolist(), self.recipe.dataset.training_size, seed=self.recipe.seed, epoch=epoch)
        images, planes = batch.inputs.to(self.device), unpack_planes(batch.maps.to(self.device))
        images, planes = apply_views(images, planes, views, encoder.patch_size, mean=encoder.mean, std=encoder.std)
        return self.encode(images), maps_of_planes(planes)

    def _whole_images(self, batch: Batch, epoch: int) -> tuple[Float[Tensor, "B hw d"], Float[Tensor, "B K h w"]]:
        return self._known_tokens(batch._replace(inputs=self.encode(batch.inputs)), epoch)

    def _known_tokens(self, batch: Batch, epoch: int) -> tuple[Float[Tensor, "B hw d"], Float[Tensor, "B K h w"]]:
        planes = unpack_planes(batch.maps.to(self.device))
        grid = patch_grid(self.recipe.dataset.training_size, self.encode.encoder.patch_size)
        if planes.shape[2:] != grid:
            planes = F.interpolate(planes, grid, mode="bilinear")
        return batch.inputs.to(self.device), maps_of_planes(planes)

    def run(self) -> None:
        """Train what epochs are left, or as many of them as the driver wants."""
        for epoch in range(len(self.state.history), self.recipe.training.epochs):
            if not self._goes_on(epoch):
                return
            self.epoch(epoch)

    def _goes_on(self, epoch: int) -> bool:
        """The driver's word, once it has it, after `epoch` epochs; the same for all workers."""
        if not self.job.asks or not epoch:
            return True
        answer = None
        while self.rank == 0 and answer is None:
            answer = ray.get(self.job.board.goes_on.remote(epoch))
            if answer is None:
                time.sleep(_ASK_SECONDS)
        return bool(broadcast_from_rank_zero(answer))

    def epoch(self, epoch: int) -> None:
        """One epoch, its score, its checkpoint."""
        started = time.monotonic()
        recipe, state = self.recipe, self.state
        plan = schedule.plan(recipe.training, epoch)
        if plan.updates_teacher:
            state.promote()
            state.student.load_state_dict(self.initial)
        # Dropout differs from worker to worker; an epoch that is begun again draws it anew.
        torch.manual_seed(int(np.random.SeedSequence([recipe.seed, epoch, self.rank]).generate_state(1)[0]))
        results: list[StepResult] = []
        pending: deque[PendingStep] = deque()
        for index, batch in enumerate(on_device(self.source.epoch(epoch), self.device)):
            pending.append(self.step(batch, epoch, index, plan.alpha))
            if len(pending) > _QUEUED:
                results.append(self._result(pending.popleft(), epoch, len(results)))
            self._tell(epoch, index + 1)
        results += [self._result(step, epoch, index) for index, step in enumerate(pending, len(results))]
        seconds = time.monotonic() - started
        row = {
            "epoch": epoch + 1,
            **{name: float(np.mean([getattr(r, name) for r in results])) for name in _LOSSES},
            "alpha": plan.alpha if state.teacher else None,
            "teacher_updated": plan.updates_teacher,
            "skipped_steps": sum(r.skipped for r in results),
            **self._score(epoch),
            **({"label_free": self.mirror.score(state.student)} if self.mirror else {}),
            "workers": self.world,
            "seconds": round(seconds, 3),
            "images_per_second": round(self.order.steps * self.order.batch / seconds, 2),
        }
        state.history.append(row)
        if self.shown:
            self.shown.paint(epoch + 1, state.student)
        self._report(row)

    def step(self, batch: Batch, epoch: int, index: int, alpha: float) -> PendingStep:
        """Queue one step of the optimiser."""
        training, state = self.recipe.training, self.state
        patches, maps = self.view(batch, epoch)
        permutation = np.random.default_rng([self.recipe.seed, epoch, index]).permutation(self.recipe.classes)
        step = start_step(
            self.student,
            state.optimiser,
            patches,
            maps,
            state.teacher,
            omega_1=training.omega_1,
            omega_2=training.omega_2,
            alpha=alpha,
            permutation=permutation,
            background_threshold=training.background_threshold if self.recipe.background else None,
            part=self.part,
            half=self.half,
        )
        if step.part < len(patches):
            self.part = step.part
        return step

    def _result(self, step: PendingStep, epoch: int, index: int) -> StepResult:
        try:
            return step.result()
        except FloatingPointError as error:
            where, lr = f"step {index + 1} of epoch {epoch + 1}", self.recipe.training.lr
            raise UserError(f"in {where}, {error}: now {lr:g}, set --training.lr", code="loss-not-finite") from None

    def _score(self, epoch: int) -> dict[str, float | None]:
        """Scores on the validation images where they are due; the best weights so far are kept."""
        training = self.recipe.training
        due = (epoch + 1) % training.evaluate_every == 0 or epoch + 1 == training.epochs
        if not (self.validation and due):
            return {"mean_iou": None, "pixel_accuracy": None}
        score = self.validation.score(self.state.student)
        if math.isnan(score.pixel_accuracy):  # not one label could be read
            return {"mean_iou": None, "pixel_accuracy": None}
        best = max((merit(row) for row in self.state.history), default=-1.0)
        row: dict[str, float | None] = {"mean_iou": score.mean_iou, "pixel_accuracy": score.pixel_accuracy}
        if merit(row) > best:
            weights = self.state.student.state_dict()
            self.state.best = {name: tensor.detach().clone() for name, tensor in weights.items()}
        return row

    def _report(self, row: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self.rank == 0:
                self.state.save(Path(folder), self._metadata())
                checkpoint = Checkpoint.from_directory(folder)
                self.job.board.note.remote(_line(row, self.recipe.training.epochs))
                self.job.board.epochs.remote([row])
            ray.train.report(row, checkpoint=checkpoint)

    def _metadata(self) -> dict[str, str]:
        """What a weight file says of the decoder in it."""
        recipe, encoder = self.recipe, self.encode.encoder
        return {
            formats.WEIGHTS_KEY: str(formats.FORMAT),
            "classes": str(recipe.classes),
            "num_heads": str(encoder.num_heads),
            "patch_size": str(encoder.patch_size),
            "encoder": recipe.encoder.name,
            "recipe": recipe.digest("training"),
        }

    def _tell(self, epoch: int, steps: int) -> None:
        now = time.monotonic()
        if self.rank == 0 and now - self._told > _TELL_SECONDS:
            self._told = now
            self.job.board.step.remote(epoch * self.order.steps + steps, self.recipe.training.epochs * self.order.steps)


_LOSSES = ("total", "peer", "diversity", "uncertainty")


def _line(row: dict[str, Any], epochs: int) -> str:
    """An epoch's row of the history, for the user."""
    score = ""
    if row["mean_iou"] is not None:
        score = f", mIoU {row['mean_iou']:.1f}, accuracy {row['pixel_accuracy']:.1f}"
    teacher = ", new teacher" if row["teacher_updated"] else ""
    return f"epoch {row['epoch']} of {epochs}: loss {row['total']:.3f}{score}{teacher}, {row['seconds']:.1f} s"
