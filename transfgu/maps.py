"""Pseudo-label maps become class scores by one affine map an image: its smallest value is 0, its largest 1.

Scaling is over all classes of an image at once, never class by class, so that a concept which is absent stays weak
next to one which is present.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def scale_maps(maps: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K h w"]:
    """Scale each image's maps to [0, 1] over all its classes and places; a constant image gives zeros.

    Source: TransFGU (Yin et al. 2022), pseudo labels in its published losses.
    """
    low, high = maps.aminmax(dim=1, keepdim=True)
    low, high = low.amin((2, 3), keepdim=True), high.amax((2, 3), keepdim=True)
    span = high - low
    return (maps - low) / torch.where(span > 0, span, torch.ones_like(span))


def background_map(scaled: Float[Tensor, "B K h w"], threshold: float | int) -> Float[Tensor, "B 1 h w"]:
    """Background where no class answers: relu(threshold - max over classes of the scaled maps).

    `scaled` comes from `scale_maps`; `threshold` is T_bg, 0.1 in the paper.
    """
    return (threshold - scaled.amax(1, keepdim=True)).clamp(min=0)
