"""Colour, texture and height of patches, by hand."""

import pytest
import torch

from transfgu.baselines.pixel_features import PixelFeatures
from transfgu.encoder import IMAGENET_MEAN, IMAGENET_STD, normalise
from transfgu.views import GREY


def test_features_of_two_patches_by_hand() -> None:
    """The upper patch has one shade of grey; of the lower one the right half is white, the left half black."""
    image = torch.full((1, 3, 16, 8), 51, dtype=torch.uint8)
    image[:, :, 8:, :4] = 0
    image[:, :, 8:, 4:] = 255
    upper, lower = PixelFeatures(8, torch.device("cpu"), height=True)(image)[0]
    mean, deviation, grey = (torch.tensor(values) for values in (IMAGENET_MEAN, IMAGENET_STD, GREY))
    torch.testing.assert_close(upper[:3], (0.2 - mean) / deviation)
    torch.testing.assert_close(lower[:3], (0.5 - mean) / deviation)
    torch.testing.assert_close(upper[3:6], torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(lower[3:6], 0.5 / deviation)
    white = (grey / deviation).sum().item()  # the step from black to white
    # Steps to the right: one of eight in the lower patch. Downwards: those of the upper patch's last row.
    assert upper[6:8].tolist() == pytest.approx([0, (0.2 * white + 0.8 * white) / 2 / 8], abs=1e-5)
    assert lower[6:8].tolist() == pytest.approx([white / 8, 0], abs=1e-5)
    assert [upper[8].item(), lower[8].item()] == [0.25, 0.75]


def test_pixels_and_decoded_images_have_the_same_features() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = PixelFeatures(4, torch.device("cpu"), height=False)
    assert features(images).shape == (2, 8, 8)
    torch.testing.assert_close(features(normalise(images)), features(images))
