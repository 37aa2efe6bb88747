"""Half precision spends its digits on how far each concept is behind the best one, so the best one stays the best.

All concepts of an image share the attention in their maps and differ by gradients, often a thousand times smaller:
rounded as they are, half-precision maps tie, and the label under a place changes for up to half of the places.
The gap to the largest map is small just where the choice is close, and there half precision is fine: no label changes.
"""

import torch
from jaxtyping import Float, Float16
from torch import Tensor


def pack_maps(maps: Float[Tensor, "B K h w"]) -> Float16[Tensor, "B planes h w"]:
    """Concept maps as planes of half precision, K + 1 of them: the largest map first, then how far each is below it."""
    top = maps.amax(1, keepdim=True)
    return torch.cat([top, top - maps], 1).half()


def unpack_maps(packed: Float16[Tensor, "B planes h w"]) -> Float[Tensor, "B K h w"]:
    """What :func:`pack_maps` packed: K = planes - 1 maps, their order at each place unchanged, zeros still zeros."""
    planes = packed.float()
    return planes[:, :1] - planes[:, 1:]
