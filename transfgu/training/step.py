"""Run one training step: forward, backward, reduction over workers, and the optimiser's update.

Workers communicate twice per step: they reduce the counts that weigh the loss before the forward pass, and gradients
and loss values after the backward pass. In between a worker computes alone, so one that runs out of memory can process
its slice in smaller parts while the others wait. All workers see the same total, so all skip a step or none.

The update is decided on the device. Nothing in a step waits for a GPU: the host prepares the next batch meanwhile.
"""

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Optimizer

from transfgu.errors import UserError
from transfgu.losses import Loss, Permutation, Real, batch_shares, loss_share
from transfgu.workers import worker_count

logger = logging.getLogger(__name__)

GRADIENT_LIMIT = 1.0


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Values of one optimiser step over the global batch; the same on every worker, except ``part``."""

    total: float
    peer: float
    diversity: float
    uncertainty: float
    gradient_norm: float
    """Norm of all parameters' gradients together, before they are clamped."""
    skipped: bool
    """True if the total was not positive: weights and moments are unchanged."""
    part: int
    """Images per forward pass on this worker, fewer than requested if memory ran out; request it in the next step."""


@dataclass(frozen=True)
class PendingStep:
    """A step that a GPU may still be computing."""

    part: int
    """As in `StepResult`; known before the step is done."""
    _values: Float[Tensor, " 5"]
    _done: torch.cuda.Event | None = field(default=None, compare=False)

    def result(self) -> StepResult:
        """Return the step's values; waits until the device has them.

        Raises:
            FloatingPointError: the loss or its gradient was not a number; weights and moments stayed as they were.
        """
        if self._done is not None:
            self._done.synchronize()
        total, peer, diversity, uncertainty, norm = self._values.tolist()
        if not math.isfinite(total) or math.isnan(norm):
            raise FloatingPointError(
                f"training diverged: loss {total} (peer {peer}, diversity {diversity}, uncertainty "
                f"{uncertainty}), gradient norm {norm}; try a lower learning rate"
            )
        return StepResult(
            total=total,
            peer=peer,
            diversity=diversity,
            uncertainty=uncertainty,
            gradient_norm=norm,
            skipped=total <= 0,
            part=self.part,
        )


def make_optimiser(decoder: nn.Module, lr: float, weight_decay: float = 5e-4) -> Adam:
    """Return Adam with weight decay on every parameter of two or more dimensions, the class embedding included.

    Moments belong to the parameters, not to their values: a student that restarts by ``load_state_dict``
    keeps them, as in the published loop.
    """
    parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    return Adam(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        fused=True,  # one pass over the memory instead of a dozen
    )


