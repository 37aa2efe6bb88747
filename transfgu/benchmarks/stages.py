"""Time the real stages on generated images, after a warm-up; a second process times the lower bound.

Two images go through before the timed ones, so that actors, processes and the encoder's memory exist. Some of the timed
images are decoded by then, so as many more images follow them: decoding is equally far ahead when the clock starts and
when it stops. The result is the speed of a long run.
"""

import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import safetensors.torch
import torch
from PIL import Image
from ray.data import Dataset

from transfgu.benchmarks.arithmetic import KMEANS_SEED, Bare, concepts_timing, kmeans_start, made_features, peak_of
from transfgu.datasets import map_files
from transfgu.datasets.packed_maps import packed_planes
from transfgu.decoder import MaskDecoder
from transfgu.encoder import patch_grid, scaled_size
from transfgu.errors import UserError
from transfgu.kmeans import cluster
from transfgu.planning.measurements import Measurements, Timing, in_turns
from transfgu.recipe import Recipe, Size
from transfgu.runtime import capacity as runtime
from transfgu.runtime import parts
from transfgu.runtime.progress import Progress
from transfgu.runtime.threads import in_thread
from transfgu.stages import concepts, evaluation, features, pseudo_labels, samples, training
from transfgu.store import parquet, storage
from transfgu.store.artifacts import Run
from transfgu.training.batches import Share, Streamed
from transfgu.training.order import Order

STAGES = ("features", "concepts", "pseudo-labels", "training", "evaluation")
"""Stages that can be measured."""

_WARM = 2  # images processed before the clock starts
_STEPS = 4  # steps of a training epoch
_PHOTO = (480, 640)  # height and width of the generated images
_SAMPLE_SECONDS = 0.1
_READINGS = 3
_BATCHES = 5  # batches of the evaluation; the clock starts after the first
_INGEST_EPOCHS = 8


def measure(
    recipe: Recipe,
    stages: Sequence[str],
    *,
    images: int,
    repeats: int,
    rows: int,
    unfused: bool = False,
    say: Callable[[str], None] = lambda _: None,
    keep: Callable[[Measurements], None] = lambda _: None,
) -> Measurements:
    """Time stages and their bounds; Ray must be connected.

    Args:
        recipe: of the preset; if it names data, they are read, otherwise images are noise.
        stages: some of `STAGES`.
        images: number of images per turn of a stage, and the batch size of a training step.
        repeats: number of turns of each.
        rows: number of features for K-Means.
        unfused: see `Bare.concept_maps`.
        say: called with the name of each stage before it is measured.
        keep: called with all measurements so far after each stage.

    Raises:
        UserError: no such stage; the encoder is not available.
    """
    for stage in stages:
        if stage not in STAGES:
            raise UserError(
                f"there is no stage {stage} to measure; choose one of {', '.join(STAGES)}, all", code="stage-unknown"
            )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        bench = _Bench(recipe, Path(folder), images, repeats)
        about, costs = ray.get(bench.bare.about.remote()), bench.costs()
        found = Measurements(preset=recipe.preset, encoder=recipe.encoder.name, timings=(), costs=costs, **about)
        for stage in STAGES:
            if stage in stages:
                say(f"{stage} ...")
                timings = bench.timings(stage, rows=rows, unfused=unfused)
                found = replace(found, timings=(*found.timings, *timings))
                keep(found)
        return found


