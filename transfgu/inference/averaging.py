"""Average a model's logits over scaled and mirrored images.

Evaluation, prediction and `Segmenter` all use this, so they predict the same.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from transfgu.encoder import patch_grid, scaled_size
from transfgu.learner import Model
from transfgu.recipe import EvaluationRecipe


@torch.inference_mode()
def averaged_logits(
    models: Sequence[Model], images: UInt8[Tensor, "B 3 H W"], how: EvaluationRecipe
) -> list[Float[Tensor, "B C h w"]]:
    """Return each model's mean logits over scaled and mirrored images; the frozen part runs once for all models.

    Images are resized by each of `how.scales` (bilinear, without antialias, to whole patches); with `how.flip` each is
    also mirrored left to right, and its logits are mirrored back. Logits are resized (bilinear) to the patches of the
    largest scale, so that none loses detail, and averaged with equal weights. With the scale 1 alone and without the
    flip, they are those of a single forward pass, bit for bit.

    Args:
        models: of one method and one frozen part, in evaluation mode.
        images: as they are decoded.
        how: says `scales` and `flip`.

    Returns:
        For each model its logits: h x w patches of the largest of the scaled images, or as its single pass has them.

    Raises:
        UserError: the models' patch does not divide a side of the images.
    """
    shared = models[0]
    own = (images.shape[2], images.shape[3])
    patch_grid(own, shared.patch_size)
    sizes = [scaled_size(own, scale, shared.patch_size) for scale in how.scales]
    finest = patch_grid(max(sizes), shared.patch_size)
    found: list[list[Tensor]] = [[] for _ in models]
    for size in sizes:
        resized: Tensor = images
        if size != own:
            resized = F.interpolate(shared.normalise(images), size, mode="bilinear")
        for mirrored in (False, True) if how.flip else (False,):
            seen = shared.frozen(resized.flip(3) if mirrored else resized)
            for its, model in zip(found, models, strict=True):
                logits = model.logits(seen, size)
                its.append(logits.flip(3) if mirrored else logits)
    if len(found[0]) == 1:
        return [its[0] for its in found]
    return [
        torch.stack([x if x.shape[2:] == finest else F.interpolate(x, finest, mode="bilinear") for x in its]).mean(0)
        for its in found
    ]
