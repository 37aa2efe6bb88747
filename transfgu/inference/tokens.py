"""The frozen encoder as training and evaluation use it: pixels in, patch tokens out, never a gradient.

It runs in bfloat16 where the device has it, as fast as the device's memory allows: a batch that does not fit is halved.
On CPUs each core has a part of the batch to itself, and none waits for another at the end of every product.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from transfgu.encoder import Encoder, normalise
from transfgu.inference.device import in_bfloat16
from transfgu.inference.memory import HalveOnOutOfMemory
from transfgu.recipe import EncoderRecipe


class PatchTokens:
    """Images to patch tokens on a device; the recipe says which encoder, and how precise.

    Args:
        recipe: of the encoder.
        device: where it runs.
        encoder: in place of the recipe's.

    Raises:
        UserError: the encoder or its weights can't be had.
    """

    def __init__(self, recipe: EncoderRecipe, device: torch.device, encoder: Encoder | None = None) -> None:
        self.encoder = (encoder or Encoder.from_pretrained(recipe.name, recipe.weights)).to(device)
        self.device = device
        self._half = in_bfloat16(recipe, device)
        self._encode = HalveOnOutOfMemory(self._forward, "encoder batch")
        self._cores = ThreadPoolExecutor(initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, images: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B hw d"]:
        """Patch tokens, float32, of images as they are decoded (uint8), or normalised already (float)."""
        if not len(images):
            patch = self.encoder.patch_size
            hw = images.shape[2] // patch * (images.shape[3] // patch)
            return torch.empty(0, hw, self.encoder.width, device=self.device)
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
