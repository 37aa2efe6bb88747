"""A frozen model says more of an image that it sees in several sizes and mirrored: its logits are averaged.

Evaluation, prediction and `Segmenter` get their logits here, so they all predict alike.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from transfgu.decoder import MaskDecoder
from transfgu.encoder import normalise, patch_grid, scaled_size
from transfgu.inference.tokens import PatchTokens
from transfgu.recipe import EvaluationRecipe


@torch.inference_mode()
def averaged_logits(
    encode: PatchTokens, decoders: Sequence[MaskDecoder], images: UInt8[Tensor, "B 3 H W"], how: EvaluationRecipe
) -> list[Float[Tensor, "B C h w"]]:
    """Logits of each decoder, the mean over scaled and mirrored images; every image is encoded once for all decoders.

    Images are resized by each of `how.scales` (bilinear, without antialias, to whole patches); with `how.flip` each is
    also mirrored left to right, and its logits are mirrored back. Logits are resized (bilinear) to the patches of the
    largest scale, so that none loses detail, and averaged with equal weights. With the scale 1 alone and without the
    flip, they are those of a single forward pass, bit for bit.

    Args:
        encode: the frozen encoder, on its device.
        decoders: mask decoders in evaluation mode, on the same.
        images: as they are decoded.
        how: says `scales` and `flip`.

    Returns:
        For each decoder its logits, h x w patches of the largest of the scaled images.

    Raises:
        UserError: the encoder's patch does not divide a side of the images.
    """
    encoder = encode.encoder
    own = (images.shape[2], images.shape[3])
    patch_grid(own, encoder.patch_size)
    sizes = [scaled_size(own, scale, encoder.patch_size) for scale in how.scales]
    finest = patch_grid(max(sizes), encoder.patch_size)
    found: list[list[Tensor]] = [[] for _ in decoders]
    for size in sizes:
        resized: Tensor = images
        if size != own:
            pixels = normalise(images.to(encode.device), encoder.mean, encoder.std)
            resized = F.interpolate(pixels, size, mode="bilinear")
        for mirrored in (False, True) if how.flip else (False,):
            patches = encode(resized.flip(3) if mirrored else resized)
            for its, decoder in zip(found, decoders, strict=True):
                logits = decoder(patches)[0].mT.unflatten(2, patch_grid(size, encoder.patch_size))  # -> (B, C, h, w)
                logits = logits.flip(3) if mirrored else logits
                its.append(logits if logits.shape[2:] == finest else F.interpolate(logits, finest, mode="bilinear"))
    return [torch.stack(its).mean(0) if len(its) > 1 else its[0] for its in found]
