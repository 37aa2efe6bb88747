"""A step talks to other workers twice, at moments that no worker's memory can move.

Before its forward pass it reduces the counts that weigh the loss; after its backward pass, gradients and loss values
together. In between a worker is on its own, so one that runs out of memory takes its slice in smaller parts and the
others merely wait; and since all see the same total, all skip a step or none.
"""

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Optimizer

from transfgu.losses import Loss, Permutation, batch_shares, loss_share, worker_count

logger = logging.getLogger(__name__)

GRADIENT_LIMIT = 1.0


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimiser step over the global batch; the same on every worker, but for ``part``."""

    total: float
    peer: float
    diversity: float
    uncertainty: float
    gradient_norm: float
    """Of all parameters' gradients together, before they are clamped."""
    skipped: bool
    """The total was not positive: weights and moments are as before."""
    part: int
    """Images a forward pass took on this worker; less than asked if memory ran out. Ask for it in the next step."""


def make_optimiser(decoder: nn.Module, lr: float, weight_decay: float = 5e-4) -> Adam:
    """Adam, with decay on every parameter of two or more dimensions, the class embedding included.

    Moments belong to the parameters, not to their values: a student that restarts by ``load_state_dict`` keeps them,
    as in the published loop.
    """
    parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    return Adam(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=lr,
    )


def training_step(
    student: nn.Module,
    optimiser: Optimizer,
    patches: Float[Tensor, "B hw d"],
    maps: Float[Tensor, "B K h w"],
    teacher: nn.Module | None = None,
    *,
    omega_1: float,
    omega_2: float,
    alpha: float,
    permutation: Permutation | None = None,
    background_threshold: float | None = None,
    part: int | None = None,
) -> StepResult:
    """Forward, backward and one optimiser step; every worker must call it with its slice of the global batch.

    The gradient is the global batch's, whatever the slices' sizes (one may be empty) and whatever the parts a slice
    is taken in. On running out of memory the part is halved, the step begins again, and a warning says so.

    Args:
        student: a `MaskDecoder`, plain or wrapped in DistributedDataParallel; its parameters are updated.
        optimiser: over the student's parameters.
        patches: the frozen encoder's patch tokens of this worker's slice.
        maps: its pseudo-label maps, unscaled.
        teacher: a `MaskDecoder`; None until there is one.
        omega_1, omega_2, alpha, permutation, background_threshold: as in `bootstrapping_loss`, the same everywhere.
        part: images a forward pass takes; the whole slice unless given.

    Raises:
        FloatingPointError: the loss or its gradient is not a number; weights and moments are as before.
    """
    share = partial(
        loss_share,
        batch_shares(maps, background_threshold),
        omega_1=omega_1,
        omega_2=omega_2,
        alpha=alpha,
        permutation=permutation,
        background_threshold=background_threshold,
    )
    part = max(1, min(part or len(patches), len(patches)))
    while (values := _accumulate(student, teacher, patches, maps, share, part)) is None:
        part = (part + 1) // 2
        logger.warning(
            "The training step ran out of memory: %d images a worker go through the decoder %d at a time from here on.",
            len(patches),
            part,
        )
        if patches.is_cuda:
            torch.cuda.empty_cache()

    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    gradients = [_gradient(parameter) for parameter in parameters]
    if worker_count() > 1:
        _average_over_workers([values, *gradients])
    total, peer, diversity, uncertainty, norm = torch.cat(
        [values, nn.utils.get_total_norm(gradients).reshape(1)]
    ).tolist()
    if not math.isfinite(total) or math.isnan(norm):
        raise FloatingPointError(
            f"training diverged: loss {total} (peer {peer}, diversity {diversity}, uncertainty {uncertainty}), "
            f"gradient norm {norm}; try a lower learning rate"
        )
    # As published; the total falls to zero only where the negative labels' cross entropy outweighs all the rest.
    skipped = total <= 0
    if not skipped:
        nn.utils.clip_grad_value_(parameters, GRADIENT_LIMIT)
        optimiser.step()
    return StepResult(
        total=total,
        peer=peer,
        diversity=diversity,
        uncertainty=uncertainty,
        gradient_norm=norm,
        skipped=skipped,
        part=part,
    )


def _accumulate(
    student: nn.Module,
    teacher: nn.Module | None,
    patches: Float[Tensor, "B hw d"],
    maps: Float[Tensor, "B K h w"],
    share: Callable[..., Loss],
    part: int,
) -> Float[Tensor, " 4"] | None:
    """Leave this worker's gradients in the student, ``part`` images at a time; None if memory ran out on the way.

    Returns total, peer, diversity and uncertainty.
    """
    student.zero_grad()
    values = torch.zeros(4, device=patches.device)
    height, width = maps.shape[-2:]
    # The wrapper's own reduction would tie workers together in the middle of a backward pass.
    alone = student.no_sync() if isinstance(student, DistributedDataParallel) else nullcontext()
    try:
        with alone:
            for some_patches, some_maps in zip(patches.split(part), maps.split(part), strict=True):
                logits, class_embeddings = student(some_patches)
                teacher_logits = None
                if teacher is not None:
                    with torch.no_grad():
                        teacher_logits = teacher.eval()(some_patches)[0].mT.unflatten(2, (height, width))
                loss = share(logits.mT.unflatten(2, (height, width)), class_embeddings, some_maps, teacher_logits)
                loss.total.backward()
                values += torch.stack([loss.total, loss.peer, loss.diversity, loss.uncertainty]).detach()
    except RuntimeError as error:
        if part == 1 or not is_out_of_memory(error):
            raise
        return None
    return values


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's memory ran out, as torch and the CUDA libraries below it say so."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in str(error) for sign in ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    )


def _gradient(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient; zeros, left in the parameter, where this worker's slice is empty."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _average_over_workers(tensors: list[Tensor]) -> None:
    """Average in place, all tensors in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= worker_count()
    for tensor, reduced in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(reduced.view_as(tensor))
