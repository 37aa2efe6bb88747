"""PiCIE: cluster the pixels of two views separately, and classify the pixels of each view by the clusters of both.

The loss within a view makes clusters compact. The loss across views makes them invariant to colour and equivariant to
geometry. No classifier is learned, because the centroids classify.

Source: Cho, Mall, Bala and Hariharan, "PiCIE: Unsupervised Semantic Segmentation using Invariance and Equivariance in
Clustering", CVPR 2021; repository janghyuncho/PiCIE.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64, Shaped, UInt8
from numpy import ndarray
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from transfgu.baselines.optimisation import new_network, optimise
from transfgu.baselines.pixel_model import PixelModel
from transfgu.baselines.resnet import residual_network, widths
from transfgu.encoder import IMAGENET_MEAN, IMAGENET_STD
from transfgu.errors import UserError
from transfgu.kmeans import Shard, cluster
from transfgu.learner import Batch, Batches, Model, Pending, Setting
from transfgu.recipe import Recipe, Size
from transfgu.views import Colours, change_colours
from transfgu.workers import gather_rows, sum_over_workers

CHUNK_ROWS = 1 << 12
"""Rows of features assigned together: 4 MB of 128 channels in double precision fit in the cache."""
_UNIT = 1 << 32  # units per 1.0 in exact sums: 2^31 rows of unit length cannot overflow 64 bits


@dataclass(frozen=True)
class ClusteringLoss:
    """PiCIE's loss and its two halves."""

    total: Float[Tensor, ""]
    """Mean of `within` and `across`."""
    within: Float[Tensor, ""]
    """Features of each view against its own labels and centroids, mean of both views."""
    across: Float[Tensor, ""]
    """Features of each view against the labels and centroids of the other, mean of both views."""


@torch.no_grad()
def assign(
    features: Float[Tensor, "B d h w"], centroids: Float[Tensor, "K d2"], *, chunk_rows: int = CHUNK_ROWS
) -> tuple[Int64[Tensor, "B h w"], Float[Tensor, " K"]]:
    """Return the nearest centroid of each pixel, and the share of pixels in each cluster.

    Args:
        features: of any length; they are normalised here.
        centroids: compared by Euclidean distance, without normalisation.
        chunk_rows: pixels assigned together; does not change results.

    Returns:
        Labels, and the shares of the clusters, which `clustering_loss` takes as class weights: the published code
            weights classes by their frequency. A cluster without pixels has weight 0.

    Raises:
        ValueError: features and centroids differ in width.
    """
    _check_width(features.shape[1], centroids.shape[1])
    batch, _, height, width = features.shape
    clusters = centroids.shape[0]
    rows = features.movedim(1, 3).flatten(0, 2)  # (B, d, h, w) -> (B h w, d)
    labels = torch.cat([_nearest(some, centroids)[0] for some in _unit_rows(rows, chunk_rows)])
    counts = torch.bincount(labels, minlength=clusters)
    shares = counts.double() / max(1, len(labels))
    return labels.reshape(batch, height, width), shares.to(centroids.dtype)


