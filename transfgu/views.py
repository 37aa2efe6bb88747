"""Draw random training views, which depend on (seed, epoch, sample) only, and apply them to batches.

Each image has its own random generator, so its parameters do not depend on workers, batches or order. They are applied
to a whole batch at once, on the device that holds it. Image and maps are cut by the same box: the
image by bilinear interpolation, the maps, whose patches are much larger than a pixel, by averaging (RoIAlign).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int, UInt8
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from transfgu.encoder import IMAGENET_MEAN, IMAGENET_STD, Channels, patch_grid
from transfgu.transfer import constant, to_device

GREY = (0.2989, 0.587, 0.114)  # luma of red, green, blue (ITU-R 601)


@dataclass(frozen=True, kw_only=True)
class Colours:
    """Parameters of the colour changes of each image of a batch."""

    jitter: Bool[ndarray, " B"]
    order: Int[ndarray, "B 4"]  # in which the four are applied, as indices into the next
    factors: Float[
        ndarray, "B 4"
    ]  # brightness, contrast, saturation (1 changes nothing), hue (turns; 0 changes nothing)
    grey: Bool[ndarray, " B"]
    blur: Bool[ndarray, " B"]
    sigma: Float[ndarray, " B"]  # of the blur, pixels


@dataclass(frozen=True, kw_only=True)
class Views(Colours):
    """Parameters of the view of each image of a batch."""

    boxes: Int[ndarray, "B 4"]  # crop, y0 y1 x0 x1 in pixels, half-open
    flip: Bool[ndarray, " B"]


def draw_views(
    samples: Sequence[int], size: tuple[int, int], *, seed: int, epoch: int, batch: int | None = None
) -> Views:
    """Draw the parameters of a random view of each sample, for images of `size` = (H, W) pixels.

    `samples` are the images' places in the epoch. Colour jitter (0.8 0.8 0.8 0.2, in random order) is drawn with
    probability 0.3, greyscale 0.2, a 3 x 3 blur of sigma 1 to 2 pixels 0.2, a flip 0.5; the crop is 0.4, 0.5 ... 0.9 of
    both sides. Crop and flip are drawn for each image. So are the colours, unless `batch`, the number of the global
    batch in the epoch, is given: then they are drawn once for it, as in the published code.

    Source: TransFGU (Yin et al. 2022), the published training scripts.
    """
    drawn = [np.random.default_rng((seed, epoch, sample)).random(16) for sample in samples]
    chances, factors, order, rest = np.split(np.array(drawn).reshape(-1, 16), 4, axis=1)
    if batch is not None:
        of_batch = np.random.default_rng((seed, epoch, batch, 1)).random(16)
        chances[:, :3], factors[:], order[:], rest[:, 0] = of_batch[:3], of_batch[4:8], of_batch[8:12], of_batch[12]
    jitter, grey, blur, flip = (chances < (0.3, 0.2, 0.2, 0.5)).T
    tenths = (4 + 6 * rest[:, 1]).astype(np.int64)
    spans = []
    for side, place in zip(size, rest[:, 2:].T, strict=True):
        cut = side * tenths // 10
        start = ((side - cut) * place).astype(np.int64)
        spans += [start, start + cut]
    return Views(
        jitter=jitter,
        order=order.argsort(1),
        factors=factors * (1.6, 1.6, 1.6, 0.4) + (0.2, 0.2, 0.2, -0.2),
        grey=grey,
        blur=blur,
        sigma=1 + rest[:, 0],
        boxes=np.stack(spans, 1),
        flip=flip,
    )


def apply_views(
    images: UInt8[Tensor, "B 3 H W"],
    maps: Float[Tensor, "B K h w"] | Float16[Tensor, "B K h w"],
    views: Views,
    patch_size: int,
    *,
    mean: Channels = IMAGENET_MEAN,
    std: Channels = IMAGENET_STD,
) -> tuple[Float[Tensor, "B 3 H2 W2"], Float[Tensor, "B K h2 w2"]]:
    """Return the views of images, (B, 3, H/2, W/2) and normalised by `mean` and `std`, and the views of their maps.

    Maps cover the whole image, at any resolution. A view of a map has one value per patch and is not scaled, because
    the loss scales it.
    """
    colours = change_colours(images.float() / 255, views)
    size = (images.shape[2] // 2, images.shape[3] // 2)
    colours, maps = crop_views(colours, maps, views.boxes, size, patch_grid(size, patch_size))
    centre, spread = (constant(values, colours.device, colours.dtype).view(3, 1, 1) for values in (mean, std))
    colours = (colours - centre) / spread
    flip = to_device(torch.from_numpy(views.flip), images.device)[:, None, None, None]
    return torch.where(flip, colours.flip(3), colours), torch.where(flip, maps.flip(3), maps)


def crop_views(
    images: Float[Tensor, "B 3 H W"],
    maps: Float[Tensor, "B K h w"],
    boxes: Int[ndarray, "B 4"],
    size: tuple[int, int],
    grid: tuple[int, int],
) -> tuple[Float[Tensor, "B 3 H2 W2"], Float[Tensor, "B K h2 w2"]]:
    """Cut a box, y0 y1 x0 x1 in pixels, out of each image and its maps.

    Images are resized to `size` (bilinear, no antialias), maps, which cover the same image, to `grid` (RoIAlign,
    aligned, adaptive sampling).
    """
    rows, columns = boxes[:, :2], boxes[:, 2:]
    crops = _resample(_resample(images, rows, size[0], 2), columns, size[1], 3)
    scale = np.array([maps.shape[3] / images.shape[3], maps.shape[2] / images.shape[2]] * 2)
    corners = boxes[:, [2, 0, 3, 1]] * scale  # y0 y1 x0 x1 in pixels -> x0 y0 x1 y1 in patches
    regions = to_device(torch.from_numpy(np.column_stack([np.arange(len(boxes)), corners])).float(), maps.device)
    return crops, roi_align(maps.float(), regions, grid, sampling_ratio=0, aligned=True)


def _resample(images: Float[Tensor, "B 3 H W"], spans: Int[ndarray, "B 2"], length: int, dim: int) -> Tensor:
    """Interpolate each image's own span linearly, along one dimension, to `length` samples."""
    cut = (spans[:, 1] - spans[:, 0])[:, None]
    # Single precision, as torch's interpolation places its samples. Nothing lies beyond the cut.
    place = (cut.astype(np.float32) / np.float32(length) * (np.arange(length, dtype=np.float32) + 0.5) - 0.5).clip(
        0, cut - 1
    )
    low = np.floor(place).astype(np.int64)
    shape = [len(spans), 1, 1, 1]
    shape[dim] = length

    def take(index: ndarray) -> Tensor:
        index_ = to_device(torch.from_numpy(index + spans[:, :1]), images.device).view(shape)
        return images.take_along_dim(index_, dim)

    weight = to_device(torch.from_numpy(place - low).to(images.dtype), images.device).view(shape)
    return take(low).lerp(take(np.minimum(low + 1, cut - 1)), weight)


