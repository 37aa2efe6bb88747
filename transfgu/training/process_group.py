"""Gradients go by what the workers have, not by what their nodes claim.

NCCL needs a GPU of its own for each worker. A share of one is known beforehand; a GPU that a node claims and does not
have, as on a simulated cluster, only the workers can tell. Ray Train's controller opens this module, which therefore
imports nothing of training's (see `transfgu.training.controller`).
"""

from dataclasses import replace
from typing import Any

import torch
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from transfgu.training.controller import Alone


def process_group(gpus: float, workers: int | tuple[int, int]) -> TorchConfig | Alone:
    """How workers that hold so many GPUs each exchange gradients: by NCCL if these are whole ones, else by Gloo.

    Args:
        gpus: of each worker.
        workers: how many, or from how many to how many; a single one has no process group.
    """
    if workers == 1:
        return Alone()
    return _AsTheyAre(backend="nccl" if gpus >= 1 else "gloo")


class _AsTheyAre(TorchConfig):
    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Ray Train's hook, before the workers are joined."""
        if backend_config.backend == "nccl" and not all(worker_group.execute(torch.cuda.is_available)):
            backend_config = replace(backend_config, backend="gloo")
        super().on_start(worker_group, backend_config)
