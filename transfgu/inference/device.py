"""Choose the device of a process, its cores, and its precision."""

import os

import torch

from transfgu.errors import UserError
from transfgu.recipe import EncoderRecipe, TrainingRecipe

DEVICE = "TRANSFGU_DEVICE"
"""Environment variable; `cpu` means: compute on the CPU and communicate by Gloo, whatever GPUs nodes declare."""

_NO_GPU = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide all GPUs


def use_cores(processes: int) -> None:
    """Let torch use the machine's cores, divided among `processes`, in a worker without a GPU.

    Ray limits a process to as many threads as the CPUs it asked for, which leaves cores idle.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // processes))


def in_bfloat16(recipe: EncoderRecipe | TrainingRecipe, device: torch.device) -> bool:
    """Return True if `recipe.precision` means bfloat16 on `device`; "auto" does on GPUs that compute it natively."""
    if recipe.precision != "auto":
        return recipe.precision == "bfloat16"
    # GPUs that only emulate it are slower with it than with float32.
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def allow_tf32(recipe: EncoderRecipe | TrainingRecipe, device: torch.device) -> None:
    """Compute this process's remaining float32 matrix products in TF32 if the recipe computes in bfloat16 on a GPU.

    If the recipe asks for float32, they stay float32.
    """
    if device.type == "cuda" and in_bfloat16(recipe, device):
        torch.set_float32_matmul_precision("high")


def without_gpus() -> bool:
    """Return True if the environment tells workers to ignore the GPUs that their nodes declare: a simulated cluster."""
    return os.environ.get(DEVICE, "") == "cpu"


def own_device() -> torch.device:
    """Return the device of the calling actor or worker: its GPU if it has one, otherwise the CPU.

    Raises:
        UserError: it was given a GPU, by Ray or by CUDA_VISIBLE_DEVICES, but torch finds none.
    """
    if without_gpus():
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible not in _NO_GPU:
        raise no_gpu(f"GPU {visible} of this node")
    return torch.device("cpu")


def no_gpu(which: str) -> UserError:
    """Return the error for a requested GPU `which` that torch does not find."""
    return UserError(
        f"{which} can't be used: torch {torch.__version__} finds none; check the driver by nvidia-smi and torch by "
        f"torch.cuda.is_available(), or set {DEVICE}=cpu on all nodes to compute without GPUs",
        code="gpu-missing",
    )
