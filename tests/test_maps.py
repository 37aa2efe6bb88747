"""Scaling and background, with numbers derived by hand."""

import math

import torch

from transfgu.maps import background_map, refine_maps, scale_maps


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


def test_a_patch_takes_from_neighbours_that_look_alike() -> None:
    """Cosines 1 and 0 give weights e^5 and 1: (x, y, y) becomes means with these weights, by hand."""
    maps = torch.tensor([[[[1.0, 0.0, 0.0]], [[0.0, 0.0, 3.0]]]])  # 1 image, 2 concepts, 1 x 3
    tokens = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [0.0, 5.0]]])  # lengths do not matter
    e = math.exp(5)
    unlike, like = 1 / (1 + 2 * e), e / (1 + 2 * e)
    first = [[e / (e + 2), unlike, unlike], [3 / (e + 2), 3 * like, 3 * like]]
    torch.testing.assert_close(refine_maps(maps, tokens, 1)[0, :, 0], torch.tensor(first))
    torch.testing.assert_close(refine_maps(maps, tokens, 2), refine_maps(refine_maps(maps, tokens, 1), tokens, 1))
    assert refine_maps(maps, tokens, 0) is maps


def test_refinement_reaches_two_patches_and_does_not_wrap() -> None:
    """For equal tokens each patch gets the plain mean over the 5 x 5 patches around it inside the image."""
    maps = torch.zeros(1, 1, 6, 7)
    maps[0, 0, 0, 0] = 1.0
    refined = refine_maps(maps, torch.ones(1, 42, 3), 1)[0, 0]
    expected = torch.zeros(6, 7)
    for y in range(3):
        for x in range(3):
            expected[y, x] = 1 / ((3 + y) * (3 + x))  # rows from 0 to y + 2, columns from 0 to x + 2
    torch.testing.assert_close(refined, expected)