def change_colours(images: Float[Tensor, "B 3 H W"], views: Colours) -> Float[Tensor, "B 3 H W"]:
    """Apply jitter, greyscale and blur, in place, to the images whose views have them; values stay in 0 to 1."""
    steps: list[tuple[ndarray, Callable[[Tensor, Tensor], Tensor], ndarray]] = [
        (views.jitter & (views.order[:, place] == which), adjust, views.factors[:, which])
        for place in range(4)
        for which, adjust in enumerate((_brightness, _contrast, _saturation, _hue))
    ]
    steps.append((views.grey, _saturation, np.zeros(len(views.grey))))
    steps.append((views.blur, _blur, views.sigma))
    for chosen, adjust, factors in steps:
        if chosen.any():
            index = to_device(torch.from_numpy(np.flatnonzero(chosen)), images.device)
            factor = to_device(torch.from_numpy(factors[chosen]).to(images.dtype), images.device).view(-1, 1, 1, 1)
            images.index_copy_(0, index, adjust(images[index], factor))
    return images


def _grey(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 H W"]:
    return (images * constant(GREY, images.device, images.dtype).view(3, 1, 1)).sum(1, keepdim=True)


def _brightness(images: Float[Tensor, "B 3 H W"], factor: Float[Tensor, "B 1 1 1"]) -> Float[Tensor, "B 3 H W"]:
    return (images * factor).clamp(0, 1)


def _contrast(images: Float[Tensor, "B 3 H W"], factor: Float[Tensor, "B 1 1 1"]) -> Float[Tensor, "B 3 H W"]:
    return _grey(images).mean((2, 3), keepdim=True).lerp(images, factor).clamp(0, 1)


def _saturation(images: Float[Tensor, "B 3 H W"], factor: Float[Tensor, "B 1 1 1"]) -> Float[Tensor, "B 3 H W"]:
    return _grey(images).lerp(images, factor).clamp(0, 1)


def _hue(images: Float[Tensor, "B 3 H W"], turn: Float[Tensor, "B 1 1 1"]) -> Float[Tensor, "B 3 H W"]:
    """Rotate the hue at constant value and saturation of the HSV cone."""
    low, value = images.aminmax(dim=1, keepdim=True)
    chroma = value - low
    red, green, blue = images.unbind(1)
    at_red, at_green = red == value[:, 0], green == value[:, 0]
    # sixths of a turn from red
    sector = torch.where(at_red, green - blue, torch.where(at_green, blue - red, red - green)) / chroma[:, 0].clamp(
        min=1e-12
    ) + torch.where(at_red, 0.0, torch.where(at_green, 2.0, 4.0))
    place = sector[:, None] + 6 * turn + constant((5.0, 3.0, 1.0), images.device, images.dtype).view(3, 1, 1)
    place = place.remainder(6)
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


def _blur(images: Float[Tensor, "B 3 H W"], sigma: Float[Tensor, "B 1 1 1"]) -> Float[Tensor, "B 3 H W"]:
    """Blur by a Gaussian of 3 x 3 pixels, mirrored at the edges."""
    side = torch.exp(-0.5 / sigma**2)
    side = side / (1 + 2 * side)
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")
    x = x[:, :, 1:-1] * (1 - 2 * side) + (x[:, :, :-2] + x[:, :, 2:]) * side
    return x[..., 1:-1] * (1 - 2 * side) + (x[..., :-2] + x[..., 2:]) * side
