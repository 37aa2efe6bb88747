"""The stage "features": encode the windows of each training image as one class token per window.

Tasks read, decode and resize images. Actors find the salient patches, cut the selected windows and encode them, in
batches across the images of a part. Tasks write. Windows exist only in the actor that encodes them, because an image
takes 1.2 MB and its 60 windows 74 MB.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int, UInt8
from ray.data import Dataset

from transfgu.recipe import Recipe
from transfgu.runtime import capacity, parts
from transfgu.runtime.progress import Progress
from transfgu.stages import samples
from transfgu.store.artifacts import Outcome, Run

_PLACE = ("y0", "y1", "x0", "x1")


def run(recipe: Recipe, run: Run, progress: Progress) -> Outcome:
    """Encode the windows of all training images that the recipe keeps.

    Writes parts of rows `index` int32 (of the sample), `y0 y1 x0 x1` int16 (pixels of the image of
    `dataset.feature_size`, half-open), `group` ("foreground", "background" or "all"), `feature` (d,) float32: one row
    per window, ordered by image, group and window.

    Raises:
        UserError: more bad images than `dataset.max_bad_share`; an encoder that is not available.
    """
    folder = run.artifact("features").uri
    listed = samples.load(run, "train")
    summaries, work = parts.complete(
        recipe,
        listed,
        folder,
        parts.part_size(recipe.dataset.feature_size),
        lambda missing: plan(recipe, missing, folder),
        progress,
        lambda part: planned_work(recipe, folder).here(part),
    )
    bad = tuple(x for summary in summaries for x in summary.left_out)
    windows = {group: sum(s.counts[group] for s in summaries) for group in groups(recipe)}
    without = sum(s.counts["images without windows"] for s in summaries)
    kept = [f"{n} {group}" if group != "all" else str(n) for group, n in windows.items()]
    progress.note(f"{', '.join(kept)} windows")
    details: dict[str, Any] = {"windows": windows, "images without windows": without, **work}
    return Outcome(items=len(listed) - len(bad), left_out=bad, details=details)


def groups(recipe: Recipe) -> tuple[str, ...]:
    """Return the groups of windows to keep; background windows only if stuff is clustered from them."""
    if recipe.windows.groups == "both":
        return ("foreground", "background") if recipe.concepts.stuff else ("foreground",)
    return (recipe.windows.groups,)


def plan(recipe: Recipe, missing: Sequence[pa.Table], folder: str) -> Dataset:
    """Return the plan from parts of the sample list to files in `folder` (URI); one row per part returns."""
    return planned_work(recipe, folder).plan(missing, capacity.encoder_pool(recipe.compute))


def planned_work(recipe: Recipe, folder: str) -> parts.Work:
    """Return the operators that compute features and write them to files in `folder` (URI)."""
    return parts.Work(
        read=parts.ReadImages(
            size=recipe.dataset.feature_size,
            interpolation=recipe.dataset.interpolation,
            orient=recipe.dataset.orient,
            max_pixels=recipe.dataset.max_pixels,
        ),
        actor=EncodeWindows,
        arguments={"recipe": recipe, "processes": capacity.actors_per_node(recipe.compute)},
        write=WriteFeatures(folder=folder, groups=groups(recipe)),
    )


class EncodeWindows:
    """An actor that computes the features of images' windows.

    It returns rows part, index, name, reason, group, y0, y1, x0, x1, feature, note: one per window, with name and
    reason null, and one per image without windows, with group null.
    """

    def __init__(self, recipe: Recipe, processes: int) -> None:
        # Imported here, because the reading and writing tasks need no torch, which takes seconds.
        from transfgu.encoder import patch_grid
        from transfgu.inference import device
        from transfgu.inference.frozen_encoder import FrozenEncoder
        from transfgu.windows import sliding_windows

        self._recipe = recipe
        size = recipe.dataset.feature_size
        at_once = parts.part_size(size)
        self.frozen = FrozenEncoder(recipe, device.own_device(), processes=processes, images_at_once=at_once)
        patch = self.frozen.encoder.patch_size
        self._windows = sliding_windows(patch_grid(size, patch), recipe.windows.scales, patch)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Turn a block of `ReadImages` into a block of windows."""
        images, pixels = parts.usable(block)
        rows, kept, kinds = self._chosen(pixels)
        places = self._windows[kept]
        features = self.frozen.window_features(pixels, rows, places, self._recipe.windows.size)
        found = images.select(["part", "index"]).take(rows)
        for name, column in zip(_PLACE, places.T, strict=True):
            found = found.append_column(name, pa.array(column.astype(np.int16)))
        values = pa.array(features.ravel())
        found = found.append_column("feature", pa.FixedSizeListArray.from_arrays(values, features.shape[1]))
        found = found.append_column("group", pa.array(np.array(groups(self._recipe), object)[kinds], pa.string()))
        without = block.filter(pc.invert(pc.is_in(block["index"], found["index"].combine_chunks())))
        without = without.drop_columns("image")
        whole = pa.concat_tables([found, without], promote_options="default")
        return whole.append_column("note", pa.array([self.frozen.note] * len(whole), pa.string()))

    def _chosen(
        self, pixels: UInt8[np.ndarray, "n 3 H W"]
    ) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """Return the windows to keep: the image, the window and the group of each."""
        from transfgu.windows import select_windows

        how, kinds = self._recipe.windows, groups(self._recipe)
        if kinds == ("all",):
            each = np.arange(len(self._windows))
            n = len(pixels)
            return np.repeat(np.arange(n), len(each)), np.tile(each, n), np.zeros(n * len(each), np.int64)
        patch = self.frozen.encoder.patch_size
        chosen = []
        for row, saliency in enumerate(self.frozen.saliency(pixels, times_mean=how.saliency_factor)):
            selected = select_windows(
                self._windows, saliency, patch, min_foreground=how.min_foreground, min_background=how.min_background
            )
            chosen += [(row, window, kind) for kind, windows in enumerate(selected[: len(kinds)]) for window in windows]
        rows, kept, kind_of = np.array(chosen, np.int64).reshape(-1, 3).T
        return rows, kept, kind_of


@dataclass(frozen=True, kw_only=True)
class WriteFeatures:
    """A task that writes the windows of a part to its file."""

    folder: str
    groups: tuple[str, ...]

    def __call__(self, block: pa.Table) -> pa.Table:
        """Write a block of `EncodeWindows`; returns the part's row for the driver."""
        windows = block.filter(block["group"].is_valid())
        without = block.filter(pc.and_(block["group"].is_null(), block["reason"].is_null()))
        counts = {group: pc.sum(pc.equal(windows["group"], group)).as_py() or 0 for group in self.groups}
        summary = parts.Summary(
            part=block["part"][0].as_py(),
            images=pc.count_distinct(block["index"]).as_py(),
            left_out=parts.left_out(block),
            counts={**counts, "images without windows": len(without)},
        )
        table = windows.select(["index", *_PLACE, "group", "feature"])
        # Features are noise to any compression.
        return parts.write_part(
            self.folder, summary, table, block["note"][0].as_py(), compression="none", use_dictionary=["group"]
        )
