"""Score a folder of masks from any program, with the evaluator and the protocol of a run.

The labels decide which pixels count, so a method that cannot run here is compared on the same pixels.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from transfgu import datasets, formats
from transfgu.datasets import images
from transfgu.datasets.mask_files import CLAIM, find_masks
from transfgu.datasets.rows import counted_label
from transfgu.errors import BadInput, LeftOut, UserError
from transfgu.metrics import confusion_matrix
from transfgu.recipe import Recipe
from transfgu.runtime.progress import Progress
from transfgu.sharing.names import IGNORE
from transfgu.store import storage

_READERS = 8  # images read at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredMasks:
    """Counts of a folder of masks."""

    confusion: Int[np.ndarray, "C clusters"]
    """Number of pixels by true class and by the mask's index."""
    ignored: int
    """Number of ignored classes at the end: 1 if `transfgu name` ignored a class, otherwise 0."""
    images: int
    """Number of counted images."""
    left_out: tuple[LeftOut, ...]


def score_masks(recipe: Recipe, rows: pa.Table, uri: str, progress: Progress | None = None) -> ScoredMasks:
    """Count the confusion matrix of a folder of masks.

    Args:
        recipe: recipe with the classes and, in `evaluation.protocol`, the pixels that count. With protocol "label" a
            mask has the size of its label; with the others it may have the images' size (`dataset.image_size`) instead.
        rows: labelled samples: `name`, `image`, `label` (URIs). Images are not read.
        uri: see :func:`find_masks`. Values are indices of classes or clusters, below the recipe's number of classes.
        progress: reports the number of counted images.

    Raises:
        UserError: more masks or labels missing or unreadable than `dataset.max_bad_share`; a mask of another size, or
            with an index that the recipe does not have.
    """
    masks = find_masks(rows, uri)
    samples = rows.select(["name", "label"]).to_pylist()
    missing = [sample["name"] for sample in samples if sample["name"] not in masks]
    share = recipe.dataset.bad_share
    if share.is_exceeded(len(missing), len(samples)):
        raise UserError(
            f"{len(missing)} of {len(samples)} images have no mask in {storage.shown(uri)}, such as {missing[0]}: "
            f"add them{share.or_raise}",
            code="masks-missing",
        )
    left_out = [LeftOut(name=name, reason="missing mask") for name in missing]
    named = _classes(uri)
    clusters = len(named) or recipe.classes
    classes = datasets.classes(recipe)

    def count(sample: Mapping[str, str]) -> Int[np.ndarray, "C clusters"] | LeftOut:
        try:
            label = images.read_label(sample["label"], classes)
            mask = images.read_mask(masks[sample["name"]])
        except BadInput as error:
            return LeftOut(name=sample["name"], reason=str(error))
        _check(recipe, sample["name"], mask, (label.shape[0], label.shape[1]), clusters)
        size, protocol = recipe.dataset.image_size, recipe.evaluation.protocol
        truth = counted_label(label, size, protocol)
        predicted = counted_label(mask, size, protocol) if mask.shape == label.shape else mask
        return confusion_matrix(truth, predicted, recipe.classes, clusters)

    confusion = np.zeros((recipe.classes, clusters), np.int64)
    with ThreadPoolExecutor(_READERS) as pool:
        there = [sample for sample in samples if sample["name"] in masks]
        for done, counted in enumerate(pool.map(count, there), start=1):
            if isinstance(counted, LeftOut):
                left_out.append(counted)
            else:
                confusion += counted
            if progress:
                progress.update(done, len(there), "masks")
    share.check(left_out, len(samples), "images with masks")
    return ScoredMasks(
        confusion=confusion,
        ignored=int(named[-1:] == [IGNORE]),
        images=len(samples) - len(left_out),
        left_out=tuple(sorted(left_out, key=lambda x: x.name)),
    )


def _classes(uri: str) -> list[str]:
    """Return the classes of masks of `transfgu predict`; empty for masks of other programs."""
    claim = storage.join(uri, CLAIM)
    text = storage.read_bytes_or_none(claim)
    if text is None:
        return []
    with formats.damage(storage.shown(claim), "delete it and the masks next to it"):
        return [str(found["name"]) for found in json.loads(text).get("classes", [])]


def _check(recipe: Recipe, name: str, mask: Int[np.ndarray, "H W"], label: tuple[int, int], clusters: int) -> None:
    protocol, size = recipe.evaluation.protocol, recipe.dataset.image_size
    allowed = [label] if protocol == "label" else [label, size]
    if mask.shape not in allowed:
        wanted = " or ".join(" x ".join(map(str, shape)) for shape in dict.fromkeys(allowed))
        raise UserError(
            f"the mask of {name} has {mask.shape[0]} x {mask.shape[1]} pixels, but protocol {protocol} takes {wanted}: "
            "write masks at their label's size",
            code="mask-size",
        )
    if mask.max() >= clusters:
        raise UserError(
            f"the mask of {name} holds index {mask.max()}, but {recipe.preset} has {clusters} classes, 0 to "
            f"{clusters - 1}: give the number of concepts of the masks (--things, --stuff)",
            code="mask-class",
        )
