"""IIC: maximise the mutual information between the classes of a pixel in two views of an image.

The joint distribution of both classes is counted for every displacement in a box. This is a cross-correlation of class
maps, which in the frequency domain is one small matrix product per frequency: several times faster than a convolution
with kernels as large as the image, and more exact in double precision.

Source: Ji, Henriques and Vedaldi, "Invariant Information Clustering for Unsupervised Image Classification and
Segmentation", ICCV 2019, section 3.3; repository xu-ji/IIC.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Shaped, UInt8
from numpy import ndarray
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from transfgu.baselines.optimisation import new_network, optimise, resized
from transfgu.learner import Batch, Batches, Model, Pending, Setting
from transfgu.recipe import Recipe, Size
from transfgu.views import GREY, Colours, change_colours
from transfgu.workers import differentiable_sum, worker_count

# Type checkers accept an int as a float; the run-time checks of the tests do not.
Real = float | int

_SMALLEST = sys.float_info.epsilon  # smallest probability in a logarithm, as published
_ROUNDING = 1e-12  # of sums by Fourier transform, relative to the largest; one pixel in 1e9 is far larger

BLOCK_BYTES = 1 << 28
"""Maximum size of the cross-spectra in memory at a time, bytes."""


def mutual_information_loss(
    first: Float[Tensor, "B C h w"],
    second: Float[Tensor, "B2 C2 h2 w2"],
    second_to_first: Float[Tensor, "B3 two three"],
    mask: Shaped[Tensor, "B4 h4 w4"],
    *,
    weight: Real = 1.0,
    half_side: int = 10,
    collapsed: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> Float[Tensor, ""]:
    """Return the negative mutual information between the classes of two views of the same images.

    A mask without pixels, or a displacement without a pixel in both views, contributes nothing and has no gradient.

    Args:
        first: class probabilities of the first view.
        second: class probabilities of the second view, in its own frame; same shape.
        second_to_first: (B, 2, 3), affine map from the second view to the frame of the first, as in
            `torch.nn.functional.affine_grid` with aligned corners.
        mask: (B, h, w), pixels of the first view that count: 0 or 1, or a weight.
        weight: lambda, weight of the marginal entropies; 1 gives the mutual information itself.
        half_side: half the side of the box of displacements, pixels; the box has (2 half_side + 1)^2 of them.
        collapsed: use one joint distribution for the whole box, instead of the mean over one per displacement.
        block_bytes: memory for cross-spectra; does not change results.

    Returns:
        The loss, in nats; in single precision if the inputs have half precision.

    Raises:
        ValueError: shapes that do not match, or a negative `half_side`.
    """
    joint = displaced_joint(first, second, second_to_first, mask, half_side=half_side, block_bytes=block_bytes)
    return information_loss(joint, weight=weight, collapsed=collapsed).to(_precision(first))


def displaced_joint(
    first: Float[Tensor, "B C h w"],
    second: Float[Tensor, "B2 C2 h2 w2"],
    second_to_first: Float[Tensor, "B3 two three"],
    mask: Shaped[Tensor, "B4 h4 w4"],
    *,
    half_side: int,
    block_bytes: int = BLOCK_BYTES,
) -> Float64[Tensor, "C C T T"]:
    """Return products of both views' class probabilities, summed over images and pixels, for T x T displacements.

    A batch may be divided: the joints of its parts sum to the joint of the whole, which `information_loss` takes.
    Arguments and errors are those of `mutual_information_loss`.
    """
    batch, _, height, width = first.shape
    if first.shape != second.shape:
        raise ValueError(f"the views differ: {tuple(first.shape)} and {tuple(second.shape)}; give both the same shape")
    if second_to_first.shape != (batch, 2, 3):
        raise ValueError(f"second_to_first must be {(batch, 2, 3)}, not {tuple(second_to_first.shape)}")
    if mask.shape != (batch, height, width):
        raise ValueError(f"mask must be {(batch, height, width)}, not {tuple(mask.shape)}")
    if half_side < 0:
        raise ValueError(f"half_side must be 0 pixels or more, not {half_side}")
    precision = _precision(first)
    counted = mask.to(precision)[:, None]
    warped = warp(second.to(precision), second_to_first.to(precision))
    joint: Tensor = _CrossCorrelation.apply(first.to(precision) * counted, warped * counted, half_side, block_bytes)
    # Where no pixel of one view meets a pixel of the other, the transform leaves only its rounding error.
    total = joint.detach().sum((0, 1))
    return joint * (total > _ROUNDING * total.max())


def information_loss(
    joint: Float64[Tensor, "C C T T"], *, weight: Real = 1.0, collapsed: bool = False
) -> Float64[Tensor, ""]:
    """Return the loss for a joint from `displaced_joint`; arguments as in `mutual_information_loss`."""
    if collapsed:
        joint = joint.sum((2, 3), keepdim=True)
    total = joint.sum((0, 1))
    if collapsed:
        total = total.detach()  # the published gradient treats this as a constant
    joint = joint / total.masked_fill(total == 0, 1)
    joint = (joint + joint.transpose(0, 1)) / 2
    # The joint is symmetric, so both marginals are equal.
    marginal = joint.sum(0).clamp(min=_SMALLEST).log()
    information = joint.clamp(min=_SMALLEST)
    information = information * (information.log() - weight * (marginal[:, None] + marginal[None]))
    # A displacement without pixels has no distribution.
    return -(information * (total > 0)).sum() / total.numel()


def warp(images: Float[Tensor, "B C h w"], affine: Float[Tensor, "B 2 3"]) -> Float[Tensor, "B C h w"]:
    """Resample images at affinely mapped positions: bilinear, corners aligned, zeros beyond the edge."""
    grid = F.affine_grid(affine, list(images.shape), align_corners=True)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def _precision(probabilities: Tensor) -> torch.dtype:
    return torch.promote_types(probabilities.dtype, torch.float32)


class _CrossCorrelation(torch.autograd.Function):
    """``out[i, j, T + d] = sum over images and positions p of first[i, p + d] second[j, p]``, zeros beyond the edge.

    Spectra are computed again in the backward pass, because storing them would take twice the memory of the views.
    """

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, half_side: int, block_bytes: int) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.half_side, ctx.block_bytes = half_side, block_bytes
        size = _padded(first, half_side)
        left, right = _spectrum(first, size), _spectrum(second, size)
        places = _places(first, half_side, size)
        blocks = []
        for rows in _row_blocks(left, block_bytes):
            cross = (left[:, rows] @ right.mH).permute(1, 2, 0)  # (F, c, C) -> (c, C, F)
            plane = _plane(cross, size)
            blocks.append(plane[:, :, places[0][:, None], places[1]])
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        first, second = ctx.saved_tensors
        size = _padded(first, ctx.half_side)
        left, right = _spectrum(first, size), _spectrum(second, size)
        places = _places(first, ctx.half_side, size)
        of_left, of_right = torch.empty_like(left), torch.zeros_like(right)
        for rows in _row_blocks(left, ctx.block_bytes):
            some = gradients[0][rows]
            plane = some.new_zeros(*some.shape[:2], *size)
            plane[:, :, places[0][:, None], places[1]] = some
            cross = torch.fft.rfft2(plane).flatten(2).permute(2, 0, 1)  # (c, C, Y, X) -> (F, c, C)
            of_left[:, rows] = cross @ right
            of_right += cross.mH @ left[:, rows]
        return _image(of_left, size, first), _image(of_right, size, second), None, None


def _padded(images: Tensor, half_side: int) -> tuple[int, int]:
    """Return the sides of a period in which no displacement of the box wraps around to the other end of the image."""
    height, width = images.shape[2:]
    return half_side + max(height, half_side + 1), half_side + max(width, half_side + 1)


def _places(images: Tensor, half_side: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the positions of the displacements -half_side to half_side in a period, for rows and columns."""
    steps = torch.arange(-half_side, half_side + 1, device=images.device)
    return steps % size[0], steps % size[1]


