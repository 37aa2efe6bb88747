"""MaskContrast: every pixel of an object is pulled to the mean of that object in another view.

What it is pushed from are the means of other objects, in the batch and in a queue of earlier batches, so that no
labels are needed: an object mask says which pixels belong together, and that is all the supervision there is.

Source: Van Gansbeke, Vandenhende, Georgoulis and Van Gool, "Unsupervised Semantic Segmentation by Contrasting Object
Mask Proposals", ICCV 2021. Written from the formulae.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from transfgu.baselines.resnet import residual_network, widths

# To type checkers an int is a float; to the run-time checks of the tests it is not.
Real = float | int

_ENET = 1.02  # bounds a class weight by 1 / log 1.02 = 50


@dataclass(frozen=True)
class ContrastiveLoss:
    """The loss over the N object pixels of the queries, and what it was computed from."""

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "N P"]
    """Cosines over the temperature: with the prototypes of the B keys, then with those of the queue; P = B + Q."""
    targets: Int64[Tensor, " N"]
    """The image that each pixel is from, which is the number of its prototype."""
    class_weights: Float[Tensor, " P"]
    prototypes: Float[Tensor, "B d"]
    """Mean of each key's object, of unit length; zeros where its mask is empty. They have no gradient."""


def contrastive_loss(
    query: Float[Tensor, "B d h w"],
    key: Float[Tensor, "B2 d2 h2 w2"],
    query_mask: Shaped[Tensor, "B3 h3 w3"],
    key_mask: Shaped[Tensor, "B4 h4 w4"],
    queue: Float[Tensor, "d5 Q"],
    *,
    temperature: Real = 0.5,
) -> ContrastiveLoss:
    """Cross-entropy of each object pixel between its own object's prototype and all others, classes balanced.

    Args:
        query: pixel embeddings of one view, of any length; brought to unit length here.
        key: pixel embeddings of the other view, from the momentum encoder; may be of another resolution.
        query_mask: 1 at the pixels of the query's object, 0 elsewhere.
        key_mask: the same for the key.
        queue: prototypes of earlier batches in its columns, of unit length.
        temperature: divides the cosines.

    Returns:
        The loss is 0 where no query has an object. An image without one in the query has no pixel in the loss.

    Raises:
        ValueError: shapes that do not belong together, or a temperature that is not positive.
    """
    batch, width = query.shape[:2]
    if key.shape[:2] != query.shape[:2]:
        raise ValueError(
            f"the views differ: {tuple(query.shape)} and {tuple(key.shape)}; images and channels must agree"
        )
    for name, mask, view in (("query_mask", query_mask, query), ("key_mask", key_mask, key)):
        if mask.shape != (batch, *view.shape[2:]):
            raise ValueError(f"{name} must be {(batch, *view.shape[2:])}, one for each pixel, not {tuple(mask.shape)}")
    if queue.shape[0] != width:
        raise ValueError(f"a queue of {queue.shape[0]} channels can't be compared with embeddings of {width}")
    if temperature <= 0:
        raise ValueError(f"the temperature must be more than 0, not {temperature}")
    precision = torch.promote_types(query.dtype, torch.float32)
    prototypes = object_prototypes(key.to(precision), key_mask)
    targets, rows, columns = (query_mask != 0).nonzero(as_tuple=True)
    pixels = F.normalize(query[targets, :, rows, columns].to(precision), dim=1)  # (N, d)
    logits = pixels @ torch.cat((prototypes.mT, queue.detach().to(precision)), dim=1) / temperature
    counts = torch.bincount(targets, minlength=logits.shape[1])
    weights = enet_class_weights(counts.to(precision) / max(1, len(targets)))
    total = (weights * counts).sum()
    loss = F.cross_entropy(logits, targets, weights, reduction="sum") / total.masked_fill(total == 0, 1)
    return ContrastiveLoss(loss, logits, targets, weights, prototypes)


@torch.no_grad()
def object_prototypes(embeddings: Float[Tensor, "B d h w"], masks: Shaped[Tensor, "B h w"]) -> Float[Tensor, "B d"]:
    """Mean direction of each object's pixels, of unit length; zeros where a mask is empty."""
    sums = torch.einsum("bdhw,bhw->bd", F.normalize(embeddings, dim=1), masks.to(embeddings.dtype))
    return F.normalize(sums, dim=1)


