"""Packed maps keep what labels are made of: the order of concepts at each patch, and the image's scaled values."""

import pytest
import torch
from torch.nn import functional as F

from transfgu.datasets.packed_maps import maps_of_planes, pack_maps, packed_planes, unpack_maps, unpack_planes
from transfgu.maps import scale_maps


def close_maps(gap: float = 1e-4, images: int = 2) -> torch.Tensor:
    """Maps like those of encoders: one attention for all concepts, with gradients that differ by about 1e-4."""
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(images, 1, 12, 10, generator=generator)
    gain = torch.randn(images, 9, 12, 10, generator=generator) * gap
    return (attention + gain.clamp(min=0)).masked_fill(gain < 0, 0)


def test_packs_the_top_the_reach_and_codes_of_the_gaps() -> None:
    maps = torch.tensor([0.5, 0.25, 0.4375, 0.0]).view(1, 4, 1, 1)
    packed = pack_maps(maps)
    assert packed.shape[1] == packed_planes(4)
    top, reach = packed[0, :2, 0, 0].view(torch.float16).tolist()
    assert top == 128.0  # times 256
    assert 64.0 < reach < 64.2  # the largest gap of a map that is not 0, and a little more
    codes = packed[0, 2:, 0, 0].to(torch.int32) + 32768
    assert codes[[0, 3]].tolist() == [0, 65535]
    assert (codes[1] - 65534).abs() < 64  # the whole of it
    assert (codes[2] - 32767).abs() < 32  # a quarter of it: half, by the square root
    torch.testing.assert_close(unpack_maps(packed), maps, rtol=0, atol=1e-5)


def test_no_label_changes_where_rounded_maps_tie() -> None:
    maps = close_maps()
    labels = maps.argmax(1)
    assert (maps.half().argmax(1) != labels).float().mean() > 0.2  # what packing is for
    assert torch.equal(unpack_maps(pack_maps(maps)).argmax(1), labels)


def test_zeros_stay_zeros_and_scores_stay_close() -> None:
    maps = close_maps()
    back = unpack_maps(pack_maps(maps))
    assert torch.equal(back == 0, maps == 0)
    torch.testing.assert_close(scale_maps(back), scale_maps(maps), rtol=0, atol=1e-3)


@pytest.mark.parametrize("gap", [1e-2, 1e-4])
def test_fewer_labels_than_one_in_a_thousand_change_where_planes_are_resampled(gap: float) -> None:
    maps = close_maps(gap, images=40)
    for size in ((24, 20), (30, 25), (6, 5)):
        exact = F.interpolate(maps.double(), size, mode="bilinear").argmax(1)
        planes = F.interpolate(unpack_planes(pack_maps(maps)), size, mode="bilinear")
        assert (maps_of_planes(planes).argmax(1) != exact).float().mean() < 0.001


def test_the_closest_maps_are_told_apart_as_well_as_without_packing() -> None:
    maps = close_maps(1e-6, images=40)  # where float32 itself has no more than four digits left
    exact = F.interpolate(maps.double(), (30, 25), mode="bilinear").argmax(1)
    planes = F.interpolate(unpack_planes(pack_maps(maps)), (30, 25), mode="bilinear")
    unpacked = F.interpolate(maps, (30, 25), mode="bilinear")
    assert torch.equal(unpack_maps(pack_maps(maps)).argmax(1), maps.argmax(1))
    assert (maps_of_planes(planes).argmax(1) != exact).sum() <= (unpacked.argmax(1) != exact).sum()
