"""Read a training worker's batches, from memory, from the node's cache, or from storage by CPU tasks.

Ray Data neither splits nor shuffles, because batches would then depend on the number of workers: a stream gets its rows
in order. In the first epoch the worker's threads decode samples that the node has not cached yet; later epochs copy
them from the cache (`transfgu.datasets.sample_cache`). Without a cache, tasks on any CPU of the cluster decode rows
ahead of the worker. One stream serves several epochs if epochs are short, and memory does not grow with the data set.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import ray
import torch
from jaxtyping import Int, Int16, Shaped
from torch import Tensor

from transfgu.datasets.map_files import read_maps
from transfgu.datasets.rows import read_training_rows, training_image
from transfgu.datasets.sample_cache import Layout, SampleCache, default_folder
from transfgu.errors import UserError
from transfgu.learner import Batch
from transfgu.recipe import MAX_PIXELS, ComputeRecipe, Recipe, Size
from transfgu.runtime.parts import read_memory
from transfgu.runtime.ray_internals import data_context
from transfgu.store import storage
from transfgu.training.order import Order

logger = logging.getLogger(__name__)

_AHEAD_BYTES = 1 << 30  # decoded rows that may wait in the object store for one worker
_BATCHES_AHEAD = 2  # number of batches read from the cache ahead of the current one

BLOCK_ROWS = 32
"""Rows that one task decodes: 10 MB of 320 x 320."""

STREAM_ROWS = 4096
"""Minimum number of rows of a stream, if there are as many: a stream takes a second to start."""

VERSIONS = b"transfgu.versions"
"""Key in the metadata of a table of training images: digest of the versions of all its files."""


@runtime_checkable
class Source(Protocol):
    """A source of a worker's batches."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the worker's share of each global batch of an epoch."""
        ...


@dataclass(frozen=True, kw_only=True)
class Share:
    """A worker's rows of an order, and how they are decoded."""

    order: Order
    rows: pa.Table
    """The images by position: `image`, `part`, `row`."""
    size: Size
    maps: tuple[int, int, int]
    """Planes (K + 2), h, w of an image's packed maps."""
    rank: int
    world: int
    orient: bool = False
    """Apply EXIF's orientation."""
    max_pixels: int = MAX_PIXELS
    """Maximum size of an image, pixels."""
    read_rows: Callable[[pa.Table], dict[str, Any]] | None = None
    """From rows to columns `image`, `maps` and the others passed on; None: `read_training_rows` at `size`."""

    def slots(self, epoch: int) -> Int[np.ndarray, "steps B"]:
        """Return the worker's slots of each global batch of an epoch."""
        return self.order.share(epoch, self.rank, self.world)

    @property
    def bytes(self) -> int:
        """The memory of all decoded images and maps, in bytes."""
        return len(self.rows) * (3 * self.size[0] * self.size[1] + 2 * int(np.prod(self.maps)))

    def read(self, slots: Int[np.ndarray, " n"], batch_size: int, block_rows: int = BLOCK_ROWS) -> Iterator[Batch]:
        """Decode the samples of slots, in their order, a batch at a time; a task decodes `block_rows`."""
        rows = self.rows.take(slots % self.order.images).append_column("slot", pa.array(slots))
        read = self.read_rows or partial(
            read_training_rows, size=self.size, orient=self.orient, max_pixels=self.max_pixels
        )
        decoded = stream(rows, read, batch_size, world=self.world, max_pixels=self.max_pixels, block_rows=block_rows)
        for columns in decoded:
            # Copied: arrays out of Ray's object store are read-only, which torch warns of.
            yield Batch(columns["slot"], torch.tensor(columns["image"]), torch.tensor(columns["maps"]))


