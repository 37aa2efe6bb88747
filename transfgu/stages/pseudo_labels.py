"""The stage "pseudo labels": compute the concept maps of the training images, one row per image.

The plan is that of the features: tasks read, actors encode, tasks write. Maps are packed to 16 bits and written once;
training reads them in any order. The actor accepts any list of samples, so the maps of validation images can be scored.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.numpy
from jaxtyping import Bool, Float
from ray.data import Dataset

from transfgu.datasets import images, map_files
from transfgu.datasets.mask_files import find_masks, no_objects
from transfgu.errors import BadInput, UserError
from transfgu.methods import method
from transfgu.recipe import Recipe, Size
from transfgu.runtime import capacity, parts
from transfgu.runtime.progress import Progress
from transfgu.stages import samples
from transfgu.store import storage
from transfgu.store.artifacts import Outcome, Run

if TYPE_CHECKING:
    from transfgu.inference.frozen_encoder import FrozenEncoder

_MASK_CELL = 4  # pixels along a side of the cells in which masks from files are stored


def run(recipe: Recipe, run: Run, progress: Progress) -> Outcome:
    """Compute the concept maps of the training images (only of the curated ones, if the recipe is curated).

    Writes parts of rows `index` int32 (of the sample), `maps` (K + 2 planes of h x w int16, row-major, packed by
    `packed_maps.pack_maps`: `unpack_maps` returns the K unscaled maps), `h` and `w` int16, in row groups of one row, so
    that a reader fetches one image's maps with one request.

    Raises:
        UserError: more bad images than `dataset.max_bad_share`; an encoder that is not available.
    """
    folder = run.artifact("pseudo_labels").uri
    listed = samples.training(recipe, run)
    if method(recipe.method).proposals:
        return _object_masks(recipe, listed, folder, progress)
    centroids = load_centroids(run)
    summaries, work = parts.complete(
        recipe,
        listed,
        folder,
        parts.part_size(recipe.dataset.image_size),
        lambda missing: plan(recipe, missing, centroids, folder),
        progress,
        lambda part: planned_work(recipe, centroids, folder).here(part),
    )
    index_parts(folder, summaries)
    bad = tuple(x for summary in summaries for x in summary.left_out)
    return Outcome(items=len(listed) - len(bad), left_out=bad, details={"concepts": len(centroids), **work})


def index_parts(folder: str, summaries: Sequence[parts.Summary]) -> None:
    """Write the index of the maps' places next to the parts; parts of an earlier attempt are read for it."""

    def found(summary: parts.Summary) -> tuple[int, Mapping[str, Sequence[int]]]:
        if summary.size:
            return summary.size, summary.places
        data = storage.read_bytes(storage.join(folder, summary.file))
        return len(data), map_files.places(data)

    with ThreadPoolExecutor(storage.IN_FLIGHT) as pool:
        names = [summary.file for summary in summaries]
        map_files.write_index(folder, dict(zip(names, pool.map(found, summaries), strict=True)))


def _object_masks(recipe: Recipe, listed: pa.Table, folder: str, progress: Progress) -> Outcome:
    """Compute one object mask per training image, in parts like those of maps, with one plane of 0 and 1.

    Raises:
        UserError: no image has an object; or as :func:`run`.
    """
    uri = recipe.maskcontrast.object_masks
    work = parts.Work(
        read=_reader(recipe),
        actor=MapObjects,
        arguments={
            "recipe": recipe,
            "masks": find_masks(listed, uri) if uri else None,
            "processes": capacity.actors_per_node(recipe.compute),
        },
        write=WritePseudoLabels(folder=folder),
    )
    summaries, details = parts.complete(
        recipe,
        listed,
        folder,
        parts.part_size(recipe.dataset.image_size),
        lambda missing: work.plan(missing, capacity.encoder_pool(recipe.compute)),
        progress,
        work.here,
    )
    index_parts(folder, summaries)
    objects = sum(summary.counts.get("objects", 0) for summary in summaries)
    if not objects:
        raise no_objects(f"any of {len(listed)} images")
    bad = tuple(x for summary in summaries for x in summary.left_out)
    return Outcome(items=len(listed) - len(bad), left_out=bad, details={"images with an object": objects, **details})


def load_centroids(run: Run) -> Float[np.ndarray, "K d"]:
    """Return the target concepts of a run."""
    folder = run.artifact("concepts")
    file = storage.read_bytes(folder.file("concepts.safetensors"))
    try:
        centroids: Float[np.ndarray, "K d"] = safetensors.numpy.load(file)["centroids"]
    except (safetensors.SafetensorError, KeyError):
        raise UserError(
            f"{storage.shown(folder.file('concepts.safetensors'))} is damaged: delete the folder {folder.uri}, and "
            "run again",
            code="artifact-damaged",
        ) from None
    return centroids


def maps_dataset(recipe: Recipe, listed: pa.Table, centroids: Float[np.ndarray, "K d"]) -> Dataset:
    """Return the plan for the concept maps of any samples (rows of `datasets.SCHEMA`).

    Returns:
        Rows part, index, name, maps, h, w (see :func:`run`), reason (null, or why there are no maps), note.
    """
    work = planned_work(recipe, centroids, "")
    tables = parts.split(listed, parts.part_size(recipe.dataset.image_size))
    return parts.encoded(tables, work.read, work.actor, work.arguments, capacity.encoder_pool(recipe.compute))


