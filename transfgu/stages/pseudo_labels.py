"""The same plan as the features': read in tasks, encode in actors, write in tasks; here a row an image.

The maps of the training images are made once and kept, packed to sixteen bits; the decoder's training reads them in
any order. The actor serves any list of samples, so what the maps alone are worth can be scored on validation images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.numpy
from jaxtyping import Float
from ray.data import Dataset

from transfgu.errors import UserError
from transfgu.recipe import Recipe
from transfgu.runtime import parts
from transfgu.runtime.progress import Progress
from transfgu.stages import samples
from transfgu.store import storage
from transfgu.store.artifacts import Outcome, Run


def run(recipe: Recipe, run: Run, progress: Progress) -> Outcome:
    """Make the concept maps of the training images (of the curated ones alone, where the recipe says so).

    Writes parts of rows `index` int32 (of the sample), `maps` (K + 2 planes of h x w int16, row-major, as
    `packed_maps.pack_maps` packs them: `unpack_maps` gives the K unscaled maps), `h` and `w` int16, in row groups of
    one row, so that a reader fetches one image's maps with one request.

    Raises:
        UserError: more bad images than `dataset.max_bad_share`; an encoder that can't be had.
    """
    folder = run.artifact("pseudo_labels").uri
    listed = samples.load(run, "train")
    if recipe.dataset.curated:
        listed = listed.filter(listed["curated"])
    centroids = load_centroids(run)
    summaries, work = parts.complete(
        recipe,
        listed,
        folder,
        parts.part_size(recipe.dataset.image_size),
        lambda missing: plan(recipe, missing, centroids, folder),
        progress,
        lambda part: _work(recipe, centroids, folder).here(part),
    )
    bad = tuple(x for summary in summaries for x in summary.left_out)
    return Outcome(items=len(listed) - len(bad), left_out=bad, details={"concepts": len(centroids), **work})


def load_centroids(run: Run) -> Float[np.ndarray, "K d"]:
    """The run's target concepts."""
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
    """The concept maps of any samples (rows of `datasets.SCHEMA`), as a plan.

    Returns:
        Rows part, index, name, maps, h, w (see :func:`run`), reason (null, or why there are no maps), note.
    """
    from transfgu.runtime import capacity

    work = _work(recipe, centroids, "")
    tables = parts.split(listed, parts.part_size(recipe.dataset.image_size))
    return parts.encoded(tables, work.read, work.actor, work.arguments, capacity.encoder_pool(recipe.compute))


def plan(recipe: Recipe, missing: Sequence[pa.Table], centroids: Float[np.ndarray, "K d"], folder: str) -> Dataset:
    """Parts of the sample list to files in `folder` (URI), a row of the result for each."""
    from transfgu.runtime import capacity

    return _work(recipe, centroids, folder).plan(missing, capacity.encoder_pool(recipe.compute))


def _work(recipe: Recipe, centroids: Float[np.ndarray, "K d"], folder: str) -> parts.Work:
    from transfgu.runtime import capacity

    return parts.Work(
        read=parts.ReadImages(size=recipe.dataset.image_size, interpolation=recipe.dataset.interpolation),
        actor=MapConcepts,
        arguments={"recipe": recipe, "centroids": centroids, "processes": capacity.actors_per_node(recipe.compute)},
        write=WritePseudoLabels(folder=folder),
    )


class MapConcepts:
    """An actor: images to packed concept maps. See :func:`maps_dataset` for the rows that come out."""

    def __init__(self, recipe: Recipe, centroids: Float[np.ndarray, "K d"], processes: int) -> None:
        # Here and not above: the tasks that read and write need no torch, whose import takes seconds.
        import torch

        from transfgu.inference.device import own_device
        from transfgu.inference.frozen_encoder import FrozenEncoder

        device = own_device()
        self._how = recipe.pseudo_labels
        at_once = parts.part_size(recipe.dataset.image_size)
        self._frozen = FrozenEncoder(recipe, device, processes=processes, images_at_once=at_once)
        self._concepts = torch.tensor(centroids, device=device)

    def __call__(self, block: pa.Table) -> pa.Table:
        """A block of `ReadImages` to one of maps."""
        images, pixels = parts.usable(block)
        packed = self._frozen.concept_maps(pixels, self._concepts, self._how)
        images = images.append_column("maps", pa.array([planes.tobytes() for planes in packed], pa.binary()))
        for name, side in zip("hw", packed.shape[2:], strict=True):
            images = images.append_column(name, pa.array([side] * len(images), pa.int16()))
        bad = block.filter(block["reason"].is_valid()).drop_columns("image")
        whole = pa.concat_tables([images, bad], promote_options="default")
        return whole.append_column("note", pa.array([self._frozen.note] * len(whole), pa.string()))


@dataclass(frozen=True, kw_only=True)
class WritePseudoLabels:
    """A task: a part's maps to its file."""

    folder: str

    def __call__(self, block: pa.Table) -> pa.Table:
        """A block of `MapConcepts` to the part's row for the driver."""
        table = block.filter(block["reason"].is_null()).select(["index", "maps", "h", "w"])
        summary = parts.Summary(part=block["part"][0].as_py(), images=len(block), left_out=parts.left_out(block))
        return parts.write_part(
            self.folder,
            summary,
            table,
            block["note"][0].as_py(),
            row_group_size=1,
            use_dictionary=False,
            write_statistics=["index"],
            compression="none",
        )
