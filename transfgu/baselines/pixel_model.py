"""Define the base class of models whose network reads whole images."""

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

from transfgu.encoder import normalise


class PixelModel:
    """A network on normalised images without frozen layers; see `transfgu.learner.Model`."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.device, self.patch_size = device, 1
        self._weights = network

    def normalise(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Return pixels normalised by ImageNet's mean and deviation."""
        return normalise(images.to(self.device))

    def frozen(self, images: Shaped[Tensor, "B 3 H W"]) -> Shaped[Tensor, "B 3 H W"]:
        """Return the images unchanged."""
        return images

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights of the network, including its clusters."""
        weights: dict[str, Tensor] = self._weights.state_dict()
        return weights
