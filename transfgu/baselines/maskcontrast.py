"""MaskContrast: contrast each pixel of an object with the means of objects in other views.

A pixel is attracted to the mean of its object in another view, and repelled from the means of other objects in the
batch and in a queue of earlier batches. The only supervision is a mask of the object in each image; labels are not
used.

Source: Van Gansbeke, Vandenhende, Georgoulis and Van Gool, "Unsupervised Semantic Segmentation by Contrasting Object
Mask Proposals", ICCV 2021. Written from the formulae.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from numpy import ndarray
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torchvision.models.segmentation.deeplabv3 import ASPP

from transfgu import datasets
from transfgu.baselines.optimisation import new_network, optimise, resized
from transfgu.baselines.pixel_model import PixelModel
from transfgu.baselines.resnet import residual_network, widths
from transfgu.datasets import images as files
from transfgu.datasets.mask_files import find_masks, no_objects
from transfgu.encoder import Encoder, normalise
from transfgu.errors import BadInput, UserError
from transfgu.kmeans import Shard, cluster
from transfgu.learner import Batch, Batches, Model, Pending, Setting
from transfgu.recipe import Recipe, Size
from transfgu.views import Colours, change_colours
from transfgu.workers import gather_rows, sum_over_workers, worker_count

# Type checkers accept an int as a float; the run-time checks of the tests do not.
Real = float | int

_ENET = 1.02  # limits class weights to 1 / log 1.02 = 50


@dataclass(frozen=True)
class ContrastiveLoss:
    """The loss over the N object pixels of the queries, with its inputs."""

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "N P"]
    """Cosines divided by the temperature: with the prototypes of the B keys, then of the queue; P = B + Q."""
    targets: Int64[Tensor, " N"]
    """The image of each pixel, which is the index of its prototype."""
    class_weights: Float[Tensor, " P"]
    prototypes: Float[Tensor, "B d"]
    """Mean of each key's object, of unit length; zeros if its mask is empty. They have no gradient."""


def contrastive_loss(
    query: Float[Tensor, "B d h w"],
    key: Float[Tensor, "B2 d2 h2 w2"],
    query_mask: Shaped[Tensor, "B3 h3 w3"],
    key_mask: Shaped[Tensor, "B4 h4 w4"],
    queue: Float[Tensor, "d5 Q"],
    *,
    temperature: Real = 0.5,
) -> ContrastiveLoss:
    """Return the cross-entropy of object pixels: own object's prototype against all others, with balanced classes.

    Args:
        query: pixel embeddings of one view, of any length; they are normalised here.
        key: pixel embeddings of the other view, from the momentum encoder; may have another resolution.
        query_mask: 1 at the pixels of the query's object, 0 elsewhere.
        key_mask: the same for the key.
        queue: prototypes of earlier batches in its columns, of unit length.
        temperature: divides the cosines.

    Returns:
        The loss, which is 0 if no query has an object. A query without an object has no pixels in the loss. With
            several workers, each gets its share of the loss, and the prototypes of all; the shares sum to the loss.

    Raises:
        ValueError: shapes that do not match, or a temperature that is not positive.
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
    mine = object_prototypes(key.to(precision), key_mask)
    prototypes, first = _of_all_workers(mine)
    targets, rows, columns = (query_mask != 0).nonzero(as_tuple=True)
    targets = targets + first
    pixels = F.normalize(query[targets - first, :, rows, columns].to(precision), dim=1)  # (N, d)
    logits = pixels @ torch.cat((prototypes.mT, queue.detach().to(precision)), dim=1) / temperature
    counts = sum_over_workers(torch.bincount(targets, minlength=logits.shape[1]))
    weights = enet_class_weights(counts.to(precision) / counts.sum().clamp(min=1))
    total = (weights * counts).sum()
    loss = F.cross_entropy(logits, targets, weights, reduction="sum") / total.masked_fill(total == 0, 1)
    return ContrastiveLoss(loss, logits, targets, weights, prototypes)


def _of_all_workers(prototypes: Float[Tensor, "B d"]) -> tuple[Float[Tensor, "all d"], int]:
    """Return the prototypes of all workers' images, worker by worker, and the index of this worker's first."""
    if worker_count() == 1:
        return prototypes, 0
    counts = torch.zeros(worker_count(), dtype=torch.int64, device=prototypes.device)
    rank = dist.get_rank()
    counts[rank] = len(prototypes)
    counts = sum_over_workers(counts)
    return gather_rows(prototypes, np.full(len(prototypes), rank)), int(counts[:rank].sum())


@torch.no_grad()
def object_prototypes(embeddings: Float[Tensor, "B d h w"], masks: Shaped[Tensor, "B h w"]) -> Float[Tensor, "B d"]:
    """Return the mean direction of each object's pixels, of unit length; zeros if a mask is empty."""
    sums = torch.einsum("bdhw,bhw->bd", F.normalize(embeddings, dim=1), masks.to(embeddings.dtype))
    return F.normalize(sums, dim=1)


