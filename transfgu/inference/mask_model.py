"""TransFGU's model: the frozen encoder's patch tokens, and the masks that a decoder makes of them."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from transfgu.decoder import MaskDecoder
from transfgu.encoder import normalise, patch_grid
from transfgu.inference.tokens import PatchTokens
from transfgu.recipe import Size


class MaskModel:
    """An encoder and a decoder on the same device; see `transfgu.learner.Model`."""

    def __init__(self, encode: PatchTokens, decoder: MaskDecoder) -> None:
        self.encode, self.decoder = encode, decoder
        self.device: torch.device = encode.device
        self.patch_size: int = encode.encoder.patch_size

    def normalise(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """See `transfgu.learner.Model`."""
        encoder = self.encode.encoder
        return normalise(images.to(self.device), encoder.mean, encoder.std)

    def frozen(self, images: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B hw d"]:
        """Patch tokens."""
        return self.encode(images)

    def logits(self, seen: Float[Tensor, "B hw d"], size: Size) -> Float[Tensor, "B C h w"]:
        """The decoder's logits of patch tokens, one per patch of images of `size`."""
        logits: Tensor = self.decoder(seen)[0]
        return logits.mT.reshape(len(seen), -1, *patch_grid(size, self.patch_size))  # (B, hw, C) -> (B, C, h, w)
