"""Compute the bootstrapping loss so that its value does not depend on how a batch is divided.

The terms are TransFGU's (Yin et al. 2022): a peer loss, the diversity of class embeddings, and the uncertainty of the
predictions. Each term is a sum over pixels or images, divided by a count that is known before the student runs. So
slices of workers and micro-batches each add their share, and the shares add up to the loss and the gradient of the
whole batch. This holds for the uncertainty, too: the foreground pixels over which it is averaged are counted in the
pseudo-label maps. So are the certain pixels, if only these have a label.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transfgu.maps import background_map, scale_maps
from transfgu.transfer import to_device
from transfgu.workers import sum_over_workers, worker_count

FOREGROUND = 0.1
"""Threshold of the uncertainty's foreground: pixels where some map scaled to [0, 1] exceeds it."""

# Type checkers accept an int as a float; the run-time checks of the tests do not.
Real = float | int
Permutation = Int[Tensor, " C"] | Int[np.ndarray, " C"] | Sequence[int]


class PixelLosses(NamedTuple):
    """The contribution of each pixel to the loss, before averaging."""

    peer: Float[Tensor, "B h w"]
    uncertainty: Float[Tensor, "B h w"]
    """1 - (p' - p''), for counted and other pixels."""
    counted: Bool[Tensor, "B h w"]
    """Pixels whose uncertainty counts: all, or the foreground if there is a background class."""
    labels: Int[Tensor, "B h w"]


@dataclass(frozen=True)
class Loss:
    """The loss, its three terms, and the labels used for it."""

    total: Float[Tensor, ""]
    peer: Float[Tensor, ""]
    diversity: Float[Tensor, ""]
    uncertainty: Float[Tensor, ""]
    labels: Int[Tensor, "B h w"]


class Shares(NamedTuple):
    """The weights of an image and of a counted pixel in the global batch, times the number of workers.

    With that factor, the *average* over workers, which data-parallel training takes of gradients, is the value of the
    global batch, for slices of any sizes.
    """

    image: Float[Tensor, ""]
    pixel: Float[Tensor, ""]
    certain: "Certain | None" = None
    """Pixels with a label; None: all."""


class Certain(NamedTuple):
    """The pixels of a global batch whose class is clearest in the maps."""

    level: Int[Tensor, " C"]
    """The lowest certain `margin_levels` of each class."""
    pixel: Float[Tensor, ""]
    """Weight of one certain pixel, as in `Shares`."""


def batch_shares(
    maps: Float[Tensor, "B K h w"], background_threshold: Real | None = None, certain_share: Real = 1
) -> Shares:
    """Return the weights for every part of this worker's slice; all workers must call it, once per step.

    Args:
        maps: the pseudo-label maps of the whole slice, unscaled.
        background_threshold: T_bg where class 0 is background.
        certain_share: share of each class's pixels in the global batch that the peer loss counts; 1: all. They are
            the most certain ones of those whose largest scaled map is the class's.
    """
    images, _, height, width = maps.shape
    # Filled on the device, because a copy from the host would wait for queued work of a GPU.
    counts = torch.full((2,), images, dtype=torch.int64, device=maps.device)
    counts[1] = images * height * width
    if background_threshold is not None:
        counts[1] = foreground(scale_maps(maps.float())).sum()
    shares = worker_count() / sum_over_workers(counts).clamp(min=1)
    certain = None if certain_share == 1 else _certain(maps, background_threshold, certain_share)
    return Shares(image=shares[0], pixel=shares[1], certain=certain)


def _certain(maps: Float[Tensor, "B K h w"], background_threshold: Real | None, share: Real) -> Certain:
    """Find the levels from a histogram, whose counts add up exactly over workers."""
    evidence = map_evidence(maps.float(), background_threshold)
    labels, levels = margin_levels(evidence)
    classes = evidence.shape[1]
    counts = torch.zeros(classes * LEVELS, dtype=torch.int64, device=maps.device)
    cells = (labels * LEVELS + levels).flatten()
    counts.scatter_add_(0, cells, torch.ones_like(cells))
    counts = sum_over_workers(counts).view(classes, LEVELS)
    above = counts.flip(1).cumsum(1).flip(1)  # pixels of this level or a higher one
    wanted = (above[:, :1].double() * share).ceil()
    level = (above >= wanted).sum(1) - 1  # `above` never increases: the last level with enough pixels
    kept = above.gather(1, level[:, None]).sum()
    return Certain(level=level, pixel=worker_count() / kept.clamp(min=1))


