"""Half precision spends its digits on how far each concept is behind the best one, so the best one stays the best.

All concepts of an image share the attention in their maps and differ by gradients, often a thousand times smaller:
rounded as they are, half-precision maps tie, and the label under a place changes for up to half of the places.
The gap to the largest map is small just where the choice is close, and there half precision is fine: no label changes.

Where maps are resampled, that is done to the planes, and maps are made of them afterwards: what is shared is one plane,
and a mean of gaps is rounded to a share of itself, where a mean of maps would be rounded to a share of the attention.
"""

import torch
from jaxtyping import Float
from torch import Tensor

_SCALE = 256.0
"""Half precision has all its digits from 6e-5 on. Gaps are as small as 1e-6, and no map comes near 255."""


def pack_maps(maps: Float[Tensor, "B K h w"]) -> Float[Tensor, "B planes h w"]:
    """Concept maps as planes of half precision, K + 1 of them: the largest map first, then how far each is below it.

    All are kept times 256. Maps beyond 255 are cut there.
    """
    top = maps.amax(1, keepdim=True)
    return (torch.cat([top, top - maps], 1) * _SCALE).clamp(max=torch.finfo(torch.float16).max).half()


def unpack_maps(planes: Float[Tensor, "B planes h w"]) -> Float[Tensor, "B K h w"]:
    """Of planes as :func:`pack_maps` makes them, resampled or not, the maps, float32: K = planes - 1.

    Their order at each place is unchanged, and zeros are still zeros.
    """
    planes = planes.float() / _SCALE
    return planes[:, :1] - planes[:, 1:]
