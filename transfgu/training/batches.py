"""A training worker reads for itself: CPU tasks decode its rows ahead of it, in its order, wherever there are CPUs.

Nothing is split or shuffled by Ray Data, which would tie the batches to the number of workers; a stream is told its
rows in order. A data set that is small once decoded is read once and stays in the worker's memory; any other passes
by, one stream for several epochs where epochs are short, and memory does not grow with it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import ray
import torch
from jaxtyping import Int, Int16, Shaped
from ray.data import DataContext, ExecutionResources
from torch import Tensor

from transfgu.datasets.rows import read_training_rows
from transfgu.learner import Batch
from transfgu.recipe import Size
from transfgu.training.order import Order

_BLOCK_ROWS = 32  # rows that one task decodes: 10 MB of 320 x 320
_STREAM_ROWS = 4096  # a stream takes a second to start: epochs of fewer rows share one
_AHEAD_BYTES = 1 << 30  # decoded rows that may wait in the object store for one worker


@runtime_checkable
class Source(Protocol):
    """Where a worker's batches come from."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The worker's share of each of an epoch's global batches."""
        ...


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which rows of an order are this worker's, and what is decoded of each."""

    order: Order
    rows: pa.Table
    """The images by position: `image`, `part`, `row`."""
    size: Size
    maps: tuple[int, int, int]
    """Planes (K + 2), h, w of an image's packed maps."""
    rank: int
    world: int
    read_rows: Callable[[pa.Table], dict[str, Any]] | None = None
    """From rows to columns `image`, `maps` and the others passed on; None: `read_training_rows` at `size`."""

    def slots(self, epoch: int) -> Int[np.ndarray, "steps B"]:
        """The worker's slots of each of an epoch's global batches."""
        return self.order.share(epoch, self.rank, self.world)

    @property
    def bytes(self) -> int:
        """What all images and maps take in memory, once decoded."""
        return len(self.rows) * (3 * self.size[0] * self.size[1] + 2 * int(np.prod(self.maps)))

    def read(self, slots: Int[np.ndarray, " n"], batch_size: int) -> Iterator[Batch]:
        """Decoded slots in their order, a batch at a time."""
        rows = self.rows.take(slots % self.order.images).append_column("slot", pa.array(slots))
        read = self.read_rows or partial(read_training_rows, size=self.size)
        for columns in stream(rows, read, batch_size, world=self.world):
            # Copied: arrays out of Ray's object store are read-only, which torch warns of.
            yield Batch(columns["slot"], torch.tensor(columns["image"]), torch.tensor(columns["maps"]))


def stream(
    rows: pa.Table, read: Callable[[pa.Table], dict[str, Any]], batch_size: int, *, world: int
) -> Iterator[dict[str, np.ndarray]]:
    """Rows in their order, `batch_size` at a time, through `read` in CPU tasks; what is one block, in this process.

    Args:
        rows: what `read` needs, a row each.
        read: from a block of rows to columns of as many.
        batch_size: rows at a time; the last may be fewer.
        world: workers that read at the same time, and share the cluster's memory for objects.
    """
    if len(rows) <= _BLOCK_ROWS:  # a plan takes two seconds to start
        columns = read(rows)
        for start in range(0, len(rows), batch_size):
            yield {name: values[start : start + batch_size] for name, values in columns.items()}
        return
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    # An exception of ours should arrive as it was raised.
    context.raise_original_map_exception = True
    context.execution_options.preserve_order = True
    store = ray.cluster_resources().get("object_store_memory", _AHEAD_BYTES)
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=min(_AHEAD_BYTES, store / (2 * world))
    )
    blocks = [rows.slice(start, _BLOCK_ROWS) for start in range(0, len(rows), _BLOCK_ROWS)]
    with DataContext.current(context):
        data = ray.data.from_arrow(blocks).map_batches(read, batch_size=None, batch_format="pyarrow", num_cpus=1)
    yield from data.iter_batches(batch_size=batch_size, batch_format="numpy", prefetch_batches=2)


class Streamed:
    """Batches of a data set of any size, decoded anew each time they are seen."""

    def __init__(self, share: Share, epochs: int) -> None:
        """`epochs` is how many there are in all, where reading ahead ends."""
        self._share = share
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
        at_once = -(-_STREAM_ROWS // max(1, steps * rows))
        for first in range(epoch, self._epochs, at_once):
            slots = [share.slots(e) for e in range(first, min(first + at_once, self._epochs))]
            if rows:
                yield from share.read(np.concatenate(slots).ravel(), rows)
            else:
                yield from (_nothing(share) for _ in range(steps * len(slots)))


class Resident:
    """Batches of a small data set, decoded once."""

    def __init__(self, share: Share, inputs: Shaped[Tensor, "n ..."], maps: Int16[Tensor, "n planes h w"]) -> None:
        """Images and maps by position, as :func:`load` gives them, or what was made of the images."""
        self._share, self._inputs, self._maps = share, inputs, maps

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """See `Source`."""
        for slots in self._share.slots(epoch):
            positions = torch.from_numpy(slots % self._share.order.images)
            yield Batch(slots, self._inputs[positions], self._maps[positions])


def load(
    share: Share, transform: Callable[[Tensor], Tensor], batch_size: int
) -> tuple[Shaped[Tensor, "n ..."], Int16[Tensor, "n planes h w"]]:
    """Every image by position, through `transform` a batch at a time, and its maps."""
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
