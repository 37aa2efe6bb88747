"""TransFGU's model: the frozen encoder's patch tokens, and the masks that a decoder makes of them."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from transfgu.decoder import MaskDecoder
from transfgu.encoder import normalise, patch_grid
from transfgu.inference.tokens import PatchTokens
from transfgu.recipe import Recipe, Size


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

    def state_dict(self) -> dict[str, Tensor]:
        """The decoder's weights."""
        weights: dict[str, Tensor] = self.decoder.state_dict()
        return weights


def load_models(recipe: Recipe, weights: Sequence[Mapping[str, Tensor]], device: torch.device) -> list[MaskModel]:
    """Return the models of several decoders' weights, which share one encoder; see `transfgu.methods.Method`.

    Raises:
        UserError: the encoder can't be had, or weights are not a mask decoder's.
    """
    encode = PatchTokens(recipe.encoder, device)
    heads = encode.encoder.num_heads
    return [MaskModel(encode, MaskDecoder.from_state_dict(w, num_heads=heads).to(device)) for w in weights]