def enet_class_weights(shares: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
    """Weights ``1 / log(1.02 + p)`` of classes that have the share p of the pixels.

    Source: Paszke et al., "ENet: A Deep Neural Network Architecture for Real-Time Semantic Segmentation", 2016.
    """
    return 1 / (_ENET + shares).log()


def balanced_cross_entropy(logits: Float[Tensor, "*S"], labels: Shaped[Tensor, "*S2"]) -> Float[Tensor, ""]:
    """Binary cross-entropy in which object and background have the same say, mean over all pixels.

    An object's pixel weighs the background's share of the batch, and the other way about; so a batch without an
    object, or of objects alone, has loss 0.

    Args:
        logits: of being an object's.
        labels: 1 for an object's pixel, 0 elsewhere; same shape.

    Raises:
        ValueError: shapes differ.

    Source: Xie and Tu, "Holistically-Nested Edge Detection", ICCV 2015, equation 2.
    """
    if logits.shape != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} need labels of the same shape, not {tuple(labels.shape)}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.dtype)
    objects = labels.mean()
    weights = labels * (1 - objects) + (1 - labels) * objects
    return F.binary_cross_entropy_with_logits(logits, labels, weights)


class PrototypeQueue(nn.Module):
    """Prototypes of the latest batches; a full queue forgets the oldest.

    Its state is part of a checkpoint, since a resumed run must be pushed from the same prototypes.

    Args:
        width: d, channels of an embedding.
        size: Q, prototypes that it holds; 256 published.
        generator: draws the random directions that it begins with.

    Raises:
        ValueError: a size that holds no prototype.
    """

    columns: Float[Tensor, "d Q"]
    position: Int64[Tensor, ""]

    def __init__(self, width: int, size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a queue must hold 1 prototype or more, not {size}")
        self.register_buffer("columns", F.normalize(torch.randn(width, size, generator=generator), dim=0))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, prototypes: Float[Tensor, "n d"]) -> None:
        """Put prototypes in place of the oldest; those of an image without an object, zeros, are left out."""
        size = self.columns.shape[1]
        kept = prototypes[prototypes.any(dim=1)]
        places = (self.position + torch.arange(len(kept), device=kept.device)) % size
        last = slice(max(0, len(kept) - size), None)  # of more than it holds, the last
        self.columns[:, places[last]] = kept[last].mT.to(self.columns.dtype)
        self.position.copy_((self.position + len(kept)) % size)


@torch.no_grad()
def update_momentum_encoder(momentum_encoder: nn.Module, encoder: nn.Module, momentum: Real = 0.999) -> None:
    """Move the weights of the keys' encoder towards the queries' one, by 1 - `momentum` of the way.

    Buffers, such as the statistics of batch norm, are each encoder's own.
    """
    for slow, fast in zip(momentum_encoder.parameters(), encoder.parameters(), strict=True):
        slow.lerp_(fast.to(slow.dtype), 1 - momentum)


class EmbeddingNetwork(nn.Module):
    """Pixel embeddings and object logits: a dilated ResNet, DeepLab's pyramid of dilations, and two linear heads.

    Args:
        name: the ResNet, timm's name; resnet50 published.
        weights: as `residual_network` takes them; published, MoCo v2's after 800 epochs.
        width: d, channels of an embedding.
        dilations: of the pyramid's three convolutions, in steps of 8 pixels.

    Raises:
        UserError: an unknown network, or weights that are not its own.

    Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017.
    """

    def __init__(
        self,
        name: str = "resnet50",
        weights: str = "pretrained",
        width: int = 32,
        dilations: Sequence[int] = (12, 24, 36),
    ) -> None:
        super().__init__()
        self.backbone = residual_network(name, weights, stages=(4,), stride=8)
        inside = 256
        self.pyramid = nn.Sequential(
            ASPP(widths(self.backbone)[0], list(dilations), inside),
            nn.Conv2d(inside, inside, 3, padding=1, bias=False),
            nn.BatchNorm2d(inside),
            nn.ReLU(),
        )
        self.embedding = nn.Conv2d(inside, width, 1)
        self.saliency = nn.Conv2d(inside, 1, 1, bias=False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B d H W"], Float[Tensor, "B H W"]]:
        """Embeddings, not yet of unit length, and logits of being an object's, at the images' size.

        Pixels are normalised by ImageNet's mean and deviation. In training mode a batch needs two images or more.
        """
        features = self.pyramid(self.backbone(images)[0])
        size = images.shape[2:]
        embeddings, saliency = (
            F.interpolate(head(features), size=size, mode="bilinear", align_corners=False)
            for head in (self.embedding, self.saliency)
        )
        return embeddings, saliency[:, 0]
