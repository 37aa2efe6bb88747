"""Pack concept maps into 16 bits per value, as gaps to the largest map of each patch.

All concepts of an image share the attention in their maps and differ by gradients, often a thousand times smaller:
rounded to half precision, maps tie, and the label changes for up to half of the patches. So the gap to the largest map
is stored, as the square root of its share of the largest gap at that patch: small gaps, between which training chooses,
have finer steps. A concept whose map is 0 has a code of its own.

Resampling is applied to the planes, and maps are computed from them afterwards: the shared attention is one plane, and
a mean of gaps is rounded relative to the gaps, where a mean of maps would be rounded relative to the attention.
"""

import torch
from jaxtyping import Float, Int16
from torch import Tensor

_LAST = 65534  # the code of the largest gap; the next one means that the map is 0
_SHIFT = 32768  # codes are stored as int16, for which torch has every operation
_SCALE = 256.0  # half precision loses digits below 6e-5; largest gaps are as small as 1e-6, and maps are far below 255


def packed_planes(concepts: int) -> int:
    """Return the number of planes into which so many maps are packed."""
    return concepts + 2


def pack_maps(maps: Float[Tensor, "B K h w"]) -> Int16[Tensor, "B planes h w"]:
    """Pack nonnegative maps into K + 2 planes: the largest map, the largest gap to it, and codes of each map's gap.

    The largest gap is that of the maps that are not 0. The first two planes hold half-precision numbers, times 256, bit
    by bit; maps beyond 255 are clipped.
    """
    top = maps.amax(1, keepdim=True)
    gaps = top - maps
    reach = gaps.masked_fill(maps == 0, 0).amax(1, keepdim=True)
    # Slightly larger, so that no gap exceeds it after rounding.
    kept = (torch.cat([top, reach * (1 + 2**-10)], 1) * _SCALE).clamp(max=torch.finfo(torch.float16).max).half()
    reach = kept[:, 1:].float() / _SCALE
    codes = ((gaps / reach.masked_fill(reach == 0, 1)).clamp(max=1).sqrt() * _LAST).round().masked_fill(
        maps == 0, _LAST + 1
    ) - _SHIFT
    return torch.cat([kept.view(torch.int16), codes.to(torch.int16)], 1)


def unpack_planes(packed: Int16[Tensor, "B packed h w"]) -> Float[Tensor, "B planes h w"]:
    """Return the planes for resampling: the largest map, and each concept's gap to it; K + 1 planes, float32."""
    top, reach = torch.split(packed[:, :2].contiguous().view(torch.float16).float() / _SCALE, 1, 1)
    codes = packed[:, 2:].float() + _SHIFT
    gaps = torch.where(codes > _LAST, top, (codes / _LAST).square() * reach)
    return torch.cat([top, gaps], 1)


def maps_of_planes(planes: Float[Tensor, "B planes h w"]) -> Float[Tensor, "B K h w"]:
    """Return the maps of planes from :func:`unpack_planes`, resampled or not."""
    return planes[:, :1] - planes[:, 1:]


def unpack_maps(packed: Int16[Tensor, "B packed h w"]) -> Float[Tensor, "B K h w"]:
    """Return the maps packed by :func:`pack_maps`; their order at each patch is the same, and zeros are zeros."""
    return maps_of_planes(unpack_planes(packed))
