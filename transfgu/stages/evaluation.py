"""The stage "evaluation": count confusion matrices on the validation images, and compute the scores.

Tasks read and decode. Actors hold the frozen encoder and all decoders, so the decoders of the best and the last epoch
share one read and one forward pass. Each batch returns a small matrix, which the driver adds up.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import safetensors.numpy
import torch
from jaxtyping import Float, Int, Int16
from ray.data import Dataset
from torch import Tensor

from transfgu import formats
from transfgu.datasets.rows import read_labelled_rows, usable
from transfgu.decoder import all_winners
from transfgu.errors import LeftOut, UserError
from transfgu.inference import device
from transfgu.inference.averaging import averaged_logits
from transfgu.inference.device import allow_tf32, use_cores
from transfgu.inference.mask_model import MaskModel
from transfgu.inference.models import check_method, load_models
from transfgu.methods import TRANSFGU
from transfgu.metrics import Scores, batch_confusion, scores, scores_json
from transfgu.recipe import Recipe
from transfgu.runtime import bottleneck, capacity, connect, parts, ray_internals
from transfgu.runtime.progress import Progress
from transfgu.stages import samples
from transfgu.store import storage
from transfgu.store.artifacts import LAST, MODEL, Outcome, Run
from transfgu.store.weights import read_weights

BLOCK_ROWS = 32  # maximum number of images per reading task; a smaller batch is one task
_NO_SCORES = {"mean_iou": None, "pixel_accuracy": None, "iou": None, "assignment": None}


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Confusion matrices of decoders on a set of labelled images."""

    confusions: Mapping[str, Int[np.ndarray, "C C"]]
    """Pixels, true class by predicted cluster, for each decoder by its name."""
    images: int
    """Images that were counted."""
    left_out: tuple[LeftOut, ...]
    details: Mapping[str, str] = field(default_factory=dict)
    """Statistics of Ray Data."""

    def scores(self, name: str) -> Scores:
        """Return the scores of a decoder."""
        return scores(self.confusions[name])


def run(recipe: Recipe, run: Run, progress: Progress) -> Outcome:
    """Score the run's decoder, and that of the last epoch; writes `scores.json` and `confusion.safetensors`.

    Without labels there are no scores, and `scores.json` says so with nulls.

    Raises:
        UserError: no trained decoder, or one of another recipe; more bad labels than `dataset.max_bad_share`.
    """
    artifact, rows = run.artifact("evaluation"), samples.labelled(recipe, run)
    decoders = {"model": run.file(MODEL), "last": run.artifact("training").file(LAST)}
    if recipe.decoder.weights:
        decoders = {"model": recipe.decoder.weights}
    if not len(rows):
        storage.write_bytes(artifact.file("scores.json"), json.dumps(formats.stamp(_NO_SCORES), indent=1).encode())
        progress.note("no validation image has a label, so there are no scores")
        return Outcome(items=0, details={"labels": 0})
    evaluation = evaluate(recipe, decoders, rows, progress)
    storage.write_bytes(artifact.file("confusion.safetensors"), safetensors.numpy.save(dict(evaluation.confusions)))
    shown = scores_json(evaluation.scores("model"))
    if "last" in decoders:
        shown["last"] = scores_json(evaluation.scores("last"))
    storage.write_bytes(artifact.file("scores.json"), json.dumps(formats.stamp(shown), indent=1).encode())
    return Outcome(
        items=evaluation.images,
        left_out=evaluation.left_out,
        details={name: shown[name] for name in ("mean_iou", "pixel_accuracy")} | dict(evaluation.details),
    )


def evaluate(
    recipe: Recipe,
    decoders: Mapping[str, str],
    rows: pa.Table,
    progress: Progress | None = None,
    *,
    on_ray: bool = False,
) -> Evaluation:
    """Count confusion matrices.

    Args:
        recipe: recipe with the encoder, the images' size, the classes, the protocol (`evaluation.protocol`, see
            `transfgu.datasets.rows.read_labelled_rows`), and the averaging of logits (`evaluation.scales` and `.flip`).
            Logits are resized bilinearly to the label.
        decoders: weights by any name: ours, or published ones (`.pt`); paths or URIs.
        rows: labelled images: `name`, `image` (URI), `label` (URI).
        progress: reports images.
        on_ray: use Ray's actors even for few images (see `transfgu.runtime.connect.works_here`).

    Raises:
        UserError: weights that are missing or don't fit the recipe; more bad labels than `dataset.max_bad_share`.
    """
    for uri in decoders.values():
        check_decoder(recipe, uri)
    rows = rows.select(["name", "image", "label"])
    read = partial(read_labelled_rows, recipe=recipe, protocol=recipe.evaluation.protocol)
    arguments: dict[str, Any] = {
        "recipe": recipe,
        "decoders": list(decoders.values()),
        "processes": capacity.actors_per_node(recipe.compute),
    }
    data: Dataset | None = None
    if len(rows) <= BLOCK_ROWS and not on_ray and connect.works_here():
        counted: Iterator[Mapping[str, Any]] = _counted_here(
            read(rows), Count(**arguments), recipe.evaluation.batch_size
        )
    else:
        data = plan(recipe, rows, read, arguments)
        # With prefetching, a batch would be reported only once the next one exists.
        counted = iter(data.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))
    confusions = np.zeros((len(decoders), recipe.classes, recipe.classes), np.int64)
    images, left_out = 0, []
    for counts in counted:
        confusions += counts["confusions"].sum(0)
        images += int(counts["images"].sum())
        left_out += [LeftOut(**x) for text in counts["left_out"] for x in json.loads(text)]
        if progress:
            progress.update(images + len(left_out), len(rows), "images")
    left_out.sort(key=lambda x: x.name)
    recipe.dataset.bad_share.check(left_out, len(rows), "validation images")
    return Evaluation(
        confusions=dict(zip(decoders, confusions, strict=True)),
        images=images,
        left_out=tuple(left_out),
        details={} if data is None else bottleneck.details(data, recipe),
    )


