"""Choose how training workers exchange gradients: NCCL between whole GPUs, otherwise Gloo."""

from collections.abc import Iterator
from contextlib import contextmanager

from ray.train import ControllerError
from ray.train.torch import TorchConfig

from transfgu.inference.device import no_gpu, without_gpus
from transfgu.training.controller import Alone

_NCCL_WITHOUT_GPU = ("requires at least one CUDA device", "no GPUs found")  # torch 2.15, torch 2.11


def process_group(gpus: float, workers: int | tuple[int, int]) -> TorchConfig | Alone:
    """Return the backend configuration of a group of training workers.

    Args:
        gpus: GPUs per worker. NCCL requires a whole GPU per worker; with less, or if the environment declares GPUs as
            simulated (see `transfgu.inference.device.DEVICE`), it is Gloo.
        workers: number of workers, or the smallest and the largest number; a single one has no process group.
    """
    if workers == 1:
        return Alone()
    return TorchConfig(backend="nccl" if gpus >= 1 and not without_gpus() else "gloo")


@contextmanager
def gpus_found() -> Iterator[None]:
    """Turn Ray Train's error for workers with missing GPUs into a UserError."""
    try:
        yield
    except ControllerError as error:
        if any(sign in str(error) for sign in _NCCL_WITHOUT_GPU):
            raise no_gpu("a training worker's GPU") from None
        raise