class _Bench:
    """A run on generated images, and the process of the bounds."""

    def __init__(self, recipe: Recipe, folder: Path, images: int, repeats: int) -> None:
        self._images, self._repeats = images, repeats
        self._run = Run(str(folder / "run"))
        needed = max(_WARM + images, _STEPS * images)
        self._recipe = _on_made_images(recipe, folder, needed)
        self.bare = _beside(self._recipe)
        self._width, self._heads, self._patch = ray.get(self.bare.shape.remote())
        samples.run(self._recipe, self._run, Progress("samples", quiet=True))
        self._listed = samples.load(self._run, "train")
        if len(self._listed) < needed:
            raise UserError(
                f"{needed} training images are required, and {len(self._listed)} were found: lower --images",
                code="images-few",
            )

    def timings(self, stage: str, *, rows: int, unfused: bool) -> list[Timing]:
        """Return the lines of a stage."""
        if stage == "features":
            return [self._features()]
        if stage == "concepts":
            return self._concepts(rows)
        if stage == "pseudo-labels":
            return [ray.get(self.bare.concept_maps.remote(self._repeats, unfused=unfused)), self._pseudo_labels()]
        if stage == "training":
            return [ray.get(self.bare.training_step.remote(self._images, self._repeats)), self._training()]
        return [self._evaluation()]

    def costs(self) -> dict[str, float]:
        """Return core seconds of decoding an image for each use, and the bytes of its file."""
        how = self._recipe.dataset
        count = min(16, len(self._listed))
        listed = self._listed.slice(0, count)
        found = {"file bytes": sum(len(storage.read_bytes(u)) for u in listed["image"].to_pylist()) / count}
        for name, size in (
            ("features", how.feature_size),
            ("pseudo-labels", how.image_size),
            ("training", how.training_size),
        ):
            read = parts.ReadImages(
                size=size, interpolation=how.interpolation, orient=how.orient, max_pixels=how.max_pixels
            )
            took = [_seconds(partial(read, listed)) for _ in range(_READINGS)]
            found[f"{name} decoding"] = min(took) / count
        return found

    def _beside_forwards(
        self, stage: str, actor: str, ours: Callable[[], float], work: Callable[[], Mapping[Size, int]]
    ) -> Timing:
        """Time a stage with actors of class `actor`; the bound is the bare forwards in it, so many of each size.

        Each turn of the stage warms up first. `work` is called after the turn, because the turn may determine its
        result.
        """
        flops = 0.0

        def bound() -> float:
            nonlocal flops
            took, flops = ray.get(self.bare.forwards.remote(dict(work())))
            return float(took)

        with _peaks(actor) as peak:
            taken = in_turns(ours, bound, self._repeats, warm=True)
        return Timing(
            stage=stage,
            bound_is="bare forwards: " + ", ".join(f"{n} of {h} x {w}" for (h, w), n in work().items()),
            items=self._images,
            unit="images",
            ours=taken[0],
            bound=taken[1],
            peak_bytes=peak[0],
            flops=flops,
        )

    def _features(self) -> Timing:
        how, folder = self._recipe, self._folder("features")
        counts = dict[str, int]()

        def ours() -> float:
            took, summaries = self._timed(features.plan(how, self._tables(how.dataset.feature_size), folder))
            counts.update({g: sum(s.counts[g] for s in summaries) for g in features.groups(how)})
            return took

        def work() -> Mapping[Size, int]:
            found = Counter({how.windows.size: sum(counts.values())})
            if how.windows.groups != "all":
                found[how.dataset.feature_size] += self._images
            return found

        timing = self._beside_forwards("features", "EncodeWindows", ours, work)
        details = {
            "windows an image": sum(counts.values()) / self._images,
            "bytes an image": self._kept(folder) / self._images,
        }
        return replace(timing, details=details)

    def _concepts(self, rows: int) -> list[Timing]:
        iterations, k = self._recipe.concepts.iterations, self._recipe.concepts.count
        alone: Timing = ray.get(self.bare.concepts.remote(rows, iterations, self._repeats))
        array = made_features(rows, self._width)
        shared, start, inertia = ray.put(array), kmeans_start(array, k), dict[str, float]()
        gpu = ray.cluster_resources().get("GPU", 0) > 0  # the two actors share it
        starting = []

        def ours() -> float:
            started = time.perf_counter()
            with concepts.shards(array, 2) as shards:
                ready = time.perf_counter()
                inertia["ours"] = cluster(shards, k, iterations=iterations, seed=KMEANS_SEED).inertia
                took = time.perf_counter() - ready
            starting.append(ready - started)
            return took

        def bound() -> float:
            took, inertia["FAISS"] = ray.get(self.bare.faiss.remote(shared, start, iterations, gpu=gpu))
            return float(took)

        with _peaks("KMeansActor") as peak:
            turns = in_turns(ours, bound, self._repeats)
        spread = concepts_timing("concepts, two workers", array, iterations, turns, inertia, peak[0])
        return [alone, replace(spread, details={**spread.details, "their start [s]": statistics.median(starting)})]

    def _pseudo_labels(self) -> Timing:
        how, folder = self._recipe, self._folder("pseudo_labels")
        centroids, (height, width) = self._centroids(), how.dataset.image_size
        work = Counter[Size]()
        for scale in how.pseudo_labels.scales:
            work[scaled_size((height, width), scale, self._patch)] += self._images

        def ours() -> float:
            return self._timed(pseudo_labels.plan(how, self._tables((height, width)), centroids, folder))[0]

        timing = self._beside_forwards("pseudo-labels", "MapConcepts", ours, lambda: work)
        details = {
            "bytes an image": self._kept(folder) / self._images,
            "reading [s an image and core]": self._reading(folder),
        }
        return replace(timing, details=details)

    def _training(self) -> Timing:
        """Time epochs with a teacher in Ray Train's worker; the bound is a bare loop, timed before and after."""
        how = self._recipe.with_fields(
            {
                "epochs": self._repeats + 1,
                "training.batch_size": self._images,
                "passes": 1,
                "teacher_start": 1,
                "teacher_every": (1,),
                "compute.workers": 1,
                "compute.resident_gib": 0.0,  # images are not kept, as with a large data set
            }
        )
        folder = self._run.artifact("pseudo_labels").uri
        tables = parts.split(self._listed, parts.part_size(how.dataset.image_size))
        for _ in _rows(pseudo_labels.plan(how, tables, self._centroids(), folder)):
            pass
        table = training.training_images(self._run)
        images = self._run.artifact("training").file("images.parquet")
        parquet.write_table(images, table)
        steps = len(table) // self._images
        bound = [ray.get(self.bare.training_loop.remote(self._images, steps))]
        started = time.perf_counter()
        with _peaks("RayTrainWorker") as peak:
            checkpoint = training.fit(
                how,
                images=images,
                validation="",
                inputs="made",
                folder=self._run.file("ray"),
                progress=Progress("t", quiet=True),
            )
        whole = time.perf_counter() - started
        bound.append(ray.get(self.bare.training_loop.remote(self._images, steps)))
        taken = [row["seconds"] for row in checkpoint.history]
        return Timing(
            stage="training",
            bound_is="a bare loop on data in memory, with a teacher",
            items=steps * self._images,
            unit="images",
            ours=tuple(taken[1:]),
            bound=tuple(bound),
            peak_bytes=peak[0],
            details={"start and end [s]": whole - sum(taken), "ingest alone [images/s]": self._ingest(how, table)},
        )

    def _ingest(self, how: Recipe, table: pa.Table) -> float:
        """Return images per second, decoded anew and with maps, that a worker receives if it does nothing else."""
        h, w = patch_grid(how.dataset.image_size, self._patch)
        share = Share(
            order=Order(images=len(table), passes=1, batch_size=self._images, seed=0),
            rows=table,
            size=how.dataset.training_size,
            maps=(packed_planes(how.concepts.count), h, w),
            rank=0,
            world=1,
            orient=how.dataset.orient,
            max_pixels=how.dataset.max_pixels,
        )
        source = Streamed(share, _INGEST_EPOCHS)
        batches = chain.from_iterable(source.epoch(epoch) for epoch in range(_INGEST_EPOCHS))
        next(batches)  # the stream has started now
        started = time.perf_counter()
        count = sum(len(batch.slots) for batch in batches)
        return count / (time.perf_counter() - started)

    def _evaluation(self) -> Timing:
        how = self._recipe.with_fields({"evaluation.batch_size": self._images})
        decoder = MaskDecoder(self._width, how.classes, num_heads=self._heads, depth=how.decoder.depth)
        weights = self._run.file("decoder.safetensors")
        storage.write_bytes(weights, safetensors.torch.save(decoder.state_dict()))
        rows = samples.labelled(how, self._run)
        if not len(rows):
            raise UserError(
                "evaluation requires labels: leave out --data, or give data with labels", code="labels-missing"
            )
        rows = rows.take(np.arange(_BATCHES * self._images) % len(rows))

        def ours() -> float:
            clock = _Clock()
            evaluation.evaluate(how, {"model": weights}, rows, clock, on_ray=True)
            return (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)

        work = Counter[Size]()
        for scale in how.evaluation.scales:
            work[scaled_size(how.dataset.image_size, scale, self._patch)] += self._images * (1 + how.evaluation.flip)
        timing = self._beside_forwards("evaluation", "Count", ours, lambda: work)
        counting: float = ray.get(self.bare.counting.remote(self._images))
        return replace(timing, details={"counting [images/s]": counting})

    def _tables(self, size: Size) -> list[pa.Table]:
        """Return tables of parts: warm-up images one by one, counted images as the stage divides them, and more."""
        at_once, end = parts.part_size(size), _WARM + self._images
        index = np.arange(end + at_once * parts.ahead(runtime.encoder_pool(self._recipe.compute)), dtype=np.int32)
        listed = self._listed.take(index % len(self._listed))
        listed = listed.set_column(0, listed.schema.field("index"), pa.array(index))
        counting, behind = listed.slice(_WARM, self._images), listed.slice(end)
        return [*parts.split(listed.slice(0, _WARM), 1), *parts.split(counting, at_once), *parts.split(behind, at_once)]

    def _timed(self, data: Dataset) -> tuple[float, list[parts.Summary]]:
        """Return the seconds from the end of the warm-up parts to the end of the counted parts, and their summaries.

        The parts after them are abandoned.
        """
        started, left, summaries = 0.0, self._images, []
        for row in _rows(data):
            summary = parts.Summary.from_json(row["summary"])
            if summary.part < _WARM:
                started = time.perf_counter()
            elif summary.part < _WARM + self._images:
                summaries.append(summary)
                left -= summary.images
                if not left:
                    break
        return time.perf_counter() - started, summaries

    def _folder(self, name: str) -> str:
        return self._run.file(f"timed_{name}")

    def _counted(self, folder: str) -> list[str]:
        """Return the files of the counted parts."""
        first, end = parts.part_file(_WARM), parts.part_file(_WARM + self._images)
        return [uri for uri in storage.list_files(folder) if first <= uri.rpartition("/")[2] < end]

    def _kept(self, folder: str) -> int:
        """Return the total size of the counted parts, in bytes."""
        return sum(len(storage.read_bytes(uri)) for uri in self._counted(folder))

    def _reading(self, folder: str) -> float:
        """Return the seconds in which a core reads the maps of one image."""
        rows = map_files.index_maps(self._counted(folder))
        return statistics.median(_seconds(lambda: map_files.read_maps(rows)) for _ in range(_READINGS)) / len(rows)

    def _centroids(self) -> np.ndarray:
        shape = self._recipe.concepts.count, self._width
        centroids: np.ndarray = np.random.default_rng(0).standard_normal(shape, np.float32)
        return centroids


