"""Score lower and upper bounds for the method on the same images and tokens.

Bottom-up: K-Means over patch tokens, of the run's encoder and of an untrained one, and over colour and texture. Pseudo
labels alone: the difference to the method shows the value of training. Upper bound: one linear layer, trained on the
true labels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
import timm
import torch
from jaxtyping import Float, Int, Int16, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from transfgu import datasets
from transfgu.baselines.pixel_features import PixelFeatures
from transfgu.datasets.images import read_image, read_label, read_rows, resize
from transfgu.datasets.packed_maps import unpack_maps
from transfgu.datasets.rows import read_labelled_rows, usable
from transfgu.decoder import winners
from transfgu.encoder import normalise, patch_grid, scaled_size
from transfgu.errors import UserError
from transfgu.inference.frozen_encoder import FrozenEncoder
from transfgu.inference.tokens import PatchTokens
from transfgu.kmeans import Shard, cluster
from transfgu.maps import background_map, scale_maps
from transfgu.metrics import Scores, confusion_matrix, scores
from transfgu.recipe import EvaluationRecipe, Protocol, Recipe
from transfgu.stages import samples
from transfgu.stages.pseudo_labels import load_centroids
from transfgu.store.artifacts import Run

_TOKENS = 1 << 18  # maximum number of patch tokens for K-Means and the probe: 100 MB of width 96
ENCODER, PIXELS = "encoder", "colour, texture and height"
"""Inputs of :func:`probe`."""
_AT_ONCE = 16  # images at a time
_PROBE_ITERATIONS = 80
_PROBE_DECAY = 1e-4

Images = UInt8[np.ndarray, "B 3 H W"]
Predict = Callable[[Images], Tensor]
"""Maps decoded images to scores of classes or clusters, (B, C, h, w)."""


def baselines(recipe: Recipe, run: Run) -> dict[str, Scores]:
    """Score each baseline on the run's labelled validation images, counted and matched like the method itself.

    Predictions from patch tokens are averaged over `evaluation.scales` and, with `evaluation.flip`, mirror images, like
    those of the method. Pseudo labels are computed in the sizes of `pseudo_labels.scales`.

    Everything is computed in this process, on its GPU if it has one. Without labelled training images there is no
    linear probe.

    Args:
        recipe: recipe of the run.
        run: a run with complete concepts.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encode = PatchTokens(recipe.encoder, device)
    train = samples.load(run, "train")
    labelled = train.filter(train["label"].is_valid())
    predictors = {
        "K-Means over patch tokens": bottom_up(recipe, encode, train, smoothing=1),
        "K-Means over patch tokens, smoothed": bottom_up(recipe, encode, train, smoothing=3),
        "pseudo labels alone": pseudo_label_method(recipe, run, device),
    }
    for name, height in (("colour and texture", False), ("colour, texture and height", True)):
        pixels = PixelFeatures(encode.encoder.patch_size, device, height=height)
        predictors[f"K-Means over {name}"] = bottom_up(recipe, pixels, train, smoothing=1, standardised=True)
    if timm.is_model(recipe.encoder.name):
        untrained = PatchTokens(replace(recipe.encoder, weights="random"), device)
    else:
        untrained = PatchTokens(recipe.encoder, device, encode.encoder.untrained())
    predictors["K-Means over patch tokens, untrained encoder"] = bottom_up(recipe, untrained, train, smoothing=1)
    if len(labelled):
        predictors["linear probe, supervised"] = _linear_probe(recipe, encode, labelled)
    labelled_images = _labelled(recipe, samples.labelled(recipe, run), recipe.evaluation.protocol)
    confusions = _confusions(recipe, predictors, labelled_images)
    return {name: scores(confusion) for name, confusion in confusions.items()}


def probe(recipe: Recipe) -> tuple[int, dict[str, Scores]]:
    """Score a linear layer on patch tokens, trained on half of a few labelled images.

    Args:
        recipe: recipe with data, labels, encoder and sizes; `limit` evenly spread labelled training images are used, or
            all if there are fewer. The number of classes is read from the labels.

    Returns:
        The number of images, and the scores on the other half: of the encoder's tokens, and of colour, texture and
            height.

    Raises:
        UserError: fewer than two labelled images, or labels of one class only.
    """
    rows = datasets.list_samples(recipe.with_fields({"limit": 0}), "train")
    rows = rows.filter(rows["label"].is_valid())
    if recipe.limit:
        rows = rows.take(np.unique(np.linspace(0, len(rows) - 1, recipe.limit).round().astype(int)))
    any_class = datasets.classes(recipe.with_fields({"things": 0, "stuff": 255, "groups": "all", "classes": "auto"}))
    found = list(read_rows(rows["label"].to_pylist(), lambda uri: read_label(uri, any_class)))
    rows = rows.filter(pa.array([label is not None for label, _ in found], pa.bool_()))
    count = 1 + max((int(label.max()) for label, _ in found if label is not None), default=-1)
    if len(rows) < 2 or count < 2:
        raise UserError(
            f"{len(rows)} labelled images of {max(count, 0)} classes are too few for a probe: give two or more, of "
            "two or more classes",
            code="labels-few",
        )
    recipe = recipe.with_fields({"things": 0, "stuff": count, "groups": "all", "classes": "auto"})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encode = PatchTokens(recipe.encoder, device)
    pixels = PixelFeatures(encode.encoder.patch_size, device, height=True)
    halves = rows.take(np.arange(0, len(rows), 2)), rows.take(np.arange(1, len(rows), 2))
    predictors = {ENCODER: _linear_probe(recipe, encode, halves[0]), PIXELS: _linear_probe(recipe, pixels, halves[0])}
    confusions = _confusions(recipe, predictors, _labelled(recipe, halves[1]))
    return len(rows), {name: scores(confusion) for name, confusion in confusions.items()}


