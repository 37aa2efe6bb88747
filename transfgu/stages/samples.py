"""The stage "samples": write the list of samples, so that an index means the same image in all later stages.

Scenes of the embedded demonstration are drawn into the run's folder, by tasks of a few scenes each. A scene depends
only on its number, so existing scenes are not drawn again. Images inside Parquet files and tar shards are unpacked
there, too.
"""

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from PIL import Image

from transfgu import datasets, formats
from transfgu.datasets import packed
from transfgu.datasets.images import encoded
from transfgu.datasets.listing import Listing, table
from transfgu.datasets.shapes import scene
from transfgu.errors import LeftOut, UserError
from transfgu.recipe import Recipe
from transfgu.runtime.failures import raises_user_errors
from transfgu.runtime.progress import Progress
from transfgu.store import parquet, storage
from transfgu.store.artifacts import Artifact, Outcome, Run

SCENES = {"train": 200, "validation": 100}
_STREAMS = {"train": "train", "validation": "val"}
_IMAGES = "images"  # the folder of unpacked images, in the artefact
_TASK_SIZE = 10  # scenes; a task takes about a second


def run(recipe: Recipe, run: Run, progress: Progress) -> Outcome:
    """List both splits; with the layout `shapes`, draw the scenes first.

    Writes `samples/train.parquet` and `samples/validation.parquet`, rows of `datasets.SCHEMA`.

    Raises:
        UserError: the data is missing, empty or in another layout, or images or labels are missing for more than
            `dataset.max_bad_share` of a split.
    """
    artifact = run.artifact("samples")
    if recipe.dataset.layout == "shapes":
        listings = _drawn(recipe, artifact, progress)
    else:
        listings, units = listed(recipe)
        if units:
            listings = _unpacked(recipe, units, artifact, progress)
    details: dict[str, Any] = {}
    for split, listing in listings.items():
        bad = listing.left_out
        recipe.dataset.bad_share.check(bad, len(bad) + listing.table.num_rows, f"{split} samples")
        parquet.write_table(artifact.file(f"{split}.parquet"), listing.table)
        details[f"{split} images"] = listing.table.num_rows
        details.update({f"{split} {what}": count for what, count in listing.notes.items() if count})
    labels = listings["validation"].table["label"]
    details["validation labels"] = len(labels) - labels.null_count
    progress.note(", ".join(f"{count} {what}" for what, count in details.items()))
    return Outcome(
        items=sum(x.table.num_rows for x in listings.values()),
        left_out=tuple(x for listing in listings.values() for x in listing.left_out),
        details=details,
    )


def listed(recipe: Recipe) -> tuple[dict[str, Listing], list[packed.Unit]]:
    """List both splits, or the files to unpack first if there is no folder of images.

    If there are image files, Parquet files and tar shards next to them are ignored.

    Raises:
        UserError: no usable image; a damaged file of images, or one without an image column.
    """
    try:
        return _both(recipe), []
    except UserError as error:
        if recipe.dataset.layout != "folder" or error.code != "images-missing":
            raise
        units = packed.units(recipe.data, recipe.limit)
        if not units:
            raise
        return {}, units


def _both(recipe: Recipe) -> dict[str, Listing]:
    with ThreadPoolExecutor(len(datasets.SPLITS)) as pool:
        waiting = {s: pool.submit(datasets.listing, recipe, s) for s in datasets.SPLITS}
        return {split: future.result() for split, future in waiting.items()}


def _unpacked(
    recipe: Recipe, units: Sequence[packed.Unit], artifact: Artifact, progress: Progress
) -> dict[str, Listing]:
    """Unpack images into files of the artefact, several units at a time, and list them.

    Units that an interrupted attempt has recorded are not unpacked again.
    """
    folder, records = artifact.file(_IMAGES), artifact.file("unpacked")
    there = set(storage.list_files(records))
    record_of = {unit.name: storage.absolute(storage.join(records, f"{unit.name}.json")) for unit in units}
    done = sum(unit.count for unit in units if record_of[unit.name] in there)
    total = sum(unit.count for unit in units)
    missing = [unit for unit in units if record_of[unit.name] not in there]
    # Bytes are copied without decoding, so threads of one process are enough to use the storage fully.
    with ThreadPoolExecutor(storage.IN_FLIGHT) as pool:
        for count in pool.map(lambda unit: _unpack(unit, folder, record_of[unit.name]), missing):
            done += count
            progress.update(done, total, "images")
    left_out = [
        LeftOut(**row) for unit in units for row in json.loads(storage.read_bytes(record_of[unit.name]))["left_out"]
    ]
    listings = _both(recipe.with_fields({"data": folder}))
    first = listings["train"]
    return {**listings, "train": dataclasses.replace(first, left_out=(*first.left_out, *left_out))}


