"""Packed maps against what a label is made of: the order of concepts at a place, and the image's scaled scores."""

import torch

from transfgu.maps import scale_maps
from transfgu.packed_maps import pack_maps, unpack_maps


def close_maps() -> torch.Tensor:
    """Maps as encoders give them: one attention for all concepts, told apart by gradients of about 1e-4."""
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(2, 1, 12, 10, generator=generator)
    gain = torch.randn(2, 9, 12, 10, generator=generator) * 1e-4
    return (attention + gain.clamp(min=0)).masked_fill(gain < 0, 0)


def test_packs_the_top_and_the_gaps() -> None:
    maps = torch.tensor([0.5, 0.25, 0.0]).view(1, 3, 1, 1)
    assert pack_maps(maps).flatten().tolist() == [0.5, 0.0, 0.25, 0.5]
    assert torch.equal(unpack_maps(pack_maps(maps)), maps)


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
