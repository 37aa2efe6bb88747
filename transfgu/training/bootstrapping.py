"""Train as in TransFGU: the student learns from maps and teacher, and regularly becomes the teacher."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import ray.train.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from transfgu.datasets.packed_maps import maps_of_planes, unpack_planes
from transfgu.decoder import MaskDecoder
from transfgu.encoder import patch_grid
from transfgu.inference.device import in_bfloat16
from transfgu.inference.mask_model import MaskModel
from transfgu.inference.tokens import PatchTokens
from transfgu.learner import Batch, Batches, Model, Pending, Setting
from transfgu.training import schedule
from transfgu.training.step import PendingStep, make_optimiser, start_step
from transfgu.views import apply_views, draw_views

_LOSSES = ("total", "peer", "diversity", "uncertainty")


class Bootstrapping:
    """The mask decoder's training on pseudo labels; see `transfgu.learner.Learner`."""

    def __init__(self, setting: Setting) -> None:
        self.recipe, self.device = setting.recipe, setting.device
        recipe, training = self.recipe, self.recipe.training
        self.encode = PatchTokens(recipe.encoder, self.device)
        encoder = self.encode.encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            decoder = MaskDecoder(
                encoder.width,
                recipe.classes,
                num_heads=encoder.num_heads,
                depth=recipe.decoder.depth,
                dropout=recipe.decoder.dropout,
            )
        self.initial = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
        self.network: nn.Module = decoder.to(self.device)
        self.optimiser: Optimizer = make_optimiser(self.network, training.scaled_lr, training.weight_decay)
        self.teacher: nn.Module | None = None
        self.model: Model = MaskModel(self.encode, decoder)
        self.whole = not training.views
        self._student: nn.Module = ray.train.torch.prepare_model(self.network, move_to_device=self.device)
        self._plan = schedule.plan(training, 0)
        self._half = in_bfloat16(training, self.device)
        self._part: int | None = None  # images per pass of the decoder; None until memory runs out

    def begin(self, epoch: int, batches: Batches) -> None:
        """Make the student the teacher if the schedule says so, and start with a new student."""
        self._plan = schedule.plan(self.recipe.training, epoch)
        if self._plan.updates_teacher:
            self.teacher = copy.deepcopy(self.network).eval().requires_grad_(False)
            self.network.load_state_dict(self.initial)

    def step(self, batch: Batch, epoch: int, index: int) -> Pending:
        """See `transfgu.training.step`; `skipped_steps` is 1 if the total was not positive."""
        recipe, training = self.recipe, self.recipe.training
        patches, maps = self._known_tokens(batch) if self.whole else self._random_views(batch, epoch, index)
        step = start_step(
            self._student,
            self.optimiser,
            patches,
            maps,
            self.teacher,
            omega_1=training.omega_1,
            omega_2=training.omega_2,
            alpha=self._plan.alpha,
            permutation=np.random.default_rng([recipe.seed, epoch, index]).permutation(recipe.classes),
            background_threshold=training.background_threshold if recipe.background else None,
            certain_share=training.certain_share,
            part=self._part,
            half=self._half,
        )
        if step.part < len(patches):
            self._part = step.part
        return partial(_values, step)

    def end(self, epoch: int, batches: Batches, *, scored: bool) -> Mapping[str, Any]:
        """Return the schedule's part of the row of the history."""
        return {
            "alpha": self._plan.alpha if self.teacher else None,
            "teacher_updated": self._plan.updates_teacher,
        }

    def _random_views(
        self, batch: Batch, epoch: int, index: int
    ) -> tuple[Float[Tensor, "B hw d"], Float[Tensor, "B K h w"]]:
        encoder = self.encode.encoder
        # By slots, because an image that occurs twice in an epoch has two views.
        views = draw_views(
            batch.slots.tolist(),
            self.recipe.dataset.training_size,
            seed=self.recipe.seed,
            epoch=epoch,
            batch=index if self.recipe.training.colours == "batch" else None,
        )
        images, planes = batch.inputs.to(self.device), unpack_planes(batch.maps.to(self.device))
        images, planes = apply_views(images, planes, views, encoder.patch_size, mean=encoder.mean, std=encoder.std)
        return self.encode(images), maps_of_planes(planes)

    def _known_tokens(self, batch: Batch) -> tuple[Float[Tensor, "B hw d"], Float[Tensor, "B K h w"]]:
        planes = unpack_planes(batch.maps.to(self.device))
        grid = patch_grid(self.recipe.dataset.training_size, self.encode.encoder.patch_size)
        if planes.shape[2:] != grid:
            planes = F.interpolate(planes, grid, mode="bilinear")
        return batch.inputs.to(self.device), maps_of_planes(planes)


def _values(step: PendingStep) -> Mapping[str, float]:
    result = step.result()
    return {**{name: getattr(result, name) for name in _LOSSES}, "skipped_steps": float(result.skipped)}