def start_step(
    student: nn.Module,
    optimiser: Optimizer,
    patches: Float[Tensor, "B hw d"],
    maps: Float[Tensor, "B K h w"],
    teacher: nn.Module | None = None,
    *,
    omega_1: Real,
    omega_2: Real,
    alpha: Real,
    permutation: Permutation | None = None,
    background_threshold: Real | None = None,
    certain_share: Real = 1,
    part: int | None = None,
    half: bool = False,
) -> PendingStep:
    """Queue forward, backward and one optimiser step; every worker must call it with its slice of the global batch.

    The gradient is the global batch's, for any sizes of slices (one may be empty) and of the parts in which a
    slice is processed. If memory runs out, the part is halved, the step begins again, and a warning says so.

    Args:
        student: a `MaskDecoder`, plain or wrapped in DistributedDataParallel; its parameters are updated.
        optimiser: over the student's parameters. A fused one decides on the device whether to skip the update.
        patches: the frozen encoder's patch tokens of this worker's slice.
        maps: pseudo-label maps of the slice, unscaled.
        teacher: a `MaskDecoder`; None until there is one.
        omega_1: weight of the diversity.
        omega_2: weight of the uncertainty.
        alpha: weight of the negative label's cross entropy.
        permutation: of the C classes, for the negative labels; the same on every worker. Required with a
            teacher.
        background_threshold: T_bg if class 0 is background.
        certain_share: share of each class's pixels that the peer loss counts; see `transfgu.losses.batch_shares`.
        part: images per forward pass; the whole slice unless given.
        half: compute student's and teacher's matrix products in bfloat16. Norms, cosines and the loss stay in the
            weights' precision.

    Raises:
        UserError: memory runs out over a single image.
    """
    share = partial(
        loss_share,
        batch_shares(maps, background_threshold, certain_share),
        omega_1=omega_1,
        omega_2=omega_2,
        alpha=alpha,
        permutation=permutation,
        background_threshold=background_threshold,
    )
    asked = fitting = max(1, min(part or len(patches), len(patches)))
    while (sums := _accumulate(student, teacher, patches, maps, share, fitting, half)) is None:
        if fitting == 1:
            raise UserError(
                "one image of the training batch is too large for the device: use smaller images",
                code="image-too-large",
            )
        fitting //= 2
        if patches.is_cuda:
            torch.cuda.empty_cache()
    if fitting < asked:
        logger.warning("out of memory: training batch processed %d images at a time, not %d", fitting, asked)

    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if worker_count() > 1:
        _average_over_workers([sums, *gradients])
    values = torch.cat([sums, nn.utils.get_total_norm(gradients).reshape(1)])
    # Steps with a total that is not positive are skipped, as published. Only the negative labels' cross entropy can
    # make it negative: the student then fits its labels so well that further steps would only unlearn the others.
    total, norm = values[0], values[4]
    skips = (total <= 0) | ~total.isfinite() | norm.isnan()
    nn.utils.clip_grad_value_(parameters, GRADIENT_LIMIT)
    if getattr(optimiser, "_step_supports_amp_scaling", False):
        optimiser.found_inf = skips.float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
        optimiser.step()
        del optimiser.found_inf  # type: ignore[attr-defined]
    elif not skips:
        optimiser.step()
    if not values.is_cuda:
        return PendingStep(fitting, values)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    values = values.to("cpu", non_blocking=True)
    done.record()
    return PendingStep(fitting, values, done)


def _accumulate(
    student: nn.Module,
    teacher: nn.Module | None,
    patches: Float[Tensor, "B hw d"],
    maps: Float[Tensor, "B K h w"],
    share: Callable[..., Loss],
    part: int,
    half: bool,
) -> Float[Tensor, " 4"] | None:
    """Leave this worker's gradients in the student, processing ``part`` images at a time.

    Returns total, peer, diversity and uncertainty; None if memory ran out.
    """
    student.zero_grad()
    values = torch.zeros(4, device=patches.device)
    grid = (maps.shape[2], maps.shape[3])
    # The wrapper's own reduction would tie workers together in the middle of a backward pass.
    alone = student.no_sync() if isinstance(student, DistributedDataParallel) else nullcontext()
    try:
        with alone:
            for tokens, targets in zip(torch.split(patches, part), torch.split(maps, part), strict=True):
                with torch.autocast(patches.device.type, torch.bfloat16) if half else nullcontext():
                    masks, class_embeddings = student(tokens)
                    teacher_logits = None if teacher is None else _masks(teacher, tokens, grid)
                loss = share(_to_maps(masks, grid), class_embeddings, targets, teacher_logits)
                torch.autograd.backward(loss.total)
                values += torch.stack([loss.total, loss.peer, loss.diversity, loss.uncertainty]).detach()
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        return None  # and not a retry from here: the caught exception keeps the failed part's tensors alive
    return values


@torch.no_grad()
def _masks(teacher: nn.Module, patches: Float[Tensor, "B hw d"], grid: tuple[int, int]) -> Float[Tensor, "B C h w"]:
    """Return the teacher's logits, without dropout."""
    logits, _ = teacher.eval()(patches)
    return _to_maps(logits, grid)


def _to_maps(logits: Float[Tensor, "B hw C"], grid: tuple[int, int]) -> Float[Tensor, "B C h w"]:
    return logits.mT.reshape(len(logits), logits.shape[2], *grid)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Return True if a device's memory ran out, by the messages of torch and the CUDA libraries below it."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in str(error) for sign in ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    )


def _average_over_workers(tensors: list[Tensor]) -> None:
    """Average in place, all tensors in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= worker_count()
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, average in zip(tensors, torch.split(flat, sizes), strict=True):
        tensor.copy_(average.view_as(tensor))
