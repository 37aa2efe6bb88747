"""Checkpoints are written while training continues, and no error in writing them is lost."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from transfgu.learner import Pending
from transfgu.recipe import ComputeRecipe
from transfgu.runtime.progress import Progress
from transfgu.training import checkpoints
from transfgu.training.fit import fit
from transfgu.training.job import Place
from transfgu.training.order import Order
from transfgu.training.state import State, Tensors

pytestmark = [pytest.mark.ray, pytest.mark.long]


class Counting:
    """A training of one step per epoch, whose weight is the number of steps."""

    seed, epochs, steps, remedy = 0, 3, 3, ""

    def __init__(self, unwritable: int, place: Place) -> None:
        self._unwritable = unwritable
        self.order = Order(images=1, passes=1, batch_size=1, seed=0)
        network = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(network.weight)
        self._weight, self.state = network.weight, State(student=network, optimiser=None)

    def load(self, tensors: Tensors, history: list[dict[str, Any]]) -> None:
        self.state.take(tensors, history)

    def begin(self, epoch: int) -> None:
        pass

    def batches(self, epoch: int) -> Iterator[int]:
        yield 0

    def step(self, batch: int, epoch: int, index: int) -> Pending:
        with torch.no_grad():
            self._weight.add_(1)
        return lambda: {"total": 0.0}

    def end(self, epoch: int, results: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        return {}

    def epoch_ended(self, epoch: int) -> None:
        pass

    def files(self) -> tuple[Mapping[str, Mapping[str, Tensor]], dict[str, Any]]:
        """Return metadata that safetensors refuses in the epoch `unwritable`."""
        return {}, {"key": 1 if len(self.state.history) == self._unwritable else "1"}

    def line(self, row: Mapping[str, Any]) -> str:
        return f"epoch {row['epoch']}"


def train(folder: Path, unwritable: int) -> checkpoints.Found:
    return fit(
        partial(Counting, unwritable),
        name="counting",
        folder=str(folder),
        compute=ComputeRecipe(),
        workers=1,
        progress=Progress("training", quiet=True),
    )


def steps_in(found: checkpoints.Found) -> float:
    return float(safetensors.torch.load_file(Path(found.uri) / "student.safetensors")["weight"])


@pytest.mark.parametrize("unwritable", [2, 3])
def test_a_checkpoint_that_is_not_written_ends_the_training(unwritable: int, tmp_path: Path, ray_cluster: None) -> None:
    with pytest.raises(RuntimeError, match=f"training failed twice alike in epoch {unwritable}, with TypeError"):
        train(tmp_path, unwritable)
    found = checkpoints.newest(str(tmp_path / "counting"))
    assert found is not None
    assert steps_in(found) == len(found.history) == unwritable - 1
    # Without the error, the same command continues from there to the complete last checkpoint.
    found = train(tmp_path, 0)
    assert steps_in(found) == len(found.history) == 3
    assert checkpoints.is_whole(found.uri)
    # Ray Train keeps two; one that was not accounted for is left of the attempts that failed.
    assert len(list((tmp_path / "counting").glob("checkpoint_*/digests.json"))) <= 3