def clustering_loss(
    features_1: Float[Tensor, "B d h w"],
    features_2: Float[Tensor, "B2 d2 h2 w2"],
    labels_1: Int[Tensor, "B3 h3 w3"],
    labels_2: Int[Tensor, "B4 h4 w4"],
    centroids_1: Float[Tensor, "K d"],
    centroids_2: Float[Tensor, "K2 d"],
    weights_1: Float[Tensor, " K"],
    weights_2: Float[Tensor, " K2"],
) -> ClusteringLoss:
    """Return the weighted cross-entropy of cosine logits, within each view and across both.

    Args:
        features_1: features of the first view, in the frame of the geometric transform; they are normalised here.
        features_2: features of the second view, in the same frame.
        labels_1: cluster of each pixel of the first view, among `centroids_1`.
        labels_2: cluster of each pixel of the second view, among `centroids_2`.
        centroids_1: classifier of the first view; it has no gradient.
        centroids_2: classifier of the second view.
        weights_1: class weights for `labels_1`, from `assign` over the whole data set.
        weights_2: class weights for `labels_2`.

    Returns:
        Means weighted by the class of each pixel; 0 if no pixel has a class of positive weight. With several workers
            each gets its share: the shares sum to the loss of all workers' images.

    Raises:
        ValueError: shapes that do not match.
    """
    shape = (features_1.shape[0], *features_1.shape[2:])
    if features_1.shape != features_2.shape:
        raise ValueError(f"the views differ: {tuple(features_1.shape)} and {tuple(features_2.shape)}")
    for name, labels in (("labels_1", labels_1), ("labels_2", labels_2)):
        if labels.shape != shape:
            raise ValueError(f"{name} must be {shape}, one for each pixel of the features, not {tuple(labels.shape)}")
    precision = torch.promote_types(features_1.dtype, torch.float32)
    first, second = (F.normalize(features.to(precision), dim=1) for features in (features_1, features_2))
    of_1, of_2 = (labels_1, centroids_1, weights_1), (labels_2, centroids_2, weights_2)
    within = (_cross_entropy(first, *of_1) + _cross_entropy(second, *of_2)) / 2
    across = (_cross_entropy(first, *of_2) + _cross_entropy(second, *of_1)) / 2
    return ClusteringLoss((within + across) / 2, within, across)


def _cross_entropy(features: Tensor, labels: Tensor, centroids: Tensor, weights: Tensor) -> Tensor:
    logits = torch.einsum("bdhw,kd->bkhw", features, centroids.detach().to(features.dtype))
    labels, weights = labels.long(), weights.to(features.dtype)
    weight = sum_over_workers(weights[labels].sum())
    return F.cross_entropy(logits, labels, weights, reduction="sum") / weight.masked_fill(weight == 0, 1)


def head_balance(clusters: int, auxiliary_clusters: int) -> tuple[float, float]:
    """Return the weights of the main loss and of the auxiliary over-clustering's, which sum to 1.

    The loss at chance level is log K for K clusters: each loss is weighted by that of the other, so that both
    contribute equally.

    Raises:
        ValueError: fewer than two clusters, whose loss is always 0.

    Source: the paper's experiments with auxiliary clustering ("+H"); the repository has none.
    """
    if min(clusters, auxiliary_clusters) < 2:
        raise ValueError(f"{clusters} and {auxiliary_clusters} clusters can't be balanced: each needs two or more")
    main, auxiliary = math.log(clusters), math.log(auxiliary_clusters)
    return auxiliary / (main + auxiliary), main / (main + auxiliary)


# ---- network ----


class FPNDecoder(nn.Module):
    """A feature pyramid over a ResNet's four stages: 1 x 1 convolutions, added from coarse to fine.

    Parameters have the published names, which count the stages from coarse to fine: `layer1` reads `res5`.

    Args:
        widths: channels of the stages from fine to coarse, `res2` to `res5`.
        width: d, channels of the output.
    """

    def __init__(self, widths: Sequence[int] = (64, 128, 256, 512), width: int = 128) -> None:
        super().__init__()
        self.layer4, self.layer3, self.layer2, self.layer1 = (nn.Conv2d(stage, width, 1) for stage in widths)

    @staticmethod
    def from_state_dict(state_dict: Mapping[str, Tensor]) -> "FPNDecoder":
        """Return a decoder with these weights, in evaluation mode; its sizes are read from the tensors.

        Args:
            state_dict: the decoder's own, or a whole published network's (``module.decoder.``).

        Raises:
            UserError: the tensors are not those of a decoder.
        """
        own = {
            name[name.rfind("decoder.") + len("decoder.") :]: t for name, t in state_dict.items() if "decoder." in name
        }
        weights = own or dict(state_dict)
        try:
            stages = [weights[f"layer{stage}.weight"] for stage in (4, 3, 2, 1)]
            decoder = FPNDecoder([stage.shape[1] for stage in stages], stages[0].shape[0])
            decoder.load_state_dict(weights)
        except (KeyError, IndexError, RuntimeError) as error:
            raise UserError(
                f"these weights are not those of a PiCIE decoder (layer1 to layer4): {error}", code="weights-misfit"
            ) from error
        return decoder.eval()

    def forward(
        self,
        res2: Float[Tensor, "B _ h w"],
        res3: Float[Tensor, "B _ _ _"],
        res4: Float[Tensor, "B _ _ _"],
        res5: Float[Tensor, "B _ _ _"],
    ) -> Float[Tensor, "B d h w"]:
        """Return the sum of the stages' features at the resolution of `res2`."""
        joined: Tensor = self.layer1(res5)
        for layer, stage in ((self.layer2, res4), (self.layer3, res3), (self.layer4, res2)):
            larger = F.interpolate(joined, size=stage.shape[2:], mode="bilinear", align_corners=False)
            joined = larger + layer(stage)
        return joined