def _beside(recipe: Recipe) -> Any:
    """Return the handle of the bounds' process, which uses the GPU without reserving it and is idle during a stage."""
    return ray.remote(Bare).options(num_cpus=0).remote(recipe)


def _rows(data: Dataset) -> Iterator[dict[str, Any]]:
    for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()  # type: ignore[union-attr]


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class _Clock(Progress):
    """Records the time of progress reports."""

    def __init__(self) -> None:
        super().__init__("clock", quiet=True)
        self.times: list[float] = []

    def update(self, done: int, total: int | None, unit: str, more: str = "") -> None:
        """Record the time."""
        self.times.append(time.perf_counter())


@contextmanager
def _peaks(name: str) -> Iterator[list[int]]:
    """Yield the peak memory, in bytes, of the largest local Ray process with `name` in its title.

    With a GPU it is the peak of the GPU memory in use by all processes.
    """
    found = [0]

    def look(ended: threading.Event) -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            if torch.cuda.is_available():
                free, total = torch.cuda.mem_get_info()
                found[0] = max(found[0], total - free)
            else:
                found[0] = max([found[0], *(peak_of(process) for process in _processes(name))])

    with in_thread(look, "memory"):
        yield found


def _processes(name: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if title.startswith(b"ray::") and name.encode() in title:
            found.append(int(folder.name))
    return found


def _on_made_images(recipe: Recipe, folder: Path, count: int) -> Recipe:
    """Return the recipe for as many images as needed: its own data, or generated photographs with labels."""
    if recipe.data:
        return recipe.with_fields({"limit": count})
    generator = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        small = generator.integers(0, 256, (_PHOTO[0] // 16, _PHOTO[1] // 16, 3), np.uint8)
        blurred = Image.fromarray(small).resize((_PHOTO[1], _PHOTO[0]), Image.Resampling.BICUBIC)
        blurred.save(folder / "images" / f"{i:06d}.jpg", quality=95)
        label = generator.integers(0, recipe.classes, (_PHOTO[0] // 16, _PHOTO[1] // 16), np.uint8)
        Image.fromarray(label.repeat(16, 0).repeat(16, 1)).save(folder / "labels" / f"{i:06d}.png")
    return recipe.with_fields(
        {
            "dataset.layout": "folder",
            "dataset.classes": "auto",
            "dataset.curated": False,
            "data": str(folder / "images"),
            "labels": str(folder / "labels"),
        }
    )