def enet_class_weights(shares: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
    """Return weights ``1 / log(1.02 + p)`` of classes with the share p of the pixels.

    Source: Paszke et al., "ENet: A Deep Neural Network Architecture for Real-Time Semantic Segmentation", 2016.
    """
    return 1 / (_ENET + shares).log()


def balanced_cross_entropy(logits: Float[Tensor, "*S"], labels: Shaped[Tensor, "*S2"]) -> Float[Tensor, ""]:
    """Return binary cross-entropy, mean over all pixels, with equal total weight of object and background.

    An object's pixel has the background's share of the batch as weight, and the reverse; so the loss of a batch with
    only background or only objects is 0.

    Args:
        logits: logits of being an object's pixel.
        labels: 1 for an object's pixel, 0 elsewhere; same shape.

    Returns:
        The loss; with several workers, the share of this one.

    Raises:
        ValueError: shapes differ.

    Source: Xie and Tu, "Holistically-Nested Edge Detection", ICCV 2015, equation 2.
    """
    if logits.shape != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} need labels of the same shape, not {tuple(labels.shape)}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.dtype)
    pixels = sum_over_workers(labels.new_tensor(labels.numel())).clamp(min=1)
    objects = sum_over_workers(labels.sum()) / pixels
    weights = labels * (1 - objects) + (1 - labels) * objects
    return F.binary_cross_entropy_with_logits(logits, labels, weights, reduction="sum") / pixels


class PrototypeQueue(nn.Module):
    """Prototypes of the latest batches; new ones replace the oldest.

    Its state is part of a checkpoint, because a resumed run needs the same prototypes.

    Args:
        width: d, channels of an embedding.
        size: Q, number of prototypes; 256 published.
        generator: draws the initial random directions.

    Raises:
        ValueError: a size without room for a prototype.
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
        """Replace the oldest prototypes by new ones; prototypes of images without an object, zeros, are left out."""
        size = self.columns.shape[1]
        kept = prototypes[prototypes.any(dim=1)]
        places = (self.position + torch.arange(len(kept), device=kept.device)) % size
        last = slice(max(0, len(kept) - size), None)  # the last ones, if there are more than the queue holds
        self.columns[:, places[last]] = kept[last].mT.to(self.columns.dtype)
        self.position.copy_((self.position + len(kept)) % size)


@torch.no_grad()
def update_momentum_encoder(momentum_encoder: nn.Module, encoder: nn.Module, momentum: Real = 0.999) -> None:
    """Move the weights of the keys' encoder towards those of the queries' encoder, by the fraction 1 - `momentum`.

    Buffers, such as the statistics of batch norm, stay separate.
    """
    for slow, fast in zip(momentum_encoder.parameters(), encoder.parameters(), strict=True):
        slow.lerp_(fast.to(slow.dtype), 1 - momentum)


class EmbeddingNetwork(nn.Module):
    """A network for embeddings and object logits: dilated ResNet, DeepLab's pyramid of dilations, two linear heads.

    Args:
        name: timm's name of the ResNet; resnet50 published.
        weights: as in `residual_network`; published, MoCo v2's after 800 epochs.
        width: d, channels of an embedding.
        dilations: of the pyramid's three convolutions, in steps of 8 pixels.

    Raises:
        UserError: an unknown network, or weights of another network.

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
        """Return embeddings, not yet of unit length, and logits of being an object's, at the images' size.

        Pixels are normalised by ImageNet's mean and deviation. In training mode a batch needs at least two images.
        """
        features = self.pyramid(self.backbone(images)[0])
        size = images.shape[2:]
        embeddings, saliency = (
            F.interpolate(head(features), size=size, mode="bilinear", align_corners=False)
            for head in (self.embedding, self.saliency)
        )
        return embeddings, saliency[:, 0]


