"""Train a method without changing its weights, to get its initial network with statistics and clusters.

A network needs more than weights to predict: batch norm needs statistics, and some methods need clusters of their
features. Both come from one pass over the images, as they do in training.
"""

from typing import Any

import torch

from transfgu.learner import Pending
from transfgu.training.image_training import ImageJob, ImageTraining
from transfgu.training.job import Place


class UntrainedNetwork(ImageTraining):
    """One epoch in which every parameter is reset to its initial value after each step."""

    def __init__(self, job: ImageJob, place: Place) -> None:
        super().__init__(job, place)
        self._initial = [parameter.detach().clone() for parameter in self.learner.network.parameters()]

    @torch.no_grad()
    def step(self, batch: Any, epoch: int, index: int) -> Pending:
        """See `Training`; the step's losses are those of the initial weights."""
        with torch.enable_grad():
            pending = super().step(batch, epoch, index)
        for parameter, value in zip(self.learner.network.parameters(), self._initial, strict=True):
            parameter.copy_(value)
        return pending
