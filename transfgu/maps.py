"""Scale and refine pseudo-label maps.

Maps are scaled over all classes of an image at once, not per class, so that a concept that is absent stays weak.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_REACH = 2  # neighbours on each side of a patch
_TEMPERATURE = 0.2  # of the softmax over cosines


def scale_maps(maps: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K h w"]:
    """Scale each image's maps to [0, 1] over all its classes and patches; a constant image gives zeros.

    Source: TransFGU (Yin et al. 2022), pseudo labels in its published losses.
    """
    low, high = maps.aminmax(dim=1, keepdim=True)
    low, high = low.amin((2, 3), keepdim=True), high.amax((2, 3), keepdim=True)
    span = high - low
    return (maps - low) / torch.where(span > 0, span, torch.ones_like(span))


def background_map(scaled: Float[Tensor, "B K h w"], threshold: float | int) -> Float[Tensor, "B 1 h w"]:
    """Return the map of the background, where no class responds: relu(threshold - max over classes of the scaled maps).

    `scaled` comes from `scale_maps`; `threshold` is T_bg, 0.1 in the paper.
    """
    return (threshold - scaled.amax(1, keepdim=True)).clamp(min=0)


def refine_maps(
    maps: Float[Tensor, "B K h w"], tokens: Float[Tensor, "B hw d"], steps: int
) -> Float[Tensor, "B K h w"]:
    """Replace each patch's values, `steps` times, by the mean over similar neighbours.

    Neighbours are the 5 x 5 patches around a patch, including itself, inside the image. Their weights are the softmax
    of the cosines of their tokens with the patch's, divided by 0.2.

    Args:
        maps: maps of all concepts.
        tokens: patch tokens of the same patches, in row-major order.
        steps: 0 returns the maps unchanged.

    Source: random walks along affinities of patches, as in AffinityNet (Ahn and Kwak 2018), section 3.3.
    """
    if not steps:
        return maps
    h, w = maps.shape[2:]
    unit = F.normalize(tokens, dim=-1).mT.reshape(len(tokens), -1, h, w)  # (B, hw, d) -> (B, d, h, w)
    padded, inside = (F.pad(x, [_REACH] * 4) for x in (unit, unit.new_ones(1, 1, h, w)))
    side = range(2 * _REACH + 1)
    places = [(slice(y, y + h), slice(x, x + w)) for y in side for x in side]
    likeness = torch.stack([(unit * padded[:, :, y, x]).sum(1) for y, x in places], 1) / _TEMPERATURE
    outside = torch.stack([inside[:, 0, y, x] == 0 for y, x in places], 1)
    weights = likeness.masked_fill(outside, -torch.inf).softmax(1)  # (B, 25, h, w)
    for _ in range(steps):
        around = F.pad(maps, [_REACH] * 4)
        maps = sum(
            (weights[:, i, None] * around[:, :, y, x] for i, (y, x) in enumerate(places)), torch.zeros_like(maps)
        )
    return maps