# ---- views ----


@dataclass(frozen=True, kw_only=True)
class CutViews:
    """One random view of each image of a batch, and of its mask."""

    colours: Colours
    geometry: Float[ndarray, "B 2 3"]
    """Affine map from positions in the view to positions in the image, coordinates from -1 to 1 at the outer edges."""


_TRIES = 10
_LEAST, _MOST = 0.01, 0.99  # share of the object in a view


def draw_cuts(
    slots: Sequence[int], masks: Float[Tensor, "B h w"], size: Size, *, seed: int, epoch: int, number: int
) -> CutViews:
    """Draw random views of images: a cut of 0.2 to 1 of the area, mirrored with probability 0.5, with changed colours.

    A cut in which the object has less than 1 % or more than 99 % of the pixels is drawn again, up to ten times. Each
    image has its own generator, so a view does not depend on its batch.

    Args:
        slots: positions of the images in the epoch.
        masks: of the images, 0 and 1; read on the host.
        size: sides of a view, pixels.
        seed: seed of the run.
        epoch: epoch of training.
        number: number of the view, because each image has two.

    Source: colours and cuts as MoCo v2 draws them (Chen et al. 2020), the condition as MaskContrast's.
    """
    drawn = [np.random.default_rng((seed, epoch, slot, number)) for slot in slots]
    colours = np.array([generator.random(10) for generator in drawn]).reshape(-1, 10)
    geometry = [_cut(generator, mask, size) for generator, mask in zip(drawn, masks.cpu().numpy(), strict=True)]
    batch = len(drawn)
    return CutViews(
        colours=Colours(
            jitter=colours[:, 0] < 0.8,
            order=colours[:, 1:5].argsort(1),
            factors=colours[:, 5:9] * (0.8, 0.8, 0.8, 0.2) + (0.6, 0.6, 0.6, -0.1),
            grey=colours[:, 9] < 0.2,
            blur=np.zeros(batch, bool),
            sigma=np.ones(batch),
        ),
        geometry=np.array(geometry, np.float32).reshape(-1, 2, 3),
    )


def _cut(generator: np.random.Generator, mask: Float[ndarray, "h w"], size: Size) -> list[list[float]]:
    for _ in range(_TRIES):
        area, ratio = generator.uniform(0.2, 1.0), np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = min(1.0, np.sqrt(area * ratio)), min(1.0, np.sqrt(area / ratio))
        across, down = (1 - width) * generator.uniform(-1, 1), (1 - height) * generator.uniform(-1, 1)
        mirror = -1.0 if generator.random() < 0.5 else 1.0
        rows, columns = (
            slice(int((1 + shift - side) / 2 * cells), max(1, round((1 + shift + side) / 2 * cells)))
            for shift, side, cells in ((down, height, mask.shape[0]), (across, width, mask.shape[1]))
        )
        if _LEAST <= mask[rows, columns].mean() <= _MOST:
            break
    return [[width * mirror, 0.0, across], [0.0, height, down]]


