"""Define models that read the frozen encoder's patch tokens; TransFGU's own has a mask decoder."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from transfgu.decoder import MaskDecoder
from transfgu.encoder import normalise, patch_grid
from transfgu.inference.tokens import PatchTokens
from transfgu.recipe import Recipe, Size


class TokenModel:
    """Maps patch tokens to clusters; see `transfgu.learner.Model`.

    Args:
        encode: the frozen encoder.
        network: maps tokens (B, hw, d) to logits (B, hw, C), on the same device.
    """

    def __init__(self, encode: PatchTokens, network: nn.Module) -> None:
        self.encode = encode
        self.device, self.patch_size = encode.device, int(encode.encoder.patch_size)
        self._network = network

    def normalise(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Return normalised pixels for the encoder."""
        encoder = self.encode.encoder
        return normalise(images.to(self.device), encoder.mean, encoder.std)

    def frozen(self, images: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B hw d"]:
        """Return patch tokens."""
        return self.encode(images)

    def logits(self, seen: Float[Tensor, "B hw d"], size: Size) -> Float[Tensor, "B C h w"]:
        """Return the network's logits of patch tokens, one per patch of images of `size`."""
        return logits_on_patches(self._network(seen), size, self.patch_size)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the network's weights."""
        weights: dict[str, Tensor] = self._network.state_dict()
        return weights


class MaskModel(TokenModel):
    """An encoder and a mask decoder on the same device; see `transfgu.learner.Model`."""

    def __init__(self, encode: PatchTokens, decoder: MaskDecoder) -> None:
        super().__init__(encode, decoder)
        self.decoder = decoder

    def logits(self, seen: Float[Tensor, "B hw d"], size: Size) -> Float[Tensor, "B C h w"]:
        """Return the decoder's logits of patch tokens, one per patch of images of `size`."""
        return logits_on_patches(self.decoder(seen)[0], size, self.patch_size)


def logits_on_patches(logits: Float[Tensor, "B hw C"], size: Size, patch_size: int) -> Float[Tensor, "B C h w"]:
    """Arrange logits of tokens on the patches of images of `size`."""
    return logits.mT.reshape(len(logits), -1, *patch_grid(size, patch_size))


def load_models(recipe: Recipe, weights: Sequence[Mapping[str, Tensor]], device: torch.device) -> list[MaskModel]:
    """Return the models of several decoders' weights, which share one encoder; see `transfgu.methods.Method`.

    Raises:
        UserError: the encoder is not available, or weights are not those of a mask decoder.
    """
    encode = PatchTokens(recipe.encoder, device)
    heads = encode.encoder.num_heads
    return [MaskModel(encode, MaskDecoder.from_state_dict(w, num_heads=heads).to(device)) for w in weights]