def _unpack(unit: packed.Unit, folder: str, record: str) -> int:
    """Unpack a unit, record it, and return the number of its images."""
    left_out = packed.unpack(unit, folder)
    storage.write_bytes(record, json.dumps(formats.stamp({"left_out": [vars(x) for x in left_out]})).encode())
    return unit.count


def labelled(recipe: Recipe, run: Run) -> pa.Table:
    """Return the validation images with labels: `index`, `name`, `image` (URI), `label` (URI)."""
    found = load(run, "validation")
    wanted = pc.is_valid(found["label"])
    if recipe.dataset.curated:
        wanted = pc.and_(wanted, found["curated"])
    return found.filter(wanted).select(["index", "name", "image", "label"])


def training(recipe: Recipe, run: Run) -> pa.Table:
    """Return the training images (only the curated ones, if the recipe is curated): rows of `datasets.SCHEMA`."""
    listed = load(run, "train")
    return listed.filter(listed["curated"]) if recipe.dataset.curated else listed


def load(run: Run, split: str) -> pa.Table:
    """Read the samples of a split ("train" or "validation") of a run: rows of `datasets.SCHEMA`.

    Scenes and unpacked images are in the run's own folder, and are found there if it was copied or moved.
    """
    artifact = run.artifact("samples")
    found = parquet.read(artifact.file(f"{split}.parquet"))
    manifest = artifact.manifest()
    fields = manifest.fields if manifest else {}
    drawn = fields.get("dataset.layout") == "shapes"
    own = "scenes" if drawn else _IMAGES
    here = storage.absolute(artifact.file(own)) + "/"
    if not len(found) or found["image"][0].as_py().startswith(here):
        return found
    inside = f"/samples/{own}/"
    if not drawn and (inside not in found["image"][0].as_py() or not storage.exists(here)):
        return found
    if manifest is None:
        return found
    for column in ("image", "label") if drawn else ("image",):
        moved = pc.replace_substring_regex(found[column], f"^.*{inside}", here)
        found = found.set_column(found.schema.get_field_index(column), found.schema.field(column), moved)
    return found


def _drawn(recipe: Recipe, artifact: Artifact, progress: Progress) -> dict[str, Listing]:
    counts = {split: min(n, recipe.limit or n) for split, n in SCENES.items()}
    folder = artifact.file("scenes")
    there = set(storage.list_files(folder))
    missing = {
        split: [
            i
            for i in range(count)
            if not all(storage.absolute(_scene_file(folder, split, k, i)) in there for k in ("images", "labels"))
        ]
        for split, count in counts.items()
    }
    tasks = [
        (split, indices[start : start + _TASK_SIZE])
        for split, indices in missing.items()
        for start in range(0, len(indices), _TASK_SIZE)
    ]
    total = sum(counts.values())
    done = total - sum(map(len, missing.values()))
    draw = ray.remote(_draw).options(name="draw scenes")
    waiting = [draw.remote(recipe.seed, folder, split, indices) for split, indices in tasks]
    while waiting:
        finished, waiting = ray.wait(waiting)
        with raises_user_errors():
            done += sum(ray.get(finished))
        progress.update(done, total, "scenes")
    return {split: Listing(table=_scenes_table(folder, split, count)) for split, count in counts.items()}


def _scenes_table(folder: str, split: str, count: int) -> pa.Table:
    images, labels = (
        {f"{i:06d}": storage.absolute(_scene_file(folder, split, kind, i)) for i in range(count)}
        for kind in ("images", "labels")
    )
    return table(list(images), images, labels, lambda _: True)


def _scene_file(folder: str, split: str, kind: str, index: int) -> str:
    return storage.join(folder, split, kind, f"{index:06d}.png")


def _draw(seed: int, folder: str, split: str, indices: Sequence[int]) -> int:
    """Draw scenes into `folder`, as a task; returns their number."""
    for index in indices:
        image, label = scene(seed, _STREAMS[split], index)
        for kind, pixels in (("images", image), ("labels", label)):
            storage.write_bytes(_scene_file(folder, split, kind, index), encoded(Image.fromarray(pixels), "PNG"))
    return len(indices)
