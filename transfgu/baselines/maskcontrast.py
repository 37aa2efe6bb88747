"""MaskContrast: a pixel of an object is pulled to the mean of the object in another view, and away from other objects.

Van Gansbeke, Vandenhende, Georgoulis and Van Gool, *Unsupervised Semantic Segmentation by Contrasting Object Mask
Proposals*, ICCV 2021.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

_ENET = 1.02  # c of ENet's class weights, 1 / log(c + share)


@dataclass(frozen=True)
class ContrastiveLoss:
    """The loss and what it is made of; P pixels of objects, B images, Q places of the queue."""

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "P classes"]
    """Similarity of each pixel with the B prototypes and the queue, over the temperature."""
    targets: Int[Tensor, " P"]
    """The image that each pixel is of."""
    class_weights: Float[Tensor, " classes"]
    prototypes: Float[Tensor, "B d"]
    """The means of the objects, of unit length; they take the first places of the queue afterwards."""


def contrastive_loss(
    query: Float[Tensor, "B d h w"],
    key: Float[Tensor, "B d h w"],
    query_mask: Shaped[Tensor, "B h w"],
    key_mask: Shaped[Tensor, "B h w"],
    queue: Float[Tensor, "d Q"],
    *,
    temperature: float = 0.5,
) -> ContrastiveLoss:
    """Return the loss that tells objects apart by the prototypes of another view (equation 3).

    Args:
        query: pixel embeddings of one view, normalised inside; gradients flow into them.
        key: those of the other view by the momentum encoder, normalised inside; no gradients flow into them.
        query_mask: 1 at pixels of the object, else 0.
        key_mask: the same in the other view.
        queue: prototypes of earlier batches, of unit length.
        temperature: of the softmax.

    Returns:
        The cross-entropy over all pixels of objects, weighted by ENet's class weights (Paszke et al. 2016), with its
        parts. Without a pixel of an object the loss is 0.

    Raises:
        ValueError: the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    query, key = F.normalize(query, dim=1), F.normalize(key.detach(), dim=1)
    inside = key_mask.to(key.dtype)
    means = torch.einsum("bdhw,bhw->bd", key, inside) / inside.sum((1, 2)).clamp(min=1)[:, None]
    prototypes = F.normalize(means, dim=1)
    where = query_mask.bool()
    pixels = query.permute(0, 2, 3, 1)[where]  # (P, d)
    targets = torch.arange(len(query), device=query.device)[:, None, None].expand_as(where)[where]
    logits = torch.cat([pixels @ prototypes.T, pixels @ queue], dim=1) / temperature
    shares = torch.bincount(targets, minlength=logits.shape[1]).to(logits.dtype) / max(1, len(targets))
    class_weights = 1 / torch.log(_ENET + shares)
    loss = F.cross_entropy(logits, targets, class_weights) if len(targets) else logits.sum()
    return ContrastiveLoss(loss, logits, targets, class_weights, prototypes)


def balanced_cross_entropy(logits: Float[Tensor, "B h w"], labels: Shaped[Tensor, "B h w"]) -> Float[Tensor, ""]:
    """Return the binary cross-entropy of object masks, each side weighted by the other side's share of the pixels.

    Args:
        logits: of a pixel's being part of an object.
        labels: 1 at objects, else 0.
    """
    target = labels.to(logits.dtype)
    weight = 1 - target.mean()  # of objects: the share of the background
    return F.binary_cross_entropy_with_logits(logits, target, weight * target + (1 - weight) * (1 - target))
