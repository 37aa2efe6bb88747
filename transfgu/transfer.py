"""Copy tensors to a GPU without waiting for it.

An ordinary copy from the host waits until the GPU has finished all queued work. A copy from page-locked memory does
not, so the host can queue the next operations at once.
"""

from functools import lru_cache

import torch
from jaxtyping import Shaped
from torch import Tensor


def to_device(tensor: Shaped[Tensor, "..."], device: torch.device) -> Shaped[Tensor, "..."]:
    """Return `tensor` on `device`; a copy from the host to a GPU is queued, not waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Shaped[Tensor, " n"]:
    """Return `values` as a tensor on `device`, copied to a GPU once per process; it must not be written to."""
    return torch.tensor(values, dtype=dtype) if device.type == "cpu" else _copied_once(values, device, dtype)


@lru_cache(maxsize=64)
def _copied_once(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # one made for inference would be refused by autograd later
        return torch.tensor(values, dtype=dtype, device=device)
