"""Sum and gather values over the workers of a training; without a process group they are the process's own.

A loss that workers share is the sum of their parts: each calls `backward` on its own part, and gradients are summed. If
a part depends on a sum over workers, that sum has a gradient, too.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int, Shaped
from torch import Tensor


def worker_count() -> int:
    """Return the number of workers of the default process group; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_workers(part: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the sum of every worker's `part`; it has no gradient."""
    if worker_count() > 1:
        part = part.detach().clone()
        dist.all_reduce(part)
    return part


def differentiable_sum(part: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the sum of every worker's `part`, with the gradient that the sum of all workers' losses has."""
    if worker_count() == 1:
        return part
    total: Tensor = _Sum.apply(part)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        return sum_over_workers(part)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_workers(gradients[0].contiguous())


def gather_rows(rows: Shaped[Tensor, "n ..."], keys: Int[np.ndarray, " n"]) -> Shaped[Tensor, "all ..."]:
    """Return the rows of all workers in the order of their keys, the same on each; they have no gradient.

    Args:
        rows: rows of this worker, any number.
        keys: keys of the rows; rows with the same key keep their order.
    """
    order = np.argsort(keys, kind="stable")
    if worker_count() == 1:
        return rows.detach()[torch.from_numpy(order).to(rows.device)]
    places = torch.from_numpy(np.asarray(keys, np.int64)).to(rows.device)
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(worker_count())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = max(int(count) for count in counts)

    def gathered(mine: Tensor) -> Tensor:
        padded = mine.new_zeros(most, *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    every, its = gathered(rows.detach()), gathered(places)
    return every[its.argsort(stable=True)]
