"""The device of a process: its kind, the cores it may use, and the precision it computes with."""

import os

import torch

from transfgu.recipe import EncoderRecipe


def use_cores(processes: int) -> None:
    """Let torch use a machine's cores, shared by so many processes of it, where a worker has no GPU.

    Ray holds a process to as many threads as the CPUs it asked for, which is less than what lies idle meanwhile.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // processes))


def in_bfloat16(recipe: EncoderRecipe, device: torch.device) -> bool:
    """Whether the encoder runs in bfloat16 there: where the recipe asks for it, and by "auto" where that is fast."""
    if recipe.precision != "auto":
        return recipe.precision == "bfloat16"
    # GPUs that only emulate it are slower at it than at float32.
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def own_device() -> torch.device:
    """The device of the calling actor or worker."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
