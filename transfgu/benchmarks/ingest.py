"""Measure how many training samples per second a core reads, from the source that training workers use.

The first epoch fills the node's cache from the files; after a second one, epochs that read the cache are timed. The
results are batches of decoded images (uint8) and packed maps in memory, ready to be copied to a device. There is no
encoder and no Ray.
"""

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from transfgu import datasets
from transfgu.datasets import map_files
from transfgu.datasets.packed_maps import packed_planes
from transfgu.errors import UserError
from transfgu.recipe import Recipe
from transfgu.runtime import parts
from transfgu.store import storage
from transfgu.store.artifacts import Run
from transfgu.training.batches import VERSIONS, Cached, Share, open_cache
from transfgu.training.order import Order

_PHOTOGRAPHS = 32  # number of different photographs; each has many names
_SIDES = ((480, 640), (640, 480), (427, 640), (375, 500))  # heights and widths, as in COCO
_PATCH = 8
_TIMED_SAMPLES = 4096  # at least; with fewer images over several epochs


@dataclass(frozen=True, kw_only=True)
class Ingest:
    """The measurements."""

    preset: str
    images: int
    image_size: tuple[int, int]
    concepts: int
    data: str
    """URI of the images; empty: generated photographs."""
    samples_per_second_per_core: float
    """Of the cached epochs: samples per CPU second of the process."""
    samples_per_second: float
    """Of the cached epochs: samples per second of wall time."""
    first_epoch_samples_per_second_per_core: float
    first_epoch_requests_per_sample: float
    """Files and ranges of files read per sample (image and maps) in the epoch that fills the cache."""
    requests_per_sample: float
    """The same in the cached epochs."""
    bytes_per_sample: int
    """Size of an image and its maps in the cache."""
    peak_rss_bytes: int
    """Peak memory of the process without mapped files, measured after each batch of the cached epochs."""

    def to_json(self) -> str:
        """Return JSON text."""
        return json.dumps(asdict(self), indent=1)


def measure(recipe: Recipe, images: int, batch_size: int | None = None) -> Ingest:
    """Fill a cache in one epoch and time later ones.

    Args:
        recipe: of the preset: sizes, number of concepts, batch size. If it names data, its training images are read,
            otherwise generated photographs. The maps are noise, in parts like those of the pseudo labels.
        images: number of training images.
        batch_size: batch size of a worker; None: that of the recipe.

    Raises:
        UserError: fewer training images than `images`.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        rows = made_rows(recipe, images, Path(folder))
        size = recipe.dataset.training_size
        h, w = (side // _PATCH for side in recipe.dataset.image_size)
        order = Order(images=images, passes=1, batch_size=batch_size or recipe.training.batch_size, seed=recipe.seed)
        maps = (packed_planes(recipe.concepts.count), h, w)
        share = Share(order=order, rows=rows, size=size, maps=maps, rank=0, world=1)
        cache = recipe.compute.cache_folder or str(Path(folder) / "cache")
        compute = replace(recipe.compute, cache_folder=cache, cache_gib=max(1.0, recipe.compute.cache_gib))
        seen = order.steps * order.batch
        timed = range(2, 2 + max(1, _TIMED_SAMPLES // seen))  # after one that fills the cache, and one that reads it
        source = open_cache(share, compute, epochs=timed.stop + 2 * _TIMED_SAMPLES, threads=1)
        if source is None or source.cache.kept < images:
            raise UserError(f"{cache} has no room for {images} samples: give --compute.cache_folder", code="no-room")
        before = storage.reads()
        first, _ = _timed(source, range(1))
        filled = storage.reads()
        _timed(source, range(1, 2))
        started = time.perf_counter()
        cached, peak = _timed(source, timed)
        seconds = time.perf_counter() - started
        source.close()
        read = len(timed) * seen
        return Ingest(
            preset=recipe.preset,
            images=images,
            image_size=size,
            concepts=recipe.concepts.count,
            data=storage.shown(recipe.data),
            samples_per_second_per_core=read / cached,
            samples_per_second=read / seconds,
            first_epoch_samples_per_second_per_core=images / first,
            first_epoch_requests_per_sample=(filled - before) / images,
            requests_per_sample=(storage.reads() - filled) / (read + seen),
            bytes_per_sample=source.cache.layout.sample_bytes,
            peak_rss_bytes=peak,
        )


def _timed(source: Cached, epochs: range) -> tuple[float, int]:
    """Return CPU seconds of this process for some epochs, and its peak memory after a batch.

    The number of prefetched batches is the same before and after.
    """
    started, peak = time.process_time(), 0
    for epoch in epochs:
        for _ in source.epoch(epoch):
            peak = max(peak, _own_memory())
    source.settle()
    return time.process_time() - started, peak


def _own_memory() -> int:
    """Return the memory of this process without mapped files, in bytes; 0 if the system does not report it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def made_rows(recipe: Recipe, images: int, folder: Path) -> pa.Table:
    """Return the table of training images, with generated maps."""
    if recipe.data:
        listed = datasets.list_samples(recipe.with_fields({"limit": images}), "train")["image"].to_pylist()
        if len(listed) < images:
            raise UserError(
                f"{images} training images are required, and {len(listed)} were found: lower --images",
                code="too-few-images",
            )
        uris = listed[:images]
    else:
        uris = write_photographs(folder / "images", images)
    run = Run(str(folder / "run"))
    labels = run.artifact("pseudo_labels").uri
    _write_maps(recipe, labels, images)
    table = map_files.index_maps([u for u in storage.list_files(labels) if u.endswith(".parquet")]).sort_by("index")
    table = table.append_column("image", pa.array(uris, pa.string())).drop_columns("index")
    versions = [version and list(version) for version in storage.versions(uris)]
    return table.replace_schema_metadata({VERSIONS: json.dumps([uris, versions])})


def write_photographs(folder: Path, count: int) -> list[str]:
    """Write photographs of COCO's sizes: smooth colours with some noise, about 100 KB each."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    found = [folder / f"{i:07d}.jpg" for i in range(count)]
    for i, file in enumerate(found):
        if i >= _PHOTOGRAPHS:
            os.link(found[i % _PHOTOGRAPHS], file)
            continue
        height, width = _SIDES[i % len(_SIDES)]
        small = Image.fromarray(generator.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
        smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + generator.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(file, quality=90)
    return [str(file) for file in found]


def _write_maps(recipe: Recipe, folder: str, images: int) -> None:
    h, w = (side // _PATCH for side in recipe.dataset.image_size)
    shape, generator = (packed_planes(recipe.concepts.count), h, w), np.random.default_rng(1)
    at_once = parts.part_size(recipe.dataset.image_size)
    made: dict[str, tuple[int, dict[str, list[int]]]] = {}
    for first in range(0, images, at_once):
        index = range(first, min(first + at_once, images))
        values = [generator.integers(-32768, 32768, shape, np.int16).tobytes() for _ in index]
        columns = {
            "index": pa.array(index, pa.int32()),
            "maps": pa.array(values, pa.binary()),
            "h": pa.array([h] * len(index), pa.int16()),
            "w": pa.array([w] * len(index), pa.int16()),
        }
        summary = parts.Summary(part=first, images=len(index))
        told = parts.write_maps(folder, summary, pa.table(columns), "")["summary"][0].as_py()
        written = parts.Summary.from_json(told)
        made[written.file] = (written.size, dict(written.places))
    map_files.write_index(folder, made)