def plan(recipe: Recipe, missing: Sequence[pa.Table], centroids: Float[np.ndarray, "K d"], folder: str) -> Dataset:
    """Return the plan from parts of the sample list to files in `folder` (URI), with one row per part."""
    return planned_work(recipe, centroids, folder).plan(missing, capacity.encoder_pool(recipe.compute))


def planned_work(recipe: Recipe, centroids: Float[np.ndarray, "K d"], folder: str) -> parts.Work:
    """Return the operators that compute concept maps and write them to files in `folder` (URI)."""
    return parts.Work(
        read=_reader(recipe),
        actor=MapConcepts,
        arguments={"recipe": recipe, "centroids": centroids, "processes": capacity.actors_per_node(recipe.compute)},
        write=WritePseudoLabels(folder=folder),
    )


def _reader(recipe: Recipe) -> parts.ReadImages:
    dataset = recipe.dataset
    return parts.ReadImages(
        size=dataset.image_size,
        interpolation=dataset.interpolation,
        orient=dataset.orient,
        max_pixels=dataset.max_pixels,
    )


class MapConcepts:
    """An actor that computes packed concept maps of images. See :func:`maps_dataset` for its rows."""

    def __init__(self, recipe: Recipe, centroids: Float[np.ndarray, "K d"], processes: int) -> None:
        import torch

        self._how = recipe.pseudo_labels
        self.frozen = _frozen_encoder(recipe, processes)
        self._concepts = torch.tensor(centroids, device=self.frozen.device)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Turn a block of `ReadImages` into a block of maps."""
        images, pixels = parts.usable(block)
        packed = self.frozen.concept_maps(pixels, self._concepts, self._how)
        images = images.append_column("maps", pa.array([planes.tobytes() for planes in packed], pa.binary()))
        for name, side in zip("hw", packed.shape[2:], strict=True):
            images = images.append_column(name, pa.array([side] * len(images), pa.int16()))
        bad = block.filter(block["reason"].is_valid()).drop_columns("image")
        whole = pa.concat_tables([images, bad], promote_options="default")
        return whole.append_column("note", pa.array([self.frozen.note] * len(whole), pa.string()))


def _frozen_encoder(recipe: Recipe, processes: int) -> "FrozenEncoder":
    # Imported here, because the reading and writing tasks need no torch, which takes seconds.
    from transfgu.inference.device import own_device
    from transfgu.inference.frozen_encoder import FrozenEncoder

    at_once = parts.part_size(recipe.dataset.image_size)
    return FrozenEncoder(recipe, own_device(), processes=processes, images_at_once=at_once)


class MapObjects:
    """An actor that computes object masks of images, from the encoder's class attention or from files."""

    def __init__(self, recipe: Recipe, masks: Mapping[str, str] | None, processes: int) -> None:
        """Set the masks: URIs by sample name, or None for masks from the attention."""
        self._recipe, self._masks = recipe, masks
        self.frozen = _frozen_encoder(recipe, processes) if masks is None else None

    def __call__(self, block: pa.Table) -> pa.Table:
        """Turn a block of `ReadImages` into one of masks, with `objects`: 1 if the mask has a pixel."""
        rows, pixels = parts.usable(block)
        reasons: list[str | None] = [None] * len(rows)
        if self.frozen:
            masks = self.frozen.saliency(pixels, times_mean=self._recipe.windows.saliency_factor)
        else:
            height, width = (max(1, side // _MASK_CELL) for side in self._recipe.dataset.image_size)
            masks = np.zeros((len(rows), height, width), bool)
            for i, name in enumerate(rows["name"].to_pylist()):
                try:
                    masks[i] = self._read(name, (height, width))
                except BadInput as error:
                    reasons[i] = str(error)
        planes = pa.array([mask.astype(np.int16).tobytes() for mask in masks], pa.binary())
        made = rows.append_column("maps", planes).append_column("objects", pa.array([int(m.any()) for m in masks]))
        for name, side in zip("hw", masks.shape[1:], strict=True):
            made = made.append_column(name, pa.array([side] * len(made), pa.int16()))
        made = made.set_column(made.column_names.index("reason"), "reason", pa.array(reasons, pa.string()))
        bad = block.filter(block["reason"].is_valid()).drop_columns("image")
        whole = pa.concat_tables([made, bad], promote_options="default")
        note = self.frozen.note if self.frozen else ""
        return whole.append_column("note", pa.array([note] * len(whole), pa.string()))

    def _read(self, name: str, size: Size) -> Bool[np.ndarray, "h w"]:
        assert self._masks is not None
        if name not in self._masks:
            raise BadInput("missing mask")
        mask: Bool[np.ndarray, "h w"] = images.resize_label(images.read_mask(self._masks[name]), size) > 0
        return mask


@dataclass(frozen=True, kw_only=True)
class WritePseudoLabels:
    """A task that writes the maps of a part to its file."""

    folder: str

    def __call__(self, block: pa.Table) -> pa.Table:
        """Write a block of `MapConcepts` or `MapObjects`; returns the part's row for the driver."""
        good = block.filter(block["reason"].is_null())
        table = good.select(["index", "maps", "h", "w"])
        counts = {"objects": sum(good["objects"].to_pylist())} if "objects" in good.column_names else {}
        summary = parts.Summary(
            part=block["part"][0].as_py(), images=len(block), left_out=parts.left_out(block), counts=counts
        )
        return parts.write_maps(self.folder, summary, table, block["note"][0].as_py())