def _confusions(
    recipe: Recipe,
    predictors: Mapping[str, Predict],
    batches: Iterable[tuple[Images, list[Int16[np.ndarray, "_ _"]]]],
) -> dict[str, Int64[np.ndarray, "C C"]]:
    confusions = {name: np.zeros((recipe.classes, recipe.classes), np.int64) for name in predictors}
    for images, labels in batches:
        for name, predict in predictors.items():
            for maps, label in zip(predict(images), labels, strict=True):
                predicted = winners(maps, (label.shape[0], label.shape[1])).cpu().numpy()
                confusions[name] += confusion_matrix(label, predicted, recipe.classes)
    return confusions


def bottom_up(
    recipe: Recipe,
    encode: PatchTokens | PixelFeatures,
    train: pa.Table,
    *,
    smoothing: int,
    standardised: bool = False,
) -> Predict:
    """Return the prediction that assigns each patch to the cluster with the centroid nearest to its token.

    With `standardised`, each channel of the tokens has mean 0 and deviation 1 over the patches of training images.
    """
    sample = _Sample(recipe, encode, len(train))
    rows = np.concatenate(
        [sample.take(smoothed_tokens(encode, images, smoothing)) for images in _images(recipe, train)]
    )
    shift, scale = np.zeros(rows.shape[1], np.float32), np.ones(rows.shape[1], np.float32)
    if standardised:
        shift, scale = rows.mean(0), rows.std(0) + 1e-6
    found = cluster(Shard([(rows - shift) / scale]), recipe.classes, seed=recipe.seed).centroids
    centroids, mean, deviation = (torch.from_numpy(a).to(encode.device) for a in (found, shift, scale))

    def likeness(tokens: Float[Tensor, "B d h w"]) -> Float[Tensor, "B K h w"]:
        seen = (tokens - mean[:, None, None]) / deviation[:, None, None]
        # The nearest centroid c of a token x has the largest 2 x c - |c|^2, because |x| is the same for all c.
        return torch.einsum("bdhw,kd->bkhw", seen, 2 * centroids) - centroids.square().sum(1)[:, None, None]

    return lambda images: averaged(recipe.evaluation, encode, images, likeness, smoothing)


def pseudo_label_method(recipe: Recipe, run: Run, device: torch.device) -> Predict:
    """Return the prediction by pseudo labels, from which the decoder starts, computed for validation images."""
    encoder, centroids = FrozenEncoder(recipe, device), torch.from_numpy(load_centroids(run))

    def predict(images: Images) -> Tensor:
        packed = encoder.concept_maps(images, centroids, recipe.pseudo_labels)
        maps = scale_maps(unpack_maps(torch.from_numpy(packed)))
        if not recipe.background:
            return maps
        return torch.cat([background_map(maps, recipe.training.background_threshold), maps], 1)

    return predict


def _linear_probe(recipe: Recipe, encode: PatchTokens | PixelFeatures, labelled: pa.Table) -> Predict:
    """Return logistic regression from a patch's token to the class of most of its pixels."""
    sample = _Sample(recipe, encode, len(labelled))
    rows, truths = [], []
    for images, labels in _labelled(recipe, labelled):
        rows.append(sample.take(smoothed_tokens(encode, images)))
        truths.append(sample.take(majority(recipe, labels, encode.encoder.patch_size))[:, 0])
    known = np.concatenate(truths) >= 0
    tokens = torch.from_numpy(np.concatenate(rows)[known]).to(encode.device)
    truth = torch.from_numpy(np.concatenate(truths)[known]).to(encode.device)
    mean, deviation = tokens.mean(0), tokens.std(0) + 1e-6
    tokens = (tokens - mean) / deviation
    weight = torch.zeros(recipe.classes, tokens.shape[1], device=encode.device, requires_grad=True)
    bias = torch.zeros(recipe.classes, device=encode.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=_PROBE_ITERATIONS)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(tokens, weight, bias), truth) + _PROBE_DECAY * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def logits(tokens: Float[Tensor, "B d h w"]) -> Float[Tensor, "B C h w"]:
        seen = (tokens.movedim(1, 3) - mean) / deviation  # (B, d, h, w) -> (B, h, w, d)
        return F.linear(seen, weight, bias).movedim(3, 1)

    return lambda images: averaged(recipe.evaluation, encode, images, logits)


