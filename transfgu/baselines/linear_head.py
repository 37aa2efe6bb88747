"""Train softmax regression from the frozen encoder's patch tokens to pseudo labels: TransFGU without a decoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from transfgu.baselines.optimisation import optimise
from transfgu.datasets.packed_maps import maps_of_planes, unpack_planes
from transfgu.encoder import patch_grid
from transfgu.inference.mask_model import TokenModel
from transfgu.inference.tokens import PatchTokens
from transfgu.learner import Batch, Batches, Model, Pending, Setting
from transfgu.maps import background_map, scale_maps
from transfgu.recipe import Recipe
from transfgu.workers import sum_over_workers


class LinearHead:
    """One linear layer, trained by cross-entropy on whole images; see `transfgu.learner.Learner`."""

    def __init__(self, setting: Setting) -> None:
        self.recipe, training = setting.recipe, setting.recipe.training
        encode = PatchTokens(self.recipe.encoder, setting.device)
        self.network: nn.Module = _layer(self.recipe, encode).to(setting.device)
        self.optimiser: Optimizer | None = Adam(
            self.network.parameters(), training.scaled_lr, weight_decay=training.weight_decay
        )
        self.teacher: nn.Module | None = None
        self.model: Model = TokenModel(encode, self.network)
        self.whole = True
        self._grid = patch_grid(self.recipe.dataset.training_size, encode.encoder.patch_size)

    def begin(self, epoch: int, batches: Batches) -> None:
        """See `Learner`; does nothing."""

    def step(self, batch: Batch, epoch: int, index: int) -> Pending:
        """Take one step of Adam on the mean cross-entropy of the patches."""
        tokens = batch.inputs.to(self.model.device)
        planes = F.interpolate(unpack_planes(batch.maps.to(tokens.device)), self._grid, mode="bilinear")
        evidence = scale_maps(maps_of_planes(planes))
        if self.recipe.background:
            evidence = torch.cat((background_map(evidence, self.recipe.training.background_threshold), evidence), 1)
        loss = F.cross_entropy(self.network(tokens).mT, evidence.flatten(2).argmax(1), reduction="sum")
        patches = sum_over_workers(loss.new_tensor(tokens.shape[0] * tokens.shape[1])).clamp(min=1)
        assert self.optimiser
        return optimise(self.network, self.optimiser, {"total": loss / patches})[1]

    def end(self, epoch: int, batches: Batches, *, scored: bool) -> Mapping[str, Any]:
        """See `Learner`; does nothing."""
        return {}


def load_models(recipe: Recipe, weights: Sequence[Mapping[str, Tensor]], device: torch.device) -> list[TokenModel]:
    """Return the models of several layers' weights; see `transfgu.methods.Method`."""
    encode = PatchTokens(recipe.encoder, device)
    models = []
    for tensors in weights:
        layer = _layer(recipe, encode)
        layer.load_state_dict(tensors)
        models.append(TokenModel(encode, layer.to(device).eval()))
    return models


def _layer(recipe: Recipe, encode: PatchTokens) -> nn.Linear:
    layer = nn.Linear(encode.encoder.width, recipe.classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
