"""Sixteen bits a map are enough where they are spent on how far each concept is behind the best one, at each place.

All concepts of an image share the attention in their maps and differ by gradients, often a thousand times smaller:
rounded as they are, half-precision maps tie, and the label under a place changes for up to half of the places. What is
kept is the gap to the largest map, as the square root of its share of the largest gap at that place: the smaller a gap,
the finer the steps, and training chooses between the small ones. A concept whose map is 0 has a code of its own.

Where maps are resampled, that is done to the planes, and maps are made of them afterwards: what is shared is one plane,
and a mean of gaps is rounded to a share of itself, where a mean of maps would be rounded to a share of the attention.
"""

import torch
from jaxtyping import Float, Int16
from torch import Tensor

_LAST = 65534  # the code of the largest gap; the next one says that the map is 0
_SHIFT = 32768  # codes are kept as int16, for which torch has every operation
_SCALE = 256.0  # half precision has all its digits from 6e-5 on: largest gaps are as small as 1e-6, no map is near 255


def packed_planes(concepts: int) -> int:
    """How many planes maps of so many concepts are packed into."""
    return concepts + 2


def pack_maps(maps: Float[Tensor, "B K h w"]) -> Int16[Tensor, "B planes h w"]:
    """Concept maps, none below 0, as K + 2 planes: the largest map, the largest gap to it, and each map's gap in codes.

    The largest gap is that of the maps that are not 0. These two are half-precision numbers, times 256, bit by bit;
    maps beyond 255 are cut there.
    """
    top = maps.amax(1, keepdim=True)
    gaps = top - maps
    reach = gaps.masked_fill(maps == 0, 0).amax(1, keepdim=True)
    # A little more, so that no gap is beyond it once it is rounded.
    kept = (torch.cat([top, reach * (1 + 2**-10)], 1) * _SCALE).clamp(max=torch.finfo(torch.float16).max).half()
    reach = kept[:, 1:].float() / _SCALE
    codes = ((gaps / reach.masked_fill(reach == 0, 1)).clamp(max=1).sqrt() * _LAST).round().masked_fill(
        maps == 0, _LAST + 1
    ) - _SHIFT
    return torch.cat([kept.view(torch.int16), codes.to(torch.int16)], 1)


def unpack_planes(packed: Int16[Tensor, "B packed h w"]) -> Float[Tensor, "B planes h w"]:
    """What can be resampled: the largest map, and each concept's gap to it; K + 1 planes, float32."""
    top, reach = torch.split(packed[:, :2].contiguous().view(torch.float16).float() / _SCALE, 1, 1)
    codes = packed[:, 2:].float() + _SHIFT
    gaps = torch.where(codes > _LAST, top, (codes / _LAST).square() * reach)
    return torch.cat([top, gaps], 1)


def maps_of_planes(planes: Float[Tensor, "B planes h w"]) -> Float[Tensor, "B K h w"]:
    """The maps that planes of :func:`unpack_planes` stand for, resampled or not."""
    return planes[:, :1] - planes[:, 1:]


def unpack_maps(packed: Int16[Tensor, "B packed h w"]) -> Float[Tensor, "B K h w"]:
    """The maps that :func:`pack_maps` packed, their order at each place unchanged, zeros still zeros."""
    return maps_of_planes(unpack_planes(packed))