class FeatureNetwork(nn.Module):
    """A network for pixel features: a ResNet and the pyramid over its four stages, at a quarter of the images' sides.

    Args:
        name: timm's name of the ResNet; resnet18 published.
        weights: as in `residual_network`; published, trained on ImageNet's labels.
        width: d, channels of a feature.

    Raises:
        UserError: an unknown network, or weights of another network.
    """

    def __init__(self, name: str = "resnet18", weights: str = "pretrained", width: int = 128) -> None:
        super().__init__()
        self.backbone = residual_network(name, weights, stages=(1, 2, 3, 4))
        self.decoder = FPNDecoder(widths(self.backbone), width)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B d h w"]:
        """Return features, not yet of unit length; pixels are normalised by ImageNet's mean and deviation."""
        features: Tensor = self.decoder(*self.backbone(images))
        return features


# ---- views ----


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """Random transforms of each image of a batch: two changes of colour, and one of geometry."""

    colours: tuple[Colours, Colours]
    geometry: Float[ndarray, "B 2 3"]
    """Affine map from positions in the cut to positions in the whole image, coordinates -1 to 1 at the outer edges."""


def draw_transforms(
    samples: Sequence[int], *, seed: int, epoch: int, smallest: float = 0.5, largest: float = 1.0
) -> Transforms:
    """Draw random transforms of each sample, the same for clustering and for training in an epoch.

    Brightness, contrast, saturation (0.3) and hue (0.1), in this order, each with probability 0.8; blur 0.5. The cut
    has `smallest` to `largest` of both sides, and is mirrored with probability 0.5. Each image has its own generator.

    Source: repository janghyuncho/PiCIE, with three differences. There the grey image is never applied, because its
    name is misspelt; the blur has up to 2 pixels (here 3 x 3 pixels with that sigma); and cuts are rounded to whole
    pixels, separately for the image and its features.
    """
    drawn = np.array([np.random.default_rng((seed, epoch, sample)).random(24) for sample in samples]).reshape(-1, 24)
    scale = smallest + (largest - smallest) * drawn[:, 20]
    mirror = np.where(drawn[:, 21] < 0.5, -1.0, 1.0)
    across, down = (1 - scale) * (2 * drawn[:, 22] - 1), (1 - scale) * (2 * drawn[:, 23] - 1)
    nothing = np.zeros(len(drawn))
    rows = [[scale * mirror, nothing, across], [nothing, scale, down]]
    return Transforms(
        colours=(_colours(drawn[:, :10]), _colours(drawn[:, 10:20])),
        geometry=np.array(rows).transpose(2, 0, 1).astype(np.float32),
    )


def _colours(drawn: Float[ndarray, "B 10"]) -> Colours:
    factors = drawn[:, :4] * (0.6, 0.6, 0.6, 0.2) + (0.7, 0.7, 0.7, -0.1)
    batch = len(drawn)
    return Colours(
        jitter=np.ones(batch, bool),
        order=np.tile(np.arange(4), (batch, 1)),
        factors=np.where(drawn[:, 4:8] < 0.8, factors, (1, 1, 1, 0)),
        grey=np.zeros(batch, bool),
        blur=drawn[:, 8] < 0.5,
        sigma=0.1 + 1.9 * drawn[:, 9],
    )


