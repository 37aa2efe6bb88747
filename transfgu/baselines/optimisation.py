"""Take an optimiser step whose loss is a sum over workers, and apply batch norm over the global batch."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from transfgu.learner import Pending, Setting
from transfgu.workers import differentiable_sum, sum_over_workers, worker_count

N = TypeVar("N", bound=nn.Module)


def new_network(make: Callable[[], N], setting: Setting) -> N:
    """Create a method's network, on the worker's device.

    Its initial weights depend only on the recipe's seed and are the same on every worker; torch's random state is not
    changed. Batch norm uses the statistics of the global batch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.recipe.seed)
        network = make()
    share_batch_norm(network)
    return network.to(setting.device)


def optimise(network: nn.Module, optimiser: Optimizer, losses: Mapping[str, Tensor]) -> tuple[bool, Pending]:
    """Take one step; every worker must call it.

    Args:
        network: its gradients are summed over workers.
        optimiser: optimiser of its parameters.
        losses: shares of this worker, which sum to the global batch's values; `total` is minimised.

    Returns:
        True if the step was taken, the same on every worker; and the values, which raise FloatingPointError if the
            total or its gradient was not a number. In this case weights and moments are unchanged.
    """
    optimiser.zero_grad()
    if losses["total"].requires_grad:
        torch.autograd.backward(losses["total"])
    parameters = [p for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    values = torch.stack([value.detach().float() for value in losses.values()])
    if worker_count() > 1:
        flat = sum_over_workers(torch.cat([values, *(gradient.flatten() for gradient in gradients)]))
        values, *summed = torch.split(flat, [len(values), *(gradient.numel() for gradient in gradients)])
        for gradient, total in zip(gradients, summed, strict=True):
            gradient.copy_(total.view_as(gradient))
    *told, norm = torch.cat([values, nn.utils.get_total_norm(gradients).reshape(1)]).tolist()
    found = dict(zip(losses, told, strict=True))
    taken = math.isfinite(found["total"]) and math.isfinite(norm)
    if taken:
        optimiser.step()
    return taken, partial(_values, found, norm)


def _values(found: Mapping[str, float], norm: float) -> Mapping[str, float]:
    if not (math.isfinite(found["total"]) and math.isfinite(norm)):
        raise FloatingPointError(
            f"training diverged: loss {found['total']}, gradient norm {norm}; try a lower learning rate"
        )
    return found


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with statistics of all workers' slices, on any device; a slice may be empty.

    PyTorch's SyncBatchNorm does the same, but only on GPUs.
    """

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Normalise by the statistics of the global batch in training, by the running statistics in evaluation."""
        if worker_count() == 1 or not self.training:
            return super().forward(input)
        wide = input.float()
        count = sum_over_workers(wide.new_tensor(wide.numel() / wide.shape[1]))
        mean = differentiable_sum(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = differentiable_sum(centred.square().sum((0, 2, 3))) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                rate = 0.1 if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.detach(), rate)
                self.running_var.lerp_(variance.detach() * count / (count - 1).clamp(min=1), rate)
        normal = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            normal = normal * self.weight[:, None, None] + self.bias[:, None, None]
        return normal.to(input.dtype)


def share_batch_norm(network: nn.Module) -> nn.Module:
    """Replace each `BatchNorm2d` of a network by a `SharedBatchNorm2d` with its weights; keeps timm's additions."""
    for name, module in network.named_children():
        if isinstance(module, nn.BatchNorm2d) and not isinstance(module, SharedBatchNorm2d):
            if type(module) is not nn.BatchNorm2d:
                raise TypeError(f"{name} is a {type(module).__name__}, which does more than batch norm")
            shared = SharedBatchNorm2d(module.num_features, module.eps, module.momentum, module.affine)
            shared.load_state_dict(module.state_dict())
            setattr(network, name, shared.train(module.training))
        else:
            share_batch_norm(module)
    return network


def resized(images: Float[Tensor, "B 3 H W"], size: tuple[int, int]) -> Float[Tensor, "B 3 h w"]:
    """Return images in another size, bilinear with antialias; unchanged if they have this size."""
    if (images.shape[2], images.shape[3]) == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