LEVELS = 1 + (24 << 7)


def margin_levels(evidence: Float[Tensor, "B C h w"]) -> tuple[Int[Tensor, "B h w"], Int[Tensor, "B h w"]]:
    """Return each pixel's class of largest evidence, and its lead, in levels.

    Evidence is 0 to 1. Maps of one image differ by little, so levels are finer for smaller leads: a level is 1/128 of
    the power of two below the lead. Leads of 2^-24 and less are level 0, a lead of 1 is the last, `LEVELS` - 1.
    """
    top, order = evidence.topk(2, dim=1)
    lead = top[:, 0] - top[:, 1]
    # Positive float32 numbers are ordered like their bits: 8 of exponent (127 means 2^0), then 23 of mantissa.
    levels = (lead.float().contiguous().view(torch.int32) >> 16) - ((127 - 24) << 7)
    return order[:, 0], levels.clamp(0, LEVELS - 1).long()


def map_evidence(maps: Float[Tensor, "B K h w"], background_threshold: Real | None) -> Float[Tensor, "B C h w"]:
    """Scale maps to [0, 1] over an image's concepts; with a background, it comes first."""
    scaled = scale_maps(maps)
    if background_threshold is None:
        return scaled
    return torch.cat((background_map(scaled, background_threshold), scaled), dim=1)


def foreground(scaled: Float[Tensor, "B K h w"]) -> Bool[Tensor, "B h w"]:
    """Return the pixels where some map, scaled to [0, 1], exceeds the background threshold."""
    return (scaled > FOREGROUND).any(dim=1)


def pixel_losses(
    logits: Float[Tensor, "B C h w"],
    maps: Float[Tensor, "B K h w"],
    teacher_logits: Float[Tensor, "B C h w"] | None = None,
    *,
    alpha: Real,
    permutation: Permutation | None = None,
    background_threshold: Real | None = None,
    certain: Certain | None = None,
) -> PixelLosses:
    """Return peer loss, uncertainty and pseudo label of each pixel; arguments as in `bootstrapping_loss`.

    With `certain` the peer loss of all other pixels is 0.
    """
    concepts = logits.shape[1] - (background_threshold is not None)
    if maps.shape[1] != concepts:
        raise ValueError(f"{logits.shape[1]} classes need {concepts} maps per image, not {maps.shape[1]}")
    if teacher_logits is not None and permutation is None:
        raise ValueError("a teacher needs the permutation of classes that makes its negative labels")

    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    with torch.no_grad():
        evidence = map_evidence(maps.to(logits.dtype), background_threshold)
        if background_threshold is None:
            counted = torch.ones_like(evidence[:, 0], dtype=torch.bool)
        else:
            counted = foreground(evidence[:, 1:])
        if certain is not None:
            leader, level = margin_levels(map_evidence(maps.float(), background_threshold))
            is_certain = level >= certain.level[leader]
        if teacher_logits is not None:
            evidence = 0.5 * teacher_logits.to(logits.dtype).softmax(dim=1) + 0.5 * evidence
        labels = evidence.argmax(dim=1)

    peer = F.cross_entropy(logits, labels, reduction="none")
    if teacher_logits is not None:
        order = to_device(torch.as_tensor(permutation), logits.device)
        peer = peer - alpha * F.cross_entropy(logits, evidence[:, order].argmax(dim=1), reduction="none")

    if certain is not None:
        peer = peer * is_certain

    # Without the background, because foreground pixels only need a choice between concepts.
    probabilities = logits[:, logits.shape[1] - concepts :].softmax(dim=1)
    if concepts == 1:
        uncertainty = 1 - probabilities[:, 0]  # no second class: p'' is 0
    else:
        first, second = probabilities.topk(2, dim=1).values.unbind(dim=1)
        uncertainty = 1 - (first - second)
    return PixelLosses(peer, uncertainty, counted, labels)


