"""Scaling and background, with numbers worked out by hand."""

import torch

from transfgu.maps import background_map, scale_maps


def test_an_image_is_scaled_over_all_its_classes() -> None:
    maps = torch.tensor([[[[1.0, 3.0]], [[2.0, 5.0]]], [[[-2.0, -2.0]], [[-1.0, 0.0]]]])  # 2 images, 2 classes, 1 x 2
    expected = torch.tensor([[[[0.0, 0.5]], [[0.25, 1.0]]], [[[0.0, 0.0]], [[0.5, 1.0]]]])
    torch.testing.assert_close(scale_maps(maps), expected)


def test_a_constant_image_scales_to_zeros_beside_others() -> None:
    maps = torch.stack([torch.full((3, 2, 2), 7.0), torch.arange(12.0).reshape(3, 2, 2)])
    scaled = scale_maps(maps)
    assert not scaled[0].any()
    torch.testing.assert_close(scaled[1], torch.arange(12.0).reshape(3, 2, 2) / 11)


def test_background_is_where_no_class_reaches_the_threshold() -> None:
    scaled = torch.tensor([[[[0.0, 0.04, 0.5]], [[0.02, 0.0, 0.1]]]])
    torch.testing.assert_close(background_map(scaled, 0.1), torch.tensor([[[[0.08, 0.06, 0.0]]]]))