def transform(
    planes: Float[Tensor, "B c h w"], transforms: Transforms, size: tuple[int, int]
) -> Float[Tensor, "B c h2 w2"]:
    """Apply the geometric transform to images or features, resampled to `size` (bilinear)."""
    matrices = torch.from_numpy(transforms.geometry).to(planes.device, planes.dtype)
    grid = F.affine_grid(matrices, [*planes.shape[:2], *size], align_corners=False)
    return F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)


def make_views(
    images: UInt8[Tensor, "B 3 H W"], transforms: Transforms, size: tuple[int, int]
) -> tuple[Float[Tensor, "B 3 h w"], Float[Tensor, "B 3 h w"]]:
    """Return the first view, cut from the image, and the second, the whole image, whose *features* `transform` cuts.

    Args:
        images: at twice the size of a view, so that a cut of half the side keeps the full resolution.
        transforms: transforms of each image.
        size: sides of a view.

    Returns:
        Both views, normalised by ImageNet's mean and deviation.
    """
    pixels = images.float() / 255
    first, second = (change_colours(pixels.clone(), colours) for colours in transforms.colours)
    second = F.interpolate(second, size=size, mode="bilinear", align_corners=False, antialias=True)
    mean, deviation = (pixels.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (transform(first, transforms, size) - mean) / deviation, (second - mean) / deviation


# ---- mini-batch K-Means ----


@dataclass(frozen=True)
class ClusterSums:
    """Sums of the rows nearest to each cluster; sums of shards of a batch add up to those of the batch.

    Rows are rounded to multiples of 2^-32 and added as integers, so results do not depend on order or shards.
    """

    sums: Int64[Tensor, "K d"]
    """Sums of unit-length rows, in units of 2^-32."""
    counts: Int64[Tensor, " K"]
    inertia: Int64[Tensor, ""]
    """Sum of squared distances to the nearest centroid, in units of 2^-32."""

    @property
    def mean_distance(self) -> float:
        """Mean squared distance of a row to its centroid; 0 without rows."""
        return int(self.inertia) / _UNIT / max(1, int(self.counts.sum()))

    def __add__(self, other: "ClusterSums") -> "ClusterSums":
        return ClusterSums(self.sums + other.sums, self.counts + other.counts, self.inertia + other.inertia)


class MiniBatchKMeans:
    """K-Means of unit-length features by mini-batch; a cluster's step is its new rows divided by all its rows so far.

    Args:
        centroids: (K, d), initial; the published code takes K-Means of the first batches.
        counts: (K,), number of rows that each of them represents.

    Raises:
        ValueError: not one count per centroid.
    """

    def __init__(self, centroids: Tensor | ndarray, counts: Tensor | ndarray) -> None:
        self.centroids = torch.as_tensor(centroids).detach().clone()
        """(K, d); a cluster without rows keeps its initial centroid."""
        self.counts = torch.as_tensor(counts).detach().to(self.centroids.device, torch.int64)
        """(K,), number of rows so far."""
        if self.counts.shape != self.centroids.shape[:1]:
            raise ValueError(f"{len(self.centroids)} centroids need as many counts, not {tuple(self.counts.shape)}")

    def update(self, features: Tensor | ndarray) -> float:
        """Update with a batch, (n, d); returns its rows' mean squared distance to the centroids before the update.

        Raises:
            ValueError: features of another width.
        """
        rows = torch.as_tensor(features).to(self.centroids.device)
        return self.step(self.sums(rows))

    @torch.no_grad()
    def sums(self, features: Float[Tensor, "n d"]) -> ClusterSums:
        """Return sums and counts of the rows nearest to each centroid; rows are normalised.

        In distributed use, each worker calls it with its rows, the three tensors are summed over workers, and each
        worker takes the same `step`.

        Raises:
            ValueError: features of another width.
        """
        _check_width(features.shape[1], self.centroids.shape[1])
        clusters, device = len(self.centroids), self.centroids.device
        sums = torch.zeros(self.centroids.shape, dtype=torch.int64, device=device)
        counts = torch.zeros(clusters, dtype=torch.int64, device=device)
        inertia = torch.zeros((), dtype=torch.int64, device=device)
        for rows in _unit_rows(features):
            labels, squared = _nearest(rows, self.centroids)
            sums.index_add_(0, labels, rows.mul_(_UNIT).round_().long())
            counts += torch.bincount(labels, minlength=clusters)
            inertia += (squared * _UNIT).round().long().sum()
        return ClusterSums(sums, counts, inertia)

    def step(self, batch: ClusterSums) -> float:
        """Update with a batch's `sums`, computed at these centroids and summed over workers; returns as `update`."""
        self.counts = self.counts + batch.counts
        new = batch.counts > 0
        means = batch.sums[new].double() / _UNIT / batch.counts[new, None]
        steps = (batch.counts[new] / self.counts[new]).double()[:, None]
        moved = self.centroids.clone()
        moved[new] = torch.lerp(moved[new].double(), means, steps).to(moved.dtype)
        self.centroids = moved
        return batch.mean_distance


def _unit_rows(rows: Float[Tensor, "n d"], chunk_rows: int = CHUNK_ROWS) -> Iterator[Tensor]:
    """Yield chunks of normalised rows, in double precision, so that a row's centroid does not depend on its chunk."""
    return (F.normalize(chunk.double(), dim=1) for chunk in torch.split(rows, chunk_rows))


def _nearest(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of the nearest centroid c of each unit-length row x, and |x - c|^2 = |x|^2 - (2 x c - |c|^2)."""
    wide = centroids.to(rows.device, rows.dtype)
    likeness, labels = torch.addmm(-wide.square().sum(1), rows, wide.mT, alpha=2).max(1)
    return labels, (rows.square().sum(1) - likeness).clamp(min=0)


def _check_width(features: int, centroids: int) -> None:
    if features != centroids:
        raise ValueError(f"features of {features} channels can't be compared with centroids of {centroids}")


# ---- the method ----

_SAMPLED = 256  # pixels of the first batches per cluster, as FAISS samples for its training
_MAIN, _AUXILIARY = "centroids", "auxiliary"


class ClusteredNetwork(nn.Module):
    """PiCIE's network and the centroids of both views that classify its features.

    Args:
        recipe: recipe with backbone, width, the number of classes, and whether there are auxiliary clusters.
        weights: initial weights of the backbone, as in `residual_network`.
    """

    centroids: Float[Tensor, "2 K d"]
    auxiliary: Float[Tensor, "2 H d"]

    def __init__(self, recipe: Recipe, weights: str) -> None:
        super().__init__()
        how = recipe.picie
        self.features = FeatureNetwork(how.backbone, weights, how.width)
        self.register_buffer(_MAIN, torch.zeros(2, recipe.classes, how.width))
        if recipe.method == "picie":
            self.register_buffer(_AUXILIARY, torch.zeros(2, how.auxiliary, how.width))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B d h w"]:
        """Return pixel features; see `FeatureNetwork`."""
        features: Tensor = self.features(images)
        return features


class PiCIE:
    """PiCIE's training; see `transfgu.learner.Learner`. The method `picie` has auxiliary clustering."""

    def __init__(self, setting: Setting) -> None:
        self.recipe, self.device = setting.recipe, setting.device
        how, training = self.recipe.picie, self.recipe.training
        self._network = new_network(lambda: ClusteredNetwork(self.recipe, how.weights), setting)
        self.network: nn.Module = self._network
        self.optimiser: Optimizer | None = Adam(
            self._network.parameters(), training.scaled_lr, weight_decay=training.weight_decay
        )
        self.teacher: nn.Module | None = None
        self.model: Model = PiCIEModel(self._network, self.device)
        self.whole = False
        self._first_images = min(how.init_batches, setting.steps) * min(
            training.batch_size, setting.images * training.passes
        )
        self._view = tuple(side // 2 for side in self.recipe.dataset.training_size)
        # For each view: labels by batch, on the host, and the share of pixels of each cluster.
        self._labels: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        self._weights: dict[str, tuple[Tensor, Tensor]] = {}
        # The auxiliary loss and the main one have the same value at chance level.
        main, auxiliary = (
            head_balance(self.recipe.classes, how.auxiliary) if self.recipe.method == "picie" else (1.0, 0.0)
        )
        self._balance = {_MAIN: main, _AUXILIARY: auxiliary} if auxiliary else {_MAIN: main}

    def begin(self, epoch: int, batches: Batches) -> None:
        """Cluster the pixels of each view by mini-batch K-Means, and label them."""
        self._network.eval()
        clusters = self._first_centroids(epoch, batches)
        for index, batch in enumerate(batches()):
            rows = [_rows(features) for features in self._seen(batch, epoch)]
            for name in self._balance:
                for kmeans, some in zip(clusters[name], rows, strict=True):
                    sums = kmeans.sums(some)
                    total = ClusterSums(*(sum_over_workers(x) for x in (sums.sums, sums.counts, sums.inertia)))
                    if index < self.recipe.picie.init_batches:  # the initial centroids come from these pixels
                        kmeans.counts = kmeans.counts + total.counts
                    else:
                        kmeans.step(total)
        for name, of_views in clusters.items():
            getattr(self._network, name).copy_(torch.stack([kmeans.centroids for kmeans in of_views]))
        self._label(epoch, batches)
        self._network.train()

    @torch.no_grad()
    def _seen(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        return self._features(batch, epoch)

    def _features(self, batch: Batch, epoch: int) -> tuple[Float[Tensor, "B d h w"], Float[Tensor, "B d h w"]]:
        """Return features of both views, in the frame of the geometric transform."""
        height, width = self._view
        transforms = draw_transforms(batch.slots.tolist(), seed=self.recipe.seed, epoch=epoch)
        first, second = make_views(batch.inputs.to(self.device), transforms, (height, width))
        of_first, whole = self._network(first), self._network(second)
        return of_first, transform(whole, transforms, (of_first.shape[2], of_first.shape[3]))

    def _first_centroids(self, epoch: int, batches: Batches) -> dict[str, tuple[MiniBatchKMeans, MiniBatchKMeans]]:
        """Cluster some pixels of each image of the first batches by K-Means; pixels don't depend on the workers."""
        how, recipe = self.recipe.picie, self.recipe
        largest = max(getattr(self._network, name).shape[1] for name in self._balance)
        each = max(_LEAST, math.ceil(_SAMPLED * largest / self._first_images))
        sampled: tuple[list[Tensor], list[Tensor]] = ([], [])
        slots: list[ndarray] = []
        for _, batch in zip(range(how.init_batches), batches(), strict=False):
            slots.append(batch.slots)
            for taken, features in zip(sampled, self._seen(batch, epoch), strict=True):
                taken.append(_sampled_pixels(features, batch.slots, each, (recipe.seed, epoch)))
        keys = np.repeat(np.concatenate(slots), each)
        clusters: dict[str, tuple[MiniBatchKMeans, MiniBatchKMeans]] = {}
        shards = [Shard([gather_rows(torch.cat(taken).flatten(0, 1), keys).cpu().numpy()]) for taken in sampled]
        for name in self._balance:
            count = getattr(self._network, name).shape[1]
            found = [cluster(s, count, iterations=how.start_iterations, seed=recipe.seed).centroids for s in shards]
            first, second = (
                MiniBatchKMeans(torch.from_numpy(c).to(self.device), torch.zeros(count, dtype=torch.int64))
                for c in found
            )
            clusters[name] = (first, second)
        return clusters

    def _label(self, epoch: int, batches: Batches) -> None:
        """Compute the cluster of each pixel of this worker's images, and all workers' shares of pixels by cluster."""
        self._labels = {name: ([], []) for name in self._balance}
        counts = {name: [torch.zeros(0)] * 2 for name in self._balance}
        for name in self._balance:
            count = getattr(self._network, name).shape[1]
            counts[name] = [torch.zeros(count, dtype=torch.int64, device=self.device) for _ in range(2)]
        for batch in batches():
            for view, features in enumerate(self._seen(batch, epoch)):
                for name in self._balance:
                    labels, _ = assign(features, getattr(self._network, name)[view])
                    counts[name][view] += torch.bincount(labels.flatten(), minlength=len(counts[name][view]))
                    self._labels[name][view].append(labels.to("cpu", torch.int16))
        for name, of_views in counts.items():
            first, second = (sum_over_workers(count).double() for count in of_views)
            self._weights[name] = (
                (first / first.sum().clamp(min=1)).float(),
                (second / second.sum().clamp(min=1)).float(),
            )

    def step(self, batch: Batch, epoch: int, index: int) -> Pending:
        """Take one step of Adam on the loss within and across views."""
        first, second = self._features(batch, epoch)
        losses: dict[str, Tensor] = {"total": first.new_zeros(())}
        for name, balance in self._balance.items():
            labels = [of_view[index].to(self.device) for of_view in self._labels[name]]
            centroids, weights = getattr(self._network, name), self._weights[name]
            loss = clustering_loss(
                first, second, labels[0], labels[1], centroids[0], centroids[1], weights[0], weights[1]
            )
            losses["total"] = losses["total"] + balance * loss.total
            losses[f"{name} within"], losses[f"{name} across"] = loss.within, loss.across
        if _AUXILIARY not in self._balance:
            losses = {key.removeprefix(f"{_MAIN} "): value for key, value in losses.items()}
        assert self.optimiser
        return optimise(self._network, self.optimiser, losses)[1]

    def end(self, epoch: int, batches: Batches, *, scored: bool) -> Mapping[str, Any]:
        """See `Learner`; the first view's centroids classify, as published."""
        self._labels = {}
        return {}


_LEAST = 8  # minimum number of sampled pixels per image


def _rows(features: Float[Tensor, "B d h w"]) -> Float[Tensor, "n d"]:
    return features.movedim(1, 3).flatten(0, 2)  # (B, d, h, w) -> (B h w, d)


def _sampled_pixels(
    features: Float[Tensor, "B d h w"], slots: Int[ndarray, " B"], count: int, seed: tuple[int, int]
) -> Float[Tensor, "B n d"]:
    """Return unit-length features of `count` pixels of each image, which depend only on its position in the epoch."""
    pixels = features.shape[2] * features.shape[3]
    places = np.array([np.random.default_rng((*seed, slot)).integers(pixels, size=count) for slot in slots], np.int64)
    index = torch.from_numpy(places.reshape(len(slots), 1, count)).to(features.device)
    taken = features.flatten(2).gather(2, index.expand(-1, features.shape[1], -1))  # (B, d, n)
    return F.normalize(taken, dim=1).mT


class PiCIEModel(PixelModel):
    """Pixel features classified by the first view's centroids; see `transfgu.learner.Model`."""

    def __init__(self, network: ClusteredNetwork, device: torch.device) -> None:
        super().__init__(network, device)
        self.network = network

    def logits(self, seen: Shaped[Tensor, "B 3 H W"], size: Size) -> Float[Tensor, "B C h w"]:
        """Return products of unit-length features and centroids, at a quarter of the images' sides."""
        pixels = seen if seen.is_floating_point() else self.normalise(seen)
        features = F.normalize(self.network(pixels), dim=1)
        return torch.einsum("bdhw,kd->bkhw", features, self.network.centroids[0])


def load_models(recipe: Recipe, weights: Sequence[Mapping[str, Tensor]], device: torch.device) -> list[PiCIEModel]:
    """Return the models of several networks' weights; see `transfgu.methods.Method`."""
    models = []
    for tensors in weights:
        network = ClusteredNetwork(recipe, "random")
        network.load_state_dict(tensors)
        models.append(PiCIEModel(network.to(device).eval(), device))
    return models


def check(recipe: Recipe) -> None:
    """Raise UserError if the backbone or its weights are not available."""
    residual_network(recipe.picie.backbone, recipe.picie.weights, stages=(1, 2, 3, 4))
