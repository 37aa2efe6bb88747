"""Cluster the patch tokens of the frozen encoder by K-Means, without training a decoder."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from transfgu.encoder import patch_grid
from transfgu.inference.mask_model import TokenModel
from transfgu.inference.tokens import PatchTokens
from transfgu.kmeans import Shard, cluster
from transfgu.learner import Batch, Batches, Model, Pending, Setting
from transfgu.recipe import Recipe
from transfgu.workers import gather_rows

_TOKENS = 1 << 18  # maximum number of clustered patch tokens: 100 MB of width 96


class Centroids(nn.Module):
    """The centres of the clusters.

    Args:
        classes: C.
        width: d, channels of a token.
    """

    centroids: Float[Tensor, "C d"]

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("centroids", torch.zeros(classes, width))

    def forward(self, tokens: Float[Tensor, "B hw d"]) -> Float[Tensor, "B hw C"]:
        """Return 2 x c - |c|^2 of each token x and centroid c, which is largest for the nearest one."""
        return 2 * tokens @ self.centroids.mT - self.centroids.square().sum(1)


class TokenKMeans:
    """One pass over the images, then K-Means; see `transfgu.learner.Learner`."""

    def __init__(self, setting: Setting) -> None:
        self.recipe = setting.recipe
        encode = PatchTokens(self.recipe.encoder, setting.device)
        self._network = Centroids(self.recipe.classes, encode.encoder.width).to(setting.device)
        self.network: nn.Module = self._network
        self.optimiser: Optimizer | None = None
        self.teacher: nn.Module | None = None
        self.model: Model = TokenModel(encode, self._network)
        self.whole = True
        height, width = patch_grid(self.recipe.dataset.training_size, encode.encoder.patch_size)
        count = max(1, min(height * width, _TOKENS // setting.images))
        self._places = np.sort(np.random.default_rng(self.recipe.seed).permutation(height * width)[:count])
        self._rows: list[Tensor] = []
        self._slots: list[np.ndarray] = []

    def begin(self, epoch: int, batches: Batches) -> None:
        """Discard the tokens of an earlier attempt."""
        self._rows, self._slots = [], []

    def step(self, batch: Batch, epoch: int, index: int) -> Pending:
        """Keep the same few patches of each image, at most 2^18 of all images together."""
        self._rows.append(batch.inputs[:, self._places].flatten(0, 1).cpu())  # (B, n, d) -> (B n, d)
        self._slots.append(np.repeat(batch.slots, len(self._places)))
        return partial(dict)

    def end(self, epoch: int, batches: Batches, *, scored: bool) -> Mapping[str, Any]:
        """Cluster the tokens of all workers; `total` is the mean squared distance to the nearest centroid."""
        device = self._network.centroids.device
        rows = gather_rows(torch.cat(self._rows).to(device), np.concatenate(self._slots))
        found = cluster(
            Shard([rows.cpu().numpy()]),
            self.recipe.classes,
            iterations=self.recipe.concepts.iterations,
            seed=self.recipe.seed,
        )
        self._network.centroids.copy_(torch.from_numpy(found.centroids))
        self._rows, self._slots = [], []
        return {"total": found.inertia / len(rows)}


def load_models(recipe: Recipe, weights: Sequence[Mapping[str, Tensor]], device: torch.device) -> list[TokenModel]:
    """Return the models of several sets of centroids; see `transfgu.methods.Method`."""
    encode = PatchTokens(recipe.encoder, device)
    models = []
    for tensors in weights:
        network = Centroids(recipe.classes, encode.encoder.width)
        network.load_state_dict(tensors)
        models.append(TokenModel(encode, network.to(device).eval()))
    return models