def _spectrum(images: Float[Tensor, "B C h w"], size: tuple[int, int]) -> Tensor:
    """Return the spectrum (F, C, B), with frequencies first as the batch of the matrix product."""
    spectrum: Tensor = torch.fft.rfft2(images.double(), s=size)
    return spectrum.flatten(2).permute(2, 1, 0).contiguous()


def _image(spectrum: Tensor, size: tuple[int, int], like: Tensor) -> Tensor:
    return _plane(spectrum.permute(2, 1, 0), size)[..., : like.shape[2], : like.shape[3]].to(like.dtype)


def _plane(spectra: Tensor, size: tuple[int, int]) -> Tensor:
    """Return real planes (M, N, Y, X) of spectra (M, N, F)."""
    plane: Tensor = torch.fft.irfft2(spectra.reshape(*spectra.shape[:2], size[0], -1), s=size)
    return plane


def _row_blocks(spectrum: Tensor, block_bytes: int) -> Iterator[slice]:
    """Yield slices of the first view's classes whose cross-spectra with all classes of the second fit in memory."""
    frequencies, classes, _ = spectrum.shape
    step = max(1, block_bytes // (frequencies * classes * spectrum.element_size()))
    return (slice(start, start + step) for start in range(0, classes, step))


# ---- network ----

Head = Literal["main", "auxiliary"]


class SegmentationNetwork(nn.Module):
    """The network of IIC's segmentation experiments: six convolutions like VGG's, then a linear head.

    The auxiliary head has more classes than needed: it keeps information in the trunk that the main head does not need
    yet. As published, the heads are trained in alternating epochs.

    Args:
        classes: C of the main head.
        auxiliary_classes: C of the over-clustering head; published, three times as many for COCO-Stuff.
        sub_heads: number of copies of each head, with different initial weights; the loss is the mean over them.
        edges: add Sobel edges of the grey image to the colours as input of the trunk.
        widths: channels of the six convolutions.

    Raises:
        ValueError: numbers of classes, copies or widths from which no network can be built.

    Source: repository xu-ji/IIC, SegmentationNet10aTwoHead. There a dilated convolution is padded by 1 pixel and a head
    by 1, which stretches class maps by 3 %; here they keep their positions.
    """

    def __init__(
        self,
        classes: int,
        auxiliary_classes: int,
        *,
        sub_heads: int = 1,
        edges: bool = True,
        widths: Sequence[int] = (64, 128, 256, 256, 512, 512),
    ) -> None:
        super().__init__()
        if min(classes, auxiliary_classes) < 2 or sub_heads < 1 or len(widths) != 6:
            raise ValueError(
                f"{classes} and {auxiliary_classes} classes, {sub_heads} sub-heads, {len(widths)} widths: "
                "give 2 classes or more, 1 sub-head or more, and 6 widths"
            )
        self.edges = edges
        layers: list[nn.Module] = []
        channels = 5 if edges else 3
        for place, width in enumerate(widths):
            if place == 2:
                layers.append(nn.MaxPool2d(2))
            dilation = 2 if place >= 4 else 1
            convolution = nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict(
            {
                name: nn.ModuleList(nn.Conv2d(channels, count, 1, bias=False) for _ in range(sub_heads))
                for name, count in (("main", classes), ("auxiliary", auxiliary_classes))
            }
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "B 3 H W"], head: Head = "main") -> list[Float[Tensor, "B C H W"]]:
        """Return class probabilities at the images' size, from each copy of a head; pixels are 0 to 1."""
        size = images.shape[2:]
        features = self.trunk(with_edges(images) if self.edges else images)
        copies = self.heads[head]
        assert isinstance(copies, nn.ModuleList)
        maps = (copy(features).softmax(1) for copy in copies)
        return [F.interpolate(some, size=size, mode="bilinear", align_corners=False) for some in maps]


