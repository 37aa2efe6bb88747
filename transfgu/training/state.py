"""Hold the state of a training: weights, moments and history; there is no state of a random generator."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transfgu.training import checkpoints

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors of a checkpoint by the name of their file, without suffix, and their own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """A copy of a state in the host's memory, which later steps do not change."""

    tensors: Tensors
    history: str
    metadata: dict[str, str]

    def save(self, folder: Path) -> None:
        """Write the files of a checkpoint to a folder, and seal it."""
        for name, tensors in self.tensors.items():
            safetensors.torch.save_file(dict(tensors), folder / f"{name}.safetensors", self.metadata)
        (folder / checkpoints.HISTORY).write_text(self.history)
        checkpoints.seal(folder)


@dataclass(kw_only=True)
class State:
    """The content of a checkpoint, as safetensors and JSON."""

    student: nn.Module
    optimiser: Optimizer | None
    teacher: nn.Module | None = None
    best: dict[str, Tensor] | None = None
    """Weights of the epoch with the highest sum of mIoU and accuracy; None before the first score."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row per finished epoch."""

    def snapshot(self, metadata: dict[str, str], more: Tensors | None = None) -> Snapshot:
        """Copy the state; `metadata` is written into all weight files, including those of `more`."""
        moments = {
            f"{name}:{moment}": value
            for name, parameter in self.student.named_parameters()
            for moment, value in (self.optimiser.state.get(parameter, {}) if self.optimiser else {}).items()
            if isinstance(value, Tensor)
        }
        files: dict[str, Mapping[str, Tensor] | None] = {
            "student": self.student.state_dict(),
            "moments": moments,
            "best": self.best,
            "teacher": self.teacher.state_dict() if self.teacher else None,
            **(more or {}),
        }
        copies = {
            name: {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
            for name, tensors in files.items()
            if tensors
        }
        return Snapshot(tensors=copies, history=json.dumps(self.history), metadata=metadata)

    def load(self, folder: Path, device: torch.device) -> None:
        """Restore the state from a folder."""
        self.take(*read(folder, device))

    def take(self, tensors: Tensors, history: list[dict[str, Any]]) -> None:
        """Restore the state from the result of :func:`read`."""
        self.student.load_state_dict(tensors["student"])
        parameters = dict(self.student.named_parameters())
        for key, value in tensors.get("moments", {}).items():
            assert self.optimiser
            name, _, moment = key.rpartition(":")
            # Only a fused optimiser keeps its counter of steps on the device.
            on_host = moment == "step" and not self.optimiser.defaults.get("fused")
            self.optimiser.state[parameters[name]][moment] = value.cpu() if on_host else value
        if "teacher" in tensors:
            if self.teacher is None:
                self.promote()
            assert self.teacher
            self.teacher.load_state_dict(tensors["teacher"])
        best = tensors.get("best")
        self.best = None if best is None else dict(best)
        self.history = history

    def promote(self) -> None:
        """Copy the student to the teacher."""
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)


def read(folder: Path, device: torch.device) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, Any]]]:
    """Read a checkpoint's tensors and history from a local folder."""
    tensors = {
        file.stem: safetensors.torch.load_file(file, device=str(device)) for file in folder.glob("*.safetensors")
    }
    return tensors, json.loads((folder / checkpoints.HISTORY).read_text())