def stream(
    rows: pa.Table,
    read: Callable[[pa.Table], dict[str, Any]],
    batch_size: int,
    *,
    world: int,
    max_pixels: int,
    block_rows: int = BLOCK_ROWS,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield rows in their order, `batch_size` at a time, read in CPU tasks; a single block is read in this process.

    Args:
        rows: what `read` needs, a row each.
        read: from a block of rows to columns of as many.
        batch_size: rows at a time; the last may be fewer.
        world: workers that read at the same time, and share the cluster's memory for objects.
        max_pixels: maximum size of an image that `read` decodes; its tasks ask Ray for the memory of one.
        block_rows: rows that one task reads.
    """
    if len(rows) <= block_rows:  # a plan takes two seconds to start
        columns = read(rows)
        for start in range(0, len(rows), batch_size):
            yield {name: values[start : start + batch_size] for name, values in columns.items()}
        return
    store = ray.cluster_resources().get("object_store_memory", _AHEAD_BYTES)
    blocks = [rows.slice(start, block_rows) for start in range(0, len(rows), block_rows)]
    with data_context(preserve_order=True, store_bytes=min(_AHEAD_BYTES, store / (2 * world))):
        data = ray.data.from_arrow(blocks).map_batches(
            read, batch_size=None, batch_format="pyarrow", num_cpus=1, memory=read_memory(max_pixels)
        )
    yield from data.iter_batches(batch_size=batch_size, batch_format="numpy", prefetch_batches=2)


class Streamed:
    """Batches of a data set of any size, decoded again in each epoch."""

    def __init__(
        self, share: Share, epochs: int, *, stream_rows: int = STREAM_ROWS, block_rows: int = BLOCK_ROWS
    ) -> None:
        """Read nothing yet.

        Args:
            share: which rows are this worker's.
            epochs: number of all epochs, where reading ahead ends.
            stream_rows: rows of a stream at least, where there are as many.
            block_rows: rows that one task decodes.
        """
        self._share, self._stream_rows, self._block_rows = share, stream_rows, block_rows
        self._epochs = epochs
        self._next = -1
        self._batches: Iterator[Batch] = iter(())

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """See `Source`; epochs follow one another without a pause."""
        if epoch != self._next:
            self._batches = self._from(epoch)
        self._next = epoch + 1
        for _ in range(self._share.order.steps):
            yield next(self._batches)

    def _from(self, epoch: int) -> Iterator[Batch]:
        share = self._share
        steps, rows = share.slots(epoch).shape
        at_once = -(-self._stream_rows // max(1, steps * rows))
        for first in range(epoch, self._epochs, at_once):
            slots = [share.slots(e) for e in range(first, min(first + at_once, self._epochs))]
            if rows:
                yield from share.read(np.concatenate(slots).ravel(), rows, self._block_rows)
            else:
                yield from (_nothing(share) for _ in range(steps * len(slots)))


class Cached:
    """Batches from the node's cache, which adds missing samples; the next batches are read ahead."""

    def __init__(self, share: Share, cache: SampleCache, epochs: int, threads: int) -> None:
        """Set up the source for `epochs` epochs in total, with `threads` threads that read and decode."""
        self.share, self.cache, self._epochs, self._threads = share, cache, epochs, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="samples")
        self._ahead: deque[tuple[tuple[int, int], Batch, list[Future[None]]]] = deque()
        self._uris: list[str] = share.rows["image"].to_pylist()
        self._parts, self._of_part = _positions_by_part(share.rows)
        self._filling: list[threading.Thread] = []

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """See `Source`."""
        for key in [(epoch, step) for step in range(self.share.order.steps)]:
            self._read_ahead(key)
            _, batch, reading = self._ahead.popleft()
            for future in reading:
                future.result()
            yield batch
        if not self._filling:
            self._fill()
        self._pool.submit(self.cache.seal)

    def settle(self) -> None:
        """Wait until the next batches are read and, after an epoch, the cache has all samples that fit."""
        for thread in self._filling:
            thread.join()
        for _, _, reading in self._ahead:
            wait(reading)

    def close(self) -> None:
        """Stop reading ahead, and close the cache; the batches of an epoch have been taken."""
        self._pool.shutdown(cancel_futures=True)
        self.settle()
        self.cache.close()

    def _read_ahead(self, first: tuple[int, int]) -> None:
        """Start reading the batches from `first` (epoch and step) on."""
        steps = self.share.order.steps
        while self._ahead and self._ahead[0][0] != first:
            self._ahead.popleft()
        number = first[0] * steps + first[1] + len(self._ahead)
        while len(self._ahead) <= _BATCHES_AHEAD and number < self._epochs * steps:
            epoch, step = divmod(number, steps)
            if self._slots_of != epoch:
                self._slots, self._slots_of = self.share.slots(epoch), epoch
            self._ahead.append(((epoch, step), *self._begin(self._slots[step])))
            number += 1

    _slots: Int[np.ndarray, "steps B"]
    _slots_of = -1

    def _begin(self, slots: Int[np.ndarray, " B"]) -> tuple[Batch, list[Future[None]]]:
        """Return a batch whose images and maps are complete when the futures have results."""
        share = self.share
        batch = Batch(
            slots,
            torch.empty(len(slots), 3, *share.size, dtype=torch.uint8),
            torch.empty(len(slots), *share.maps, dtype=torch.int16),
        )
        images, maps = batch.inputs.numpy(), batch.maps.numpy()
        positions = slots % share.order.images
        there = self.cache.has(positions)

        def copy() -> None:
            for place in np.flatnonzero(there):
                self.cache.read(int(positions[place]), images[place], maps[place])

        def obtain(place: int) -> None:
            self._obtain(int(positions[place]), images[place], maps[place])

        reading = [self._pool.submit(copy)] if there.any() else []
        return batch, reading + [self._pool.submit(obtain, place) for place in np.flatnonzero(~there).tolist()]

    def _obtain(self, position: int, image: Any, maps: Any) -> None:
        """Read a sample that is not in the cache, and store it there."""
        uri, share = self._uris[position], self.share

        def decode() -> Any:
            data = storage.read_bytes_or_none(uri)
            return training_image(uri, data, share.size, orient=share.orient, max_pixels=share.max_pixels)

        self.cache.image(position, image, decode)
        part = int(self._parts[position])
        others = self._of_part[part] if position < self.cache.kept else np.array([position])
        self.cache.maps(position, maps, part, others, lambda: read_maps(self.share.rows.take(others)))

    def _fill(self) -> None:
        """Let threads read samples that no batch of the first epoch had: its rest, and samples of other nodes."""
        every = np.arange(self.cache.kept)
        missing = every[~self.cache.has(every)]
        # Workers of a node share the work: each starts at another position, and skips finished samples.
        turned = np.roll(missing, -(len(missing) * self.share.rank // max(1, self.share.world)))
        left = iter(turned.tolist())
        lock = threading.Lock()

        def work() -> None:
            share = self.share
            image, maps = np.empty((3, *share.size), np.uint8), np.empty(share.maps, np.int16)
            while True:
                with lock:
                    position = next(left, None)
                if position is None:
                    return
                if not self.cache.has(np.array([position])).all():
                    try:
                        self._obtain(position, image, maps)
                    except UserError:
                        return  # the error is raised when that image is needed

        self._filling = [threading.Thread(target=work, daemon=True) for _ in range(self._threads)]
        for thread in self._filling:
            thread.start()


def open_cache(share: Share, compute: ComputeRecipe, epochs: int, threads: int | None = None) -> Cached | None:
    """Return batches through the node's cache; None if the recipe turns it off, or the node has no space for it.

    Args:
        share: its table of images must name its versions (:data:`VERSIONS`), otherwise None is returned.
        compute: settings with the folder and size of the cache.
        epochs: total number of epochs.
        threads: number of threads that read and decode; None: one per core, divided among the node's workers.
    """
    key = (share.rows.schema.metadata or {}).get(VERSIONS)
    if not key or not compute.cache_gib:
        return None
    layout = Layout(
        key=f"{key.decode()} {share.size} {share.maps} bilinear {'oriented' if share.orient else 'stored'}",
        samples=len(share.rows),
        image_bytes=3 * share.size[0] * share.size[1],
        maps_bytes=2 * int(np.prod(share.maps)),
    )
    folder = compute.cache_folder or default_folder()
    try:
        cache = SampleCache(folder, layout, int(compute.cache_gib * 2**30))
    except OSError as error:
        logger.warning("no cache of images in %s (%s): they are read again in every epoch", folder, error.strerror)
        return None
    if cache.kept < layout.samples:
        logger.warning(
            "%s has room for %d of %d images: the others are read again in every epoch; free space there, set "
            "--compute.cache_folder to a larger disk, or raise --compute.cache_gib from %g",
            *(folder, cache.kept, layout.samples, compute.cache_gib),
        )
    if not cache.kept:
        cache.close()
        return None
    return Cached(share, cache, epochs, threads or _threads())


def cache_text(recipe: Recipe, rows: pa.Table) -> str:
    """Return a line about the nodes' caches for the user; empty if there will be none.

    Args:
        recipe: recipe of the training.
        rows: the table of training images.
    """
    compute = recipe.compute
    maps = rows["bytes"].slice(0, 1).to_pylist() if "bytes" in rows.column_names else []
    needed = len(rows) * (3 * int(np.prod(recipe.dataset.training_size)) + max([0, *maps])) / 2**30
    # Small sets stay in memory.
    if needed <= compute.resident_gib or not compute.cache_gib or VERSIONS not in (rows.schema.metadata or {}):
        return ""
    return (
        f"each node keeps decoded images and their maps, {needed:.2g} GiB, in "
        f"{compute.cache_folder or default_folder()} (all caches together at most {compute.cache_gib:g} GiB: "
        "--compute.cache_gib)"
    )


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import ray.train

        workers = int(ray.train.get_context().get_local_world_size())
    except RuntimeError:  # outside of Ray Train
        workers = 1
    return max(2, cores // workers)


def _positions_by_part(rows: pa.Table) -> tuple[Int[np.ndarray, " n"], list[Int[np.ndarray, " m"]]]:
    """Return the number of each image's part, and the positions of each part's images."""
    if "part" not in rows.column_names:
        return np.zeros(len(rows), int), [np.empty(0, int)]
    _, numbers = np.unique(rows["part"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    order = np.argsort(numbers, kind="stable")
    return numbers, np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)


class Resident:
    """Batches of a small data set, decoded once."""

    def __init__(self, share: Share, inputs: Shaped[Tensor, "n ..."], maps: Int16[Tensor, "n planes h w"]) -> None:
        """Set images and maps by position, as returned by :func:`load`, or with transformed images."""
        self._share, self._inputs, self._maps = share, inputs, maps

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """See `Source`."""
        for slots in self._share.slots(epoch):
            positions = torch.from_numpy(slots % self._share.order.images)
            yield Batch(slots, self._inputs[positions], self._maps[positions])


def load(
    share: Share, transform: Callable[[Tensor], Tensor], batch_size: int
) -> tuple[Shaped[Tensor, "n ..."], Int16[Tensor, "n planes h w"]]:
    """Return every image by position, passed through `transform` in batches, and its maps."""
    inputs = torch.empty(0)
    maps = torch.empty(len(share.rows), *share.maps, dtype=torch.int16)
    for batch in share.read(np.arange(len(share.rows)), batch_size):
        made = transform(batch.inputs)
        if not len(inputs):
            inputs = torch.empty(len(share.rows), *made.shape[1:], dtype=made.dtype)
        places = torch.tensor(batch.slots)
        inputs[places], maps[places] = made.cpu(), batch.maps
    return inputs, maps


def _nothing(share: Share) -> Batch:
    return Batch(
        np.empty(0, np.int64),
        torch.empty(0, 3, *share.size, dtype=torch.uint8),
        torch.empty(0, *share.maps, dtype=torch.int16),
    )