def with_edges(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 5 H W"]:
    """Return the colours, and Sobel's two derivatives of the grey image: to the left, and upwards."""
    grey = (images * images.new_tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)
    leftwards = images.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    kernels = torch.stack((leftwards, leftwards.mT))[:, None]
    return torch.cat((images, F.conv2d(grey, kernels, padding=1)), dim=1)


# ---- pairs of views ----


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Random transforms that make the second view of each image of a batch from the image, which is the first view."""

    colours: Colours
    second_to_first: Float[ndarray, "B 2 3"]
    """Affine map from the second view's class maps to the image's frame, for `mutual_information_loss`."""
    first_to_second: Float[ndarray, "B 2 3"]
    """Its inverse, which produces the second view."""


def draw_pairs(samples: Sequence[int], size: tuple[int, int], *, seed: int, epoch: int, affine: bool = False) -> Pairs:
    """Return the parameters of a random second view of each sample, for images of `size` = (H, W) pixels.

    Colour jitter of 0.4 (brightness, contrast, saturation) and 0.125 (hue), in random order, and a mirror image with
    probability 0.5. Each image has its own generator, so a pair does not depend on its batch.

    Args:
        samples: positions of the images in the epoch.
        size: sides of the images; angles of rotations are measured in pixels, for any ratio of the sides.
        seed: seed of the run.
        epoch: epoch of training.
        affine: also rotate by up to 30 degrees, shear by up to 10 and scale by 0.8 to 1.2. The paper describes it; the
            published commands for COCO-Stuff leave it out.

    Source: repository xu-ji/IIC, defaults of the segmentation scripts.
    """
    drawn = np.array([np.random.default_rng((seed, epoch, sample)).random(12) for sample in samples]).reshape(-1, 12)
    factors, order, (mirror, turn, shear, scale) = drawn[:, :4], drawn[:, 4:8], drawn[:, 8:].T
    batch = len(drawn)
    nothing = np.zeros(batch, bool)
    angle = np.radians(60 * turn - 30) * affine
    sheared = angle + np.radians(20 * shear - 10) * affine
    length = 0.8 + 0.4 * scale if affine else np.ones(batch)
    # The columns are the images of the axes, x before y, in pixels.
    matrix = np.array([[np.cos(angle), -np.sin(sheared)], [np.sin(angle), np.cos(sheared)]]).transpose(2, 0, 1)
    matrix = matrix * length[:, None, None]
    sides = np.array([max(size[1] - 1, 1), max(size[0] - 1, 1)])
    matrix = matrix * sides[None, None, :] / sides[None, :, None]  # pixels -> coordinates from -1 to 1
    flip = np.stack([np.where(mirror < 0.5, -1.0, 1.0), np.ones(batch)], 1)
    return Pairs(
        colours=Colours(
            jitter=~nothing,
            order=order.argsort(1),
            factors=factors * (0.8, 0.8, 0.8, 0.25) + (0.6, 0.6, 0.6, -0.125),
            grey=nothing,
            blur=nothing,
            sigma=np.ones(batch),
        ),
        second_to_first=_without_shift(flip[:, :, None] * np.linalg.inv(matrix)),
        first_to_second=_without_shift(matrix * flip[:, None, :]),
    )


def _without_shift(matrices: Float[ndarray, "B 2 2"]) -> Float[ndarray, "B 2 3"]:
    return np.concatenate([matrices, np.zeros((len(matrices), 2, 1))], 2).astype(np.float32)


def apply_pairs(
    images: UInt8[Tensor, "B 3 H W"], pairs: Pairs
) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B 3 H W"]]:
    """Return both views, with pixels from 0 to 1; the second one is black beyond the image's edge."""
    first = images.float() / 255
    matrices = torch.from_numpy(pairs.first_to_second).to(images.device)
    return first, warp(change_colours(first.clone(), pairs.colours), matrices)


# ---- the method ----


class IIC:
    """IIC's training; see `transfgu.learner.Learner`. Epochs alternate between the main and the auxiliary head."""

    def __init__(self, setting: Setting) -> None:
        self.recipe, self.device = setting.recipe, setting.device
        self._network = new_network(lambda: _network(self.recipe), setting)
        self.network: nn.Module = self._network
        training = self.recipe.training
        self.optimiser: Optimizer | None = Adam(
            self._network.parameters(), training.scaled_lr, weight_decay=training.weight_decay
        )
        self.teacher: nn.Module | None = None
        self.model: Model = IICModel(self.recipe, self._network, self.device)
        self.whole = False

    def begin(self, epoch: int, batches: Batches) -> None:
        """See `Learner`; does nothing."""

    def step(self, batch: Batch, epoch: int, index: int) -> Pending:
        """Take one step on pairs of views; the loss is that of the epoch's head."""
        how, head = self.recipe.iic, head_of(epoch)
        images = batch.inputs.to(self.device)
        size = (images.shape[2], images.shape[3])
        pairs = draw_pairs(batch.slots.tolist(), size, seed=self.recipe.seed, epoch=epoch, affine=how.affine)
        first, second = apply_pairs(images, pairs)
        back = torch.from_numpy(pairs.second_to_first).to(self.device)
        mask = torch.ones(len(images), *size, device=self.device)
        seen = zip(self._network(first, head), self._network(second, head), strict=True)
        losses = [
            information_loss(
                differentiable_sum(displaced_joint(one, other, back, mask, half_side=how.half_side)),
                weight=how.entropy_weight,
            )
            for one, other in seen
        ]
        # All workers compute the loss of the whole batch, and each contributes its share.
        share = torch.stack(losses).mean() / worker_count()
        assert self.optimiser
        return optimise(self._network, self.optimiser, {"total": share})[1]

    def end(self, epoch: int, batches: Batches, *, scored: bool) -> Mapping[str, Any]:
        """Return the trained head, as a column of the history."""
        return {"head": head_of(epoch)}


def head_of(epoch: int) -> Head:
    """Return the head that an epoch, counted from 0, trains."""
    return "auxiliary" if epoch % 2 else "main"


class IICModel:
    """The network's main head on images of the training size; see `transfgu.learner.Model`."""

    def __init__(self, recipe: Recipe, network: SegmentationNetwork, device: torch.device) -> None:
        self.device, self.patch_size = device, 1
        self._size, self._network = recipe.dataset.training_size, network

    def normalise(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Return pixels from 0 to 1."""
        return images.to(self.device).float() / 255

    def frozen(self, images: Shaped[Tensor, "B 3 H W"]) -> Shaped[Tensor, "B 3 H W"]:
        """Return the images: all layers are trained."""
        return images

    def logits(self, seen: Shaped[Tensor, "B 3 H W"], size: Size) -> Float[Tensor, "B C h w"]:
        """Return logarithms of the class probabilities, at the training size."""
        pixels = seen if seen.is_floating_point() else self.normalise(seen)
        copies = self._network(resized(pixels, self._size))
        return torch.stack(copies).mean(0).clamp(min=_SMALLEST).log()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the network's weights, including both heads."""
        weights: dict[str, Tensor] = self._network.state_dict()
        return weights


def load_models(recipe: Recipe, weights: Sequence[Mapping[str, Tensor]], device: torch.device) -> list[IICModel]:
    """Return the models of several networks' weights; see `transfgu.methods.Method`."""
    models = []
    for tensors in weights:
        network = _network(recipe)
        network.load_state_dict(tensors)
        models.append(IICModel(recipe, network.to(device).eval(), device))
    return models


def _network(recipe: Recipe) -> SegmentationNetwork:
    return SegmentationNetwork(recipe.classes, recipe.iic.auxiliary or 3 * recipe.classes, widths=recipe.iic.widths)