class _Sample:
    """The same few patches of each image, chosen at random, at most `_TOKENS` of all images together."""

    def __init__(self, recipe: Recipe, encode: PatchTokens | PixelFeatures, images: int) -> None:
        height, width = patch_grid(recipe.dataset.image_size, encode.encoder.patch_size)
        count = max(1, min(height * width, _TOKENS // max(1, images)))
        self._places = np.sort(np.random.default_rng(recipe.seed).permutation(height * width)[:count])

    def take(self, planes: Float[Tensor, "B d h w"] | Int[Tensor, "B d h w"]) -> np.ndarray:
        """Return the sampled patches as rows of d numbers."""
        flat = planes.flatten(2).mT[:, self._places].flatten(0, 1)  # (B, d, h, w) -> (B n, d)
        rows: np.ndarray = flat.cpu().numpy()
        return rows


def averaged(
    how: EvaluationRecipe,
    encode: PatchTokens | PixelFeatures,
    images: Images,
    read: Callable[[Float[Tensor, "B d h w"]], Float[Tensor, "B C h w"]],
    smoothing: int = 1,
) -> Float[Tensor, "B C h w"]:
    """Apply `read` to tokens of scaled and mirrored images, and average, as `averaged_logits` does."""
    encoder, own = encode.encoder, (images.shape[2], images.shape[3])
    sizes = [scaled_size(own, scale, encoder.patch_size) for scale in how.scales]
    finest = patch_grid(max(sizes), encoder.patch_size)
    pixels = torch.from_numpy(images)
    found = []
    for size in sizes:
        resized: Tensor = pixels
        if size != own:
            resized = F.interpolate(
                normalise(pixels.to(encode.device), encoder.mean, encoder.std), size, mode="bilinear"
            )
        for mirrored in (False, True) if how.flip else (False,):
            seen = read(smoothed_tokens(encode, resized.flip(3) if mirrored else resized, smoothing))
            seen = seen.flip(3) if mirrored else seen
            found.append(seen if seen.shape[2:] == finest else F.interpolate(seen, finest, mode="bilinear"))
    return torch.stack(found).mean(0)


def smoothed_tokens(
    encode: PatchTokens | PixelFeatures, images: Images | Tensor, smoothing: int = 1
) -> Float[Tensor, "B d h w"]:
    """Return the patch tokens of images, averaged over `smoothing` x `smoothing` patches."""
    height, width = patch_grid((images.shape[2], images.shape[3]), encode.encoder.patch_size)
    pixels = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    tokens = encode(pixels).mT.reshape(len(pixels), -1, height, width)  # (B, hw, d) -> (B, d, h, w)
    return F.avg_pool2d(tokens, smoothing, 1, smoothing // 2, count_include_pad=False)


def majority(recipe: Recipe, labels: list[Int16[np.ndarray, "_ _"]], patch: int) -> Int[Tensor, "B 1 h w"]:
    """Return the class of most labelled pixels of each patch; -1 where no pixel is labelled."""
    pixels = torch.from_numpy(np.stack(labels)).long()
    votes = F.one_hot(pixels + 1, recipe.classes + 1).movedim(3, 1)[:, 1:].float()  # (B, C, H, W)
    share, winner = F.avg_pool2d(votes, patch).max(dim=1, keepdim=True)
    return torch.where(share > 0, winner, -1)


def _images(recipe: Recipe, rows: pa.Table) -> Iterator[Images]:
    """Yield decoded images in batches; unreadable images are skipped."""
    size = recipe.dataset.image_size
    for start in range(0, len(rows), _AT_ONCE):
        uris = rows["image"].slice(start, _AT_ONCE).to_pylist()
        found = read_rows(
            uris,
            lambda uri: resize(
                read_image(uri, orient=recipe.dataset.orient, max_pixels=recipe.dataset.max_pixels), size
            ),
        )
        batch = [image for image, _ in found if image is not None]  # the features stage counts and names the others
        if batch:
            yield np.stack(batch)


def _labelled(
    recipe: Recipe, rows: pa.Table, protocol: Protocol = "published"
) -> Iterator[tuple[Images, list[Int16[np.ndarray, "_ _"]]]]:
    """Yield decoded images and their labels, at the images' size unless the protocol uses another."""
    for start in range(0, len(rows), _AT_ONCE):
        some = rows.slice(start, _AT_ONCE)
        images, labels = usable(read_labelled_rows(some, recipe=recipe, protocol=protocol))
        if labels:
            yield images, labels