def diversity(class_embeddings: Float[Tensor, "B C d"]) -> Float[Tensor, " B"]:
    """Return 1 + the mean cosine over the C (C - 1) / 2 pairs of each image's class embeddings, of unit length.

    The squared length of the embeddings' sum contains every pair twice, and each embedding with itself: the sum over
    pairs costs C d, not C^2 d.
    """
    classes = class_embeddings.shape[1]
    own = class_embeddings.square().sum(dim=(1, 2))
    pairs = class_embeddings.sum(dim=1).square().sum(dim=1) - own
    return 1 + pairs / (classes * (classes - 1))


def loss_share(
    shares: Shares,
    logits: Float[Tensor, "B C h w"],
    class_embeddings: Float[Tensor, "B _ d"],
    maps: Float[Tensor, "B K h w"],
    teacher_logits: Float[Tensor, "B C h w"] | None = None,
    *,
    omega_1: Real,
    omega_2: Real,
    alpha: Real,
    permutation: Permutation | None = None,
    background_threshold: Real | None = None,
) -> Loss:
    """Return the share of these images in the loss of the global batch: sum over parts, average over workers.

    Arguments are those of `bootstrapping_loss`, and the ``shares`` of the whole slice that contains these images.
    """
    pixels = pixel_losses(
        logits,
        maps,
        teacher_logits,
        alpha=alpha,
        permutation=permutation,
        background_threshold=background_threshold,
        certain=shares.certain,
    )
    _, _, height, width = logits.shape
    labelled = shares.image / (height * width) if shares.certain is None else shares.certain.pixel
    peer = pixels.peer.sum() * labelled
    diverse = diversity(class_embeddings).sum() * shares.image
    uncertainty = (pixels.uncertainty * pixels.counted).sum() * shares.pixel
    total = peer + omega_1 * diverse + omega_2 * uncertainty
    return Loss(total, peer, diverse, uncertainty, pixels.labels)


def bootstrapping_loss(
    logits: Float[Tensor, "B C h w"],
    class_embeddings: Float[Tensor, "B _ d"],
    maps: Float[Tensor, "B K h w"],
    teacher_logits: Float[Tensor, "B C h w"] | None = None,
    *,
    omega_1: Real,
    omega_2: Real,
    alpha: Real,
    permutation: Permutation | None = None,
    background_threshold: Real | None = None,
    certain_share: Real = 1,
) -> Loss:
    """Return ``L = L_peer + omega_1 L_div + omega_2 L_unc`` of a batch.

    If ``torch.distributed`` is initialised, every worker must call it with its slice of the global batch. Values are
    then those of the global batch on every worker, and the average of the gradients over workers, as computed by
    DistributedDataParallel, is that of the global batch.

    Args:
        logits: student's logits: P before its softmax.
        class_embeddings: student's class embeddings, unit length.
        maps: pseudo-label maps, unscaled: they are scaled to [0, 1] over all concepts of an image.
        teacher_logits: teacher's logits for the same images; without them labels come from the maps alone, and the peer
            loss is the cross entropy with them.
        omega_1: weight of the diversity.
        omega_2: weight of the uncertainty.
        alpha: weight of the negative label's cross entropy.
        permutation: of the C classes, for the negative labels; the same on every worker. Required with a teacher.
        background_threshold: T_bg, in units of scaled maps. If given, class 0 is background, and C = K + 1.
        certain_share: the peer loss is the mean over this share of each class's pixels, the most certain ones; see
            `batch_shares`.

    Raises:
        ValueError: there is not one map per class, or a teacher without a permutation.
    """
    loss = loss_share(
        batch_shares(maps, background_threshold, certain_share),
        logits,
        class_embeddings,
        maps,
        teacher_logits,
        omega_1=omega_1,
        omega_2=omega_2,
        alpha=alpha,
        permutation=permutation,
        background_threshold=background_threshold,
    )
    if worker_count() == 1:
        return loss
    parts = (loss.total, loss.peer, loss.diversity, loss.uncertainty)
    values = sum_over_workers(torch.stack(parts))
    # Values from all workers, gradients from this one.
    total, peer, diverse, uncertainty = (
        part + (value - part).detach() for part, value in zip(parts, values / worker_count(), strict=True)
    )
    return Loss(total, peer, diverse, uncertainty, loss.labels)
