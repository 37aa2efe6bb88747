"""Compute colour and texture of each patch, for clustering without a network.

Sky is above road in most photographs, so the height of a patch in the image is informative without any learning.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from transfgu.encoder import IMAGENET_MEAN, IMAGENET_STD, normalise, patch_grid
from transfgu.views import GREY


class PixelFeatures:
    """Compute features of patches; used in place of `transfgu.inference.tokens.PatchTokens`.

    A patch has eight numbers: mean and standard deviation of red, green and blue, and the mean absolute differences of
    the grey image to the right and downwards. With `height` a ninth is added, the patch's distance from the top.

    Args:
        patch_size: side of a patch, pixels.
        device: device of the computation.
        height: add the distance from the top, 0 to 1.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, patch_size: int, device: torch.device, *, height: bool) -> None:
        self.patch_size, self.device, self._height = patch_size, device, height

    @property
    def encoder(self) -> "PixelFeatures":
        """Patch size, mean and deviation of the input: attributes of this object."""
        return self

    def __call__(self, images: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B hw d"]:
        """Return features of decoded images (uint8), or of pixels from `normalise`."""
        grid = patch_grid((images.shape[2], images.shape[3]), self.patch_size)
        images = images.to(self.device)
        pixels = images if images.is_floating_point() else normalise(images, self.mean, self.std)
        colours = F.avg_pool2d(pixels, self.patch_size)
        spread = (F.avg_pool2d(pixels.square(), self.patch_size) - colours.square()).clamp(min=0).sqrt()
        grey = (pixels * pixels.new_tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)
        steps = [F.pad(grey.diff(dim=3).abs(), (0, 1)), F.pad(grey.diff(dim=2).abs(), (0, 0, 0, 1))]
        planes = [colours, spread, *(F.avg_pool2d(step, self.patch_size) for step in steps)]
        if self._height:
            rows = (torch.arange(grid[0], device=self.device) + 0.5) / grid[0]
            planes.append(rows[None, None, :, None].expand(len(pixels), 1, *grid))
        return torch.cat(planes, 1).flatten(2).mT  # (B, d, h, w) -> (B, hw, d)
