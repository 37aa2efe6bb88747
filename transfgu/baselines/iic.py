"""Invariant information clustering: two views of a pixel's neighbourhood should tell each other their class.

Ji, Henriques and Vedaldi, *Invariant Information Clustering for Unsupervised Image Classification and Segmentation*,
ICCV 2019, section 3.3; repository xu-ji/IIC.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor


def mutual_information_loss(
    first: Float[Tensor, "B C h w"],
    second: Float[Tensor, "B C h w"],
    second_to_first: Float[Tensor, "B 2 3"],
    mask: Shaped[Tensor, "B h w"],
    *,
    weight: float = 1.0,
    half_side: int = 10,
    collapsed: bool = False,
) -> Float[Tensor, ""]:
    """Return the negative mutual information of two views' classes, over a box of displacements.

    The joint distribution of the classes at each displacement is one correlation of the two views (equation 5). The
    loss is the mean over the displacements; collapsed, the joint distributions are added first, and there is one loss.

    Args:
        first: class probabilities of the first view.
        second: those of the second view.
        second_to_first: affine matrices that bring the second view onto the first, in coordinates from -1 to 1 with
            aligned corners, as `torch.nn.functional.affine_grid` takes them.
        mask: pixels of the first view that count: 1, others 0.
        weight: lambda, the weight of the entropies.
        half_side: largest displacement along each axis, pixels.
        collapsed: add the joint distributions of all displacements first.

    Returns:
        The loss, to be minimised; gradients flow into both views.

    Raises:
        ValueError: the views differ in shape, or `half_side` is negative.
    """
    if first.shape != second.shape:
        raise ValueError(f"the views differ in shape: {tuple(first.shape)} and {tuple(second.shape)}")
    if half_side < 0:
        raise ValueError(f"half_side must not be negative, not {half_side}")
    grid = F.affine_grid(second_to_first, list(second.shape), align_corners=True)
    second = F.grid_sample(second, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    counted = mask[:, None].to(first.dtype)
    first, second = first * counted, second * counted
    joint = F.conv2d(first.transpose(0, 1), second.transpose(0, 1), padding=half_side)  # (C, C, T, T)
    if collapsed:
        joint = joint.sum((2, 3), keepdim=True)
    smallest = torch.finfo(joint.dtype).eps
    joint = joint / joint.sum((0, 1)).clamp(min=smallest)
    joint = (joint + joint.transpose(0, 1)) / 2
    of_first = joint.sum(1, keepdim=True).clamp(min=smallest)
    of_second = joint.sum(0, keepdim=True).clamp(min=smallest)
    joint = joint.clamp(min=smallest)
    information = joint * (joint.log() - weight * of_first.log() - weight * of_second.log())
    return -information.sum((0, 1)).mean()