def plan(
    recipe: Recipe,
    rows: pa.Table,
    read: Callable[[pa.Table], dict[str, Any]],
    arguments: dict[str, Any],
) -> Dataset:
    """Return the plan from images to rows of `Count`."""
    size = min(BLOCK_ROWS, recipe.evaluation.batch_size)
    blocks = [rows.slice(start, size) for start in range(0, len(rows), size)]
    with ray_internals.data_context():
        return (
            ray.data.from_arrow(blocks)
            # Asking for memory also keeps Ray from fusing the reading into the actor.
            .map_batches(
                read,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=1,
                memory=parts.read_memory(recipe.dataset.max_pixels),
            )
            .map_batches(
                Count,
                batch_size=recipe.evaluation.batch_size,
                fn_constructor_kwargs=arguments,
                **capacity.encoder_pool(recipe.compute),
            )
        )


def _counted_here(columns: dict[str, Any], count: "Count", batch_size: int) -> Iterator[dict[str, Any]]:
    """Return rows of `Count` for images that have been read, in this process."""
    for start in range(0, len(columns["name"]), batch_size):
        yield count({name: values[start : start + batch_size] for name, values in columns.items()})


class Count:
    """An actor that counts one confusion matrix per decoder, from decoded images and labels."""

    def __init__(self, recipe: Recipe, decoders: list[str], processes: int) -> None:
        self._recipe, self._device = recipe, device.own_device()
        if self._device.type == "cpu":
            use_cores(processes)
        allow_tf32(recipe.encoder, self._device)
        self._models = load_models(recipe, decoders, self._device)
        for model, uri in zip(self._models, decoders, strict=True):
            if not isinstance(model, MaskModel):
                continue
            width, encoder = model.decoder.proj_dec.in_features, model.encode.encoder
            if width != encoder.width:
                raise UserError(
                    f"{storage.shown(uri)} decodes tokens of width {width}, but encoder {recipe.encoder.name} has "
                    f"{encoder.width}: set --encoder.name to the encoder of its training",
                    code="model-mismatch",
                )

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return one row: counts by decoder, number of images, and what was left out, as JSON."""
        classes = self._recipe.classes
        confusions = np.zeros((1, len(self._models), classes, classes), np.int64)
        images, labels = usable(batch)
        if labels:
            averaged = averaged_logits(self._models, torch.from_numpy(images), self._recipe.evaluation)
            for confusion, logits in zip(confusions[0], averaged, strict=True):
                for batch_logits, batch_labels in self._same_size(logits, labels):
                    predicted = all_winners(batch_logits, (batch_labels.shape[1], batch_labels.shape[2]))
                    confusion += batch_confusion(batch_labels, predicted, classes).cpu().numpy()
        left_out = [
            {"name": name, "reason": reason}
            for name, reason in zip(batch["name"], batch["reason"], strict=True)
            if reason
        ]
        return {
            "confusions": confusions,
            "images": np.array([len(labels)]),
            "left_out": np.array([json.dumps(left_out)], object),
        }

    def _same_size(
        self, logits: Float[Tensor, "B C h w"], labels: list[Int16[np.ndarray, "_ _"]]
    ) -> Iterator[tuple[Float[Tensor, "b C h w"], Int16[Tensor, "b H W"]]]:
        """Yield logits and labels of images that are counted together, on the device."""
        # Labels at their own resolution differ in size, and may be large, so they are counted one at a time.
        at_once = 1 if self._recipe.evaluation.protocol == "label" else len(labels)
        for start in range(0, len(labels), at_once):
            some = torch.from_numpy(np.stack(labels[start : start + at_once]))
            yield logits[start : start + at_once], some.to(self._device)


def check_decoder(recipe: Recipe, uri: str) -> None:
    """Raise UserError unless the file at `uri` holds a model of the recipe's method and number of classes."""
    file = read_weights(uri)
    check_method(recipe, file, uri)
    if recipe.method != TRANSFGU:
        return
    tensors = file.tensors
    found = next((t.shape[1] for n, t in tensors.items() if n.endswith("cls_emb") and t.ndim == 3), None)
    if found is None:
        raise UserError(
            f"{storage.shown(uri)} has no mask decoder (no tensor cls_emb): give weights of a decoder",
            code="decoder-missing",
        )
    if found != recipe.classes:
        raise UserError(
            f"{storage.shown(uri)} has {found} classes, but the recipe {recipe.preset} has {recipe.classes}: "
            "choose the preset of its training",
            code="classes-mismatch",
        )