def apply_cuts(
    images: UInt8[Tensor, "B 3 H W"], masks: Float[Tensor, "B h w"], cuts: CutViews, size: Size
) -> tuple[Float[Tensor, "B 3 H2 W2"], Float[Tensor, "B H2 W2"]]:
    """Return the views, normalised by ImageNet's mean and deviation (bilinear), and masks (nearest), of `size`."""
    matrices = torch.from_numpy(cuts.geometry).to(images.device)
    grid = F.affine_grid(matrices, [len(images), 3, *size], align_corners=False)
    pixels = change_colours(images.float() / 255, cuts.colours)
    seen = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    cut = F.grid_sample(masks[:, None], grid, mode="nearest", padding_mode="border", align_corners=False)
    return normalise((seen * 255).round().to(torch.uint8)), cut[:, 0]


# ---- the method ----

_BACKGROUND_PIXELS = 16  # per image, outside its object, for clusters of stuff


class ClusteredEmbeddings(nn.Module):
    """MaskContrast's network, its queue, and the clusters that classify its embeddings.

    Args:
        recipe: recipe with backbone, width, queue and numbers of clusters.
        weights: initial weights of the backbone, as in `residual_network`.
    """

    things: Float[Tensor, "T d"]
    stuff: Float[Tensor, "S d"]

    def __init__(self, recipe: Recipe, weights: str) -> None:
        super().__init__()
        how = recipe.maskcontrast
        self.embedding = EmbeddingNetwork(how.backbone, weights, how.width)
        self.queue = PrototypeQueue(how.width, how.queue)
        self.register_buffer("things", torch.zeros(recipe.concepts.things, how.width))
        self.register_buffer("stuff", torch.zeros(recipe.concepts.stuff, how.width))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B d H W"], Float[Tensor, "B H W"]]:
        """Return embeddings and object logits; see `EmbeddingNetwork`."""
        embeddings, objects = self.embedding(images)
        return embeddings, objects


