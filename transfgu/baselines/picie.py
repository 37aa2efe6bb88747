"""PiCIE: pixels are clustered in two views, and each view learns its own clusters and the other's.

Cho, Mall, Bala and Hariharan, *PiCIE: Unsupervised Semantic Segmentation using Invariance and Equivariance in
Clustering*, CVPR 2021; repository janghyuncho/PiCIE.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn


def assign(
    features: Float[Tensor, "B d h w"], centroids: Float[Tensor, "K d"]
) -> tuple[Int[Tensor, "B h w"], Float[Tensor, " K"]]:
    """Assign each pixel to the centroid with the largest product with the pixel's unit feature.

    Args:
        features: pixel features, normalised inside.
        centroids: cluster centroids, used as they are.

    Returns:
        The cluster of each pixel, and each cluster's share of the pixels: the class weights, as published.
    """
    labels = _similarities(features, centroids).argmax(1)
    return labels, torch.bincount(labels.flatten(), minlength=len(centroids)).to(features.dtype) / labels.numel()


@dataclass(frozen=True)
class ClusteringLoss:
    """The loss of both views and its two halves, scalars."""

    total: Float[Tensor, ""]
    within: Float[Tensor, ""]
    """Each view learns the clusters of its own features."""
    across: Float[Tensor, ""]
    """Each view learns the clusters of the other view's features."""


def clustering_loss(
    features_1: Float[Tensor, "B d h w"],
    features_2: Float[Tensor, "B d h w"],
    labels_1: Int[Tensor, "B h w"],
    labels_2: Int[Tensor, "B h w"],
    centroids_1: Float[Tensor, "K d"],
    centroids_2: Float[Tensor, "K d"],
    weights_1: Float[Tensor, " K"],
    weights_2: Float[Tensor, " K"],
) -> ClusteringLoss:
    """Return the cross-entropy of two views within and across their clusterings (section 3.3, equations 7 to 9).

    Args:
        features_1: features of the first view, normalised inside.
        features_2: those of the second view, at the same pixels.
        labels_1: clusters of the first view's pixels, from :func:`assign`.
        labels_2: those of the second view's pixels.
        centroids_1: centroids of the first view's clustering.
        centroids_2: those of the second view's.
        weights_1: class weights of the first view's clusters.
        weights_2: those of the second view's.

    Returns:
        `within` and `across`, each a mean over the two views, and `total`, the mean of the two.
    """

    def entropy(features: Tensor, centroids: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return F.cross_entropy(_similarities(features, centroids), labels, weights)

    first, second = (centroids_1, labels_1, weights_1), (centroids_2, labels_2, weights_2)
    within = (entropy(features_1, *first) + entropy(features_2, *second)) / 2
    across = (entropy(features_1, *second) + entropy(features_2, *first)) / 2
    return ClusteringLoss(total=(within + across) / 2, within=within, across=across)


def _similarities(features: Tensor, centroids: Tensor) -> Tensor:
    return F.conv2d(F.normalize(features, dim=1), centroids[:, :, None, None])


class MiniBatchKMeans:
    """K-Means that works in one batch of features at a time; a cluster's step is its new rows over all its rows.

    Args:
        centroids: (K, d) where it starts.
        counts: (K,) rows that each cluster has had so far.
    """

    def __init__(self, centroids: Float[Tensor, "K d"], counts: Shaped[Tensor, " K"]) -> None:
        self.centroids = centroids.clone()
        self.counts = counts.to(centroids.dtype)

    def sums(self, features: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "K d"], Float[Tensor, " K"]]:
        """Return what a share of a batch adds: sums of unit features, and rows, by nearest centroid.

        The shares of several workers add up to those of the whole batch.
        """
        rows = F.normalize(features, dim=1).to(self.centroids.dtype)
        nearest = (2 * rows @ self.centroids.T - self.centroids.square().sum(1)).argmax(1)
        total = torch.zeros_like(self.centroids).index_add_(0, nearest, rows)
        return total, torch.bincount(nearest, minlength=len(self.centroids)).to(rows.dtype)

    def step(self, total: Float[Tensor, "K d"], rows: Float[Tensor, " K"]) -> None:
        """Work in the added :meth:`sums` of a batch; clusters without rows stay where they are."""
        self.counts = self.counts + rows
        rate = rows / self.counts.clamp(min=1)
        mean = total / rows.clamp(min=1)[:, None]
        self.centroids = torch.where(
            rows[:, None] > 0, (1 - rate)[:, None] * self.centroids + rate[:, None] * mean, self.centroids
        )

    def update(self, features: Float[Tensor, "n d"]) -> None:
        """Work in a batch of features, normalised inside."""
        self.step(*self.sums(features))


class FPNDecoder(nn.Module):
    """A feature pyramid over a ResNet's four stages: 1 x 1 convolutions, added from coarse to fine.

    Args:
        widths: channels of the stages, from fine (res2) to coarse (res5).
        width: channels of the output.
    """

    def __init__(self, widths: tuple[int, int, int, int] = (64, 128, 256, 512), width: int = 128) -> None:
        super().__init__()
        res2, res3, res4, res5 = widths
        self.layer4 = nn.Conv2d(res2, width, 1)
        self.layer3 = nn.Conv2d(res3, width, 1)
        self.layer2 = nn.Conv2d(res4, width, 1)
        self.layer1 = nn.Conv2d(res5, width, 1)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> "FPNDecoder":
        """Build the decoder whose weights these are, under the published names (`layer1.weight`, ...).

        Raises:
            KeyError: a weight is missing.
        """
        layers = [state_dict[f"layer{number}.weight"] for number in (4, 3, 2, 1)]
        res2, res3, res4, res5 = (layer.shape[1] for layer in layers)
        decoder = cls((res2, res3, res4, res5), layers[0].shape[0])
        decoder.load_state_dict(dict(state_dict))
        return decoder

    def forward(
        self,
        res2: Float[Tensor, "B d2 h w"],
        res3: Float[Tensor, "B d3 h3 w3"],
        res4: Float[Tensor, "B d4 h4 w4"],
        res5: Float[Tensor, "B d5 h5 w5"],
    ) -> Float[Tensor, "B d h w"]:
        """Join the stages' features at the resolution of `res2`."""
        joined: Tensor = self.layer1(res5)
        for features, layer in ((res4, self.layer2), (res3, self.layer3), (res2, self.layer4)):
            size = features.shape[2:]
            joined = F.interpolate(joined, size=size, mode="bilinear", align_corners=False) + layer(features)
        return joined
