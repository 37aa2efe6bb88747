"""Compute patch tokens by the frozen encoder, without gradients, for training and evaluation.

The encoder runs in bfloat16 if the device computes it natively; a batch that does not fit in memory is halved. On CPUs
each core has its own part of the batch, so cores do not wait for each other after every product.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from transfgu.encoder import Encoder, normalise, patch_grid
from transfgu.inference.device import in_bfloat16
from transfgu.inference.memory import HalveOnOutOfMemory
from transfgu.recipe import EncoderRecipe


class PatchTokens:
    """Maps images to patch tokens on a device, with the encoder and precision of the recipe.

    Args:
        recipe: recipe with the encoder.
        device: device of the encoder.
        encoder: used instead of the recipe's.

    Raises:
        UserError: the encoder or its weights are not available.
    """

    def __init__(self, recipe: EncoderRecipe, device: torch.device, encoder: Encoder | None = None) -> None:
        self.encoder = (encoder or Encoder.from_pretrained(recipe.name, recipe.weights)).to(device)
        self.device = device
        self._half = in_bfloat16(recipe, device)
        self._encode = HalveOnOutOfMemory(self._forward, "encoder batch")
        self._cores = ThreadPoolExecutor(initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, images: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B hw d"]:
        """Return float32 patch tokens of images, which are uint8 as decoded, or float if already normalised."""
        if not len(images):
            h, w = patch_grid((images.shape[2], images.shape[3]), self.encoder.patch_size)
            return torch.empty(0, h * w, self.encoder.width, device=self.device)
        tokens: Tensor = self._encode(images)
        return tokens

    def _forward(self, images: Tensor) -> Tensor:
        parts = images.chunk(torch.get_num_threads()) if self.device.type == "cpu" else [images]
        if len(parts) == 1:
            return self._part(images)
        return torch.cat(list(self._cores.map(self._part, parts)))

    @torch.no_grad()
    def _part(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        if not images.is_floating_point():
            images = normalise(images, self.encoder.mean, self.encoder.std)
        with torch.autocast(self.device.type, torch.bfloat16) if self._half else nullcontext():
            return self.encoder.patch_tokens(images).float()