class MaskContrast:
    """MaskContrast's training; see `transfgu.learner.Learner`. The teacher is the momentum encoder."""

    def __init__(self, setting: Setting) -> None:
        self.recipe, self.device = setting.recipe, setting.device
        how, training = self.recipe.maskcontrast, self.recipe.training
        self._network = new_network(lambda: ClusteredEmbeddings(self.recipe, how.weights), setting)
        self.network: nn.Module = self._network
        self._sgd = SGD(
            self._network.parameters(), training.scaled_lr, momentum=0.9, weight_decay=training.weight_decay
        )
        self.optimiser: Optimizer | None = self._sgd
        self.teacher: nn.Module | None = copy.deepcopy(self._network.embedding).requires_grad_(False)
        self.model: Model = MaskContrastModel(self.recipe, self._network, self.device)
        self.whole = False
        self._steps = setting.steps
        self._view: Size = (self.recipe.dataset.training_size[0] // 2, self.recipe.dataset.training_size[1] // 2)

    def begin(self, epoch: int, batches: Batches) -> None:
        """See `Learner`; does nothing."""

    def step(self, batch: Batch, epoch: int, index: int) -> Pending:
        """Take one step of SGD; then update the momentum encoder, and add the batch's prototypes to the queue."""
        how, training = self.recipe.maskcontrast, self.recipe.training
        done = (epoch * self._steps + index) / (training.epochs * self._steps)
        for group in self._sgd.param_groups:
            group["lr"] = training.scaled_lr * (1 - done) ** 0.9
        (query, query_mask), (key, key_mask) = (self._cut(batch, epoch, number) for number in range(2))
        embeddings, objects = self._network(query)
        assert self.teacher
        with torch.no_grad():
            keys, _ = self.teacher(key)
        contrast = contrastive_loss(
            embeddings, keys, query_mask, key_mask, self._network.queue.columns, temperature=how.temperature
        )
        saliency = balanced_cross_entropy(objects, query_mask)
        total = contrast.loss + saliency
        taken, pending = optimise(
            self._network, self._sgd, {"total": total, "contrast": contrast.loss, "saliency": saliency}
        )
        if taken:
            update_momentum_encoder(self.teacher, self._network.embedding, how.momentum)
            # Use the order of a single worker: each worker has every `world`-th image of the batch.
            mine = object_prototypes(keys.float(), key_mask)
            self._network.queue.push(gather_rows(mine, batch.slots))
        return pending

    def _cut(self, batch: Batch, epoch: int, number: int) -> tuple[Float[Tensor, "B 3 h w"], Float[Tensor, "B h w"]]:
        masks = batch.maps[:, 0].to(self.device).float()
        cuts = draw_cuts(batch.slots.tolist(), masks, self._view, seed=self.recipe.seed, epoch=epoch, number=number)
        return apply_cuts(batch.inputs.to(self.device), masks, cuts, self._view)

    def end(self, epoch: int, batches: Batches, *, scored: bool) -> Mapping[str, Any]:
        """Cluster the objects' mean embeddings for things, and pixels outside objects for stuff, by K-Means."""
        if scored:
            self._network.eval()
            self._cluster(epoch, batches)
            self._network.train()
        return {}

    @torch.no_grad()
    def _cluster(self, epoch: int, batches: Batches) -> None:
        objects, outside, of_objects, of_outside = [], [], [], []
        for batch in batches():
            images = normalise(batch.inputs.to(self.device))
            embeddings, _ = self._network(resized(images, self._view))
            masks = F.interpolate(batch.maps[:, :1].to(self.device).float(), self._view)[:, 0]
            objects.append(object_prototypes(embeddings, masks))
            of_objects.append(batch.slots)
            outside.append(_pixels_outside(embeddings, masks, batch.slots, (self.recipe.seed, epoch)))
            of_outside.append(np.repeat(batch.slots, _BACKGROUND_PIXELS))
        for name, rows, slots in (("things", objects, of_objects), ("stuff", outside, of_outside)):
            centroids: Tensor = getattr(self._network, name)
            if not len(centroids):
                continue
            found = gather_rows(torch.cat(rows), np.concatenate(slots))
            found = found[found.any(dim=1)]  # images without an object, or without pixels outside it, have zeros
            if len(found) < len(centroids):
                raise UserError(
                    f"{len(found)} embeddings are too few for {len(centroids)} clusters of {name}: use more "
                    f"images, or lower --{name}",
                    code="too-few-objects",
                )
            made = cluster(
                Shard([found.cpu().numpy()]),
                len(centroids),
                iterations=self.recipe.concepts.iterations,
                seed=self.recipe.seed,
            )
            centroids.copy_(F.normalize(torch.from_numpy(made.centroids), dim=1))


def _pixels_outside(
    embeddings: Float[Tensor, "B d h w"],
    masks: Float[Tensor, "B h w"],
    slots: Shaped[ndarray, " B"],
    seed: tuple[int, int],
) -> Float[Tensor, "n d"]:
    """Return unit-length embeddings of a few pixels outside each image's object; zeros if there are none."""
    width = embeddings.shape[1]
    found = embeddings.new_zeros(len(slots), _BACKGROUND_PIXELS, width)
    flat = F.normalize(embeddings, dim=1).flatten(2).mT  # (B, hw, d)
    for place, (slot, mask) in enumerate(zip(slots, masks.flatten(1).cpu().numpy(), strict=True)):
        pixels = np.flatnonzero(mask == 0)
        if len(pixels):
            chosen = np.random.default_rng((*seed, int(slot))).choice(pixels, _BACKGROUND_PIXELS)
            found[place] = flat[place, torch.from_numpy(chosen).to(flat.device)]
    return found.flatten(0, 1)


class MaskContrastModel(PixelModel):
    """Finds objects by their logits and assigns each to its nearest cluster of things; see `transfgu.learner.Model`.

    A pixel outside the object is background or, if there are clusters of stuff, belongs to the nearest of these. Stuff
    is an addition of ours: the paper segments objects only.
    """

    def __init__(self, recipe: Recipe, network: ClusteredEmbeddings, device: torch.device) -> None:
        super().__init__(network, device)
        self.network, self._background = network, recipe.background

    def logits(self, seen: Shaped[Tensor, "B 3 H W"], size: Size) -> Float[Tensor, "B C h w"]:
        """Return, per cluster, the object logit (its negative for stuff) minus the lead of the nearest cluster."""
        pixels = seen if seen.is_floating_point() else self.normalise(seen)
        embeddings, objects = self.network(pixels)
        inside: Bool[Tensor, "B h w"] = objects > 0
        unit = F.normalize(embeddings, dim=1)
        parts = []
        if self._background:
            parts.append(-objects[:, None])
        if len(self.network.things):
            likeness = object_prototypes(embeddings, inside) @ self.network.things.mT  # (B, T)
            behind = likeness - likeness.amax(1, keepdim=True)
            parts.append(objects[:, None] + behind[:, :, None, None])
        if len(self.network.stuff):
            likeness = torch.einsum("bdhw,kd->bkhw", unit, self.network.stuff)
            behind = likeness - likeness.amax(1, keepdim=True)
            parts.append(behind - objects[:, None] if len(self.network.things) else behind)
        return torch.cat(parts, dim=1)


def load_models(
    recipe: Recipe, weights: Sequence[Mapping[str, Tensor]], device: torch.device
) -> list[MaskContrastModel]:
    """Return the models of several networks' weights; see `transfgu.methods.Method`."""
    models = []
    for tensors in weights:
        network = ClusteredEmbeddings(recipe, "random")
        network.load_state_dict(tensors)
        models.append(MaskContrastModel(recipe, network.to(device).eval(), device))
    return models


_LOOKED_AT = 4  # images whose class attention is examined before a run


def check(recipe: Recipe) -> None:
    """Raise UserError if the backbone is not available, masks are missing, or the attention finds no object."""
    how = recipe.maskcontrast
    residual_network(how.backbone, how.weights, stages=(4,), stride=8)
    if recipe.dataset.layout not in datasets.LAYOUTS:  # the images will be drawn by the run
        if how.object_masks:
            raise UserError(
                f"--maskcontrast.object_masks names files, but the images of {recipe.preset} are drawn by the run: "
                "leave it out",
                code="object-masks-of-drawn-images",
            )
        return
    rows = datasets.list_samples(recipe, "train")
    if how.object_masks:
        missing = len(rows) - len(find_masks(rows, how.object_masks))
        share = recipe.dataset.bad_share
        if share.is_exceeded(missing, len(rows)):
            raise UserError(
                f"{missing} of {len(rows)} training images have no mask in {how.object_masks}: "
                f"add them{share.or_raise}",
                code="masks-missing",
            )
        return
    encoder = Encoder.from_pretrained(recipe.encoder.name, recipe.encoder.weights)
    seen = 0
    for uri in rows["image"].to_pylist():
        try:
            pixels = files.resize(
                files.read_image(uri, orient=recipe.dataset.orient, max_pixels=recipe.dataset.max_pixels),
                recipe.dataset.image_size,
            )
        except BadInput:
            continue
        seen += 1
        batch = normalise(torch.from_numpy(pixels)[None], encoder.mean, encoder.std)
        with torch.no_grad():
            if encoder.saliency(batch, times_mean=recipe.windows.saliency_factor).any():
                return
        if seen == _LOOKED_AT:
            break
    if seen:
        raise no_objects(f"the first {seen} training images")
