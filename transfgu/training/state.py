"""The state of a training: weights, moments and history; there is no generator's state to save."""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.optim import Adam

from transfgu.decoder import MaskDecoder
from transfgu.training import checkpoints


@dataclass(kw_only=True)
class State:
    """What a checkpoint holds, as safetensors and JSON."""

    student: MaskDecoder
    optimiser: Adam
    teacher: MaskDecoder | None = None
    best: dict[str, Tensor] | None = None
    """Weights of the epoch with the highest sum of mIoU and accuracy; None where none is scored yet."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row a finished epoch."""

    def save(self, folder: Path, metadata: dict[str, str]) -> None:
        """Write it to a folder; `metadata` goes into the weight files."""
        moments = {
            f"{name}:{moment}": value
            for name, parameter in self.student.named_parameters()
            for moment, value in self.optimiser.state.get(parameter, {}).items()
        }
        files = {"student": self.student.state_dict(), "moments": moments, "best": self.best}
        files["teacher"] = self.teacher.state_dict() if self.teacher else None
        for name, tensors in files.items():
            if tensors:
                tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
                safetensors.torch.save_file(tensors, folder / f"{name}.safetensors", metadata)
        (folder / checkpoints.HISTORY).write_text(json.dumps(self.history))
        checkpoints.seal(folder)

    def load(self, folder: Path, device: torch.device) -> None:
        """Take it from a folder."""
        tensors = {
            file.stem: safetensors.torch.load_file(file, device=str(device)) for file in folder.glob("*.safetensors")
        }
        self.student.load_state_dict(tensors["student"])
        parameters = dict(self.student.named_parameters())
        for key, value in tensors.get("moments", {}).items():
            name, _, moment = key.rpartition(":")
            self.optimiser.state[parameters[name]][moment] = value
        if "teacher" in tensors:
            self.promote()
            assert self.teacher
            self.teacher.load_state_dict(tensors["teacher"])
        self.best = tensors.get("best")
        self.history = json.loads((folder / checkpoints.HISTORY).read_text())

    def promote(self) -> None:
        """Make the student, as it is, the teacher."""
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
