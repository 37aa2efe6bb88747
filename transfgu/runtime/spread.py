"""Cluster rows that are spread over actors: only centroids and sums travel, whatever the number of rows.

Each actor reads its own shard. Each iteration sends it K x d centroids and takes back K x d sums. One actor per node is
started (on large nodes a few), because threads share the node's cores; on nodes with GPUs, one per GPU.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from jaxtyping import Float32, Int
from numpy import ndarray

from transfgu.errors import UserError
from transfgu.inference.shards import PLACE, KMeansActor, Rows, Source, matrix, nearest_windows
from transfgu.kmeans import CHUNK, START_NUMBERS, Assignment, Grid, Shards, cores, least, means
from transfgu.runtime import capacity, connect
from transfgu.runtime.failures import raises_user_errors
from transfgu.whitening import Moments, Whitening

ALL = "all"
"""Name of the rows if there is a single group."""

ADDED_AT_ONCE = 8
"""Passes added by one task; each has as many numbers as the centroids."""

_SHARD_BYTES = 256 << 20  # below this, starting another actor costs more than it saves
_THREADS = 8  # maximum number of threads per actor: more would wait for Python's lock
_HELD = 1.3  # bytes in memory per byte of a shard's files


class SpreadShards(Shards):
    """Rows of one group on several actors, which `cluster` works on as if they were one shard."""

    def __init__(
        self,
        actors: Sequence[Any],
        group: str,
        whitening: Any = None,
        before: "SpreadShards | None" = None,
        added_at_once: int = ADDED_AT_ONCE,
    ) -> None:
        """Measure the rows of all actors.

        Args:
            actors: handles of `KMeansActor`.
            group: name of the rows.
            whitening: reference to a `Whitening` for the rows of `before`, if these are to be whitened.
            before: the same rows, not whitened.
            added_at_once: passes that one task adds up; as many at most are fetched by this process.
        """
        self._added_at_once = added_at_once
        self._actors, self._group, self._whitening, self._before = actors, group, whitening, before
        # Tasks, not calls of the actors: those run in order, and a restarted one may have to assign before it adds.
        self._add = ray.remote(num_cpus=0)(_added)
        measures = fetch([a.measure.remote(group, whitening) for a in actors])
        self._bounds = np.cumsum([0, *(rows for rows, _ in measures)])
        self.rows = int(self._bounds[-1])
        self.largest = float(np.max([largest for _, largest in measures]))  # keeps NaN

    def best_start(self, rows: Int[ndarray, " n"], k: int, seed: int) -> Float32[ndarray, "k d"]:
        """Return the best start; starts are divided among actors, and the sample goes from actor to actor directly."""
        samples = self._taken(rows)
        busy = self._actors[: len(START_NUMBERS)]
        shares = [s.tolist() for s in np.array_split(START_NUMBERS, len(busy))]
        found = fetch([a.starts.remote(k, seed, share, *samples) for a, share in zip(busy, shares, strict=True)])
        return least([start for several in found for start in several])

    def take(self, rows: Int[ndarray, " n"]) -> Float32[ndarray, "n d"]:
        """Fetch the rows with these numbers, from the actors that have them."""
        order = np.argsort(rows)
        taken = np.concatenate([t for t in fetch(self._taken(rows[order])) if t is not None])
        return taken[np.argsort(order)]

    def _taken(self, rows: Int[ndarray, " n"]) -> list[Any]:
        """Return references to each actor's share of these rows, whose numbers ascend."""
        cuts = np.searchsorted(rows, self._bounds[1:-1])
        own = [r - first for r, first in zip(np.split(rows, cuts), self._bounds[:-1], strict=True)]
        return [a.take.remote(self._group, r, self._whitening) for a, r in zip(self._actors, own, strict=True)]

    def assign(self, centroids: Float32[ndarray, "k d"], grid: Grid) -> Assignment:
        """Run one pass over all rows."""
        reference = ray.put(centroids)
        passes = [a.assign.remote(self._group, reference, grid, self._whitening) for a in self._actors]
        while len(passes) > self._added_at_once:  # this process fetches the rest
            step = self._added_at_once
            groups = [passes[i : i + step] for i in range(0, len(passes), step)]
            passes = [self._add.remote(*group) for group in groups]
        return _added(*fetch(passes))

    def moments(self, step: float) -> Moments:
        """Return the sums over all rows from which a whitening is computed."""
        found = fetch([a.moments.remote(self._group, step) for a in self._actors])
        total: Moments = functools.reduce(Moments.__add__, [m for m in found if m is not None])
        return total

    def whitened(self, whitening: Whitening) -> "SpreadShards":
        """Return the rows whitened and of unit length; actors also keep the original ones."""
        return SpreadShards(self._actors, self._group, ray.put(whitening), self, self._added_at_once)

    def means_before(self, centroids: Float32[ndarray, "k d"]) -> Float32[ndarray, "k d"]:
        """For whitened rows: return the mean, before whitening, of the rows nearest to each centroid."""
        before = self._before
        assert before is not None
        grids = Grid(self.rows, self.largest), Grid(before.rows, before.largest)
        found = fetch([a.sums_before.remote(self._group, centroids, *grids, self._whitening) for a in self._actors])
        sums, counts = zip(*found, strict=True)
        return means(np.sum(sums, axis=0), np.sum(counts, axis=0))

    def nearest(self, centroids: Float32[ndarray, "k d"], first_concept: int) -> pa.Table:
        """Return the windows nearest to each concept, with concepts numbered from `first_concept`."""
        grid = Grid(self.rows, self.largest)
        tables = fetch([a.nearest.remote(self._group, centroids, grid, self._whitening) for a in self._actors])
        table = nearest_windows(pa.concat_tables(tables))
        types = {name: pa.int16() for name in PLACE} | {"index": pa.int32()}
        columns = {name: table[name].cast(types[name]) for name in PLACE}
        concept = pc.add(table["concept"], first_concept).cast(pa.int32())
        return pa.table({"concept": concept, **columns, "distance": table["distance"]})


def _added(*passes: Assignment) -> Assignment:
    return functools.reduce(Assignment.__add__, passes)


@contextlib.contextmanager
def start_actors(
    sources: Sequence[Source], nodes: Sequence[Mapping[str, float]], restarts: int, memory: int = 0
) -> Iterator[list[Any]]:
    """Start an actor per source; they are removed at the end. A lost actor is restarted and reads its source again.

    Args:
        sources: of each actor.
        nodes: resources of the nodes for the actors.
        restarts: maximum number per actor.
        memory: bytes requested per actor; 0: it starts wherever there is a CPU for it.

    Raises:
        UserError: an actor was lost more often than it may be restarted.
    """
    per_node = math.ceil(len(sources) / len(nodes))
    node_cpus = min(node["CPU"] for node in nodes)
    # Ray's count may be more than the cores, as in an embedded cluster, or less, as in a container.
    threads = max(1, int(min(cores(), node_cpus)) // per_node)
    actor = ray.remote(KMeansActor).options(
        **actor_resources(len(sources), nodes),
        scheduling_strategy="SPREAD",
        max_restarts=restarts,
        max_task_retries=restarts,
        **({"memory": memory} if memory else {}),
    )
    actors: list[Any] = [actor.remote(source, threads) for source in sources]
    try:
        yield actors
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
        raise UserError(
            f"concepts: one of {len(sources)} actors that hold the features was lost {restarts + 1} times, probably "
            "because memory ran out: use more nodes, nodes of more memory, or fewer images (a lower limit)",
            code="actor-lost",
        ) from None
    finally:
        for handle in actors:
            ray.kill(handle)


def actor_resources(actors: int, nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the resources that each actor requests: up to one CPU and one GPU, less if more actors share them."""
    shares = {"num_cpus": "CPU", "num_gpus": "GPU"}
    totals = {name: sum(node.get(kind, 0.0) for node in nodes) for name, kind in shares.items()}
    return {name: min(1.0, math.floor(100 * total / actors) / 100) for name, total in totals.items()}


def fetch(references: list[Any]) -> list[Any]:
    """Return the results of actors; raises the UserError of an actor as it was raised there."""
    with raises_user_errors():
        return list(ray.get(references))


def connect_once() -> None:
    """Connect to Ray unless this process is connected."""
    if not ray.is_initialized():
        connect.connect()


def actor_nodes(size: int = 0) -> Sequence[Mapping[str, float]]:
    """Return the resources of the nodes on which actors for features of `size` bytes are started.

    They are the present nodes, if these have the memory, otherwise all that the cluster may have. Without present nodes
    and without a size, it is one of the possible nodes. If any node has a GPU, or may have one, only nodes with GPUs
    count.
    """
    there = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
    may_be = [node for node in capacity.every_possible_node() if node["CPU"]]
    if any(node.get("GPU") for node in [*there, *may_be]):
        there, may_be = ([node for node in nodes if node.get("GPU")] for nodes in (there, may_be))
    if not size:
        return there or may_be[:1]
    if not there:
        return may_be
    actors = actor_count(size, there)
    shard = _HELD * size / actors
    room = sum(int(node.get("memory", 0.0) / shard) for node in there)
    return there if room >= actors else max(there, may_be, key=len)


def actor_count(size: int, nodes: Sequence[Mapping[str, float]]) -> int:
    """Return the number of actors for features of `size` bytes.

    On nodes with GPUs it is one per GPU, otherwise as many as use every node's cores; fewer if there is little work.
    """
    per_node = math.ceil(min(node["CPU"] for node in nodes) / _THREADS)
    gpus = int(sum(node.get("GPU", 0.0) for node in nodes))
    return max(1, min(math.ceil(size / _SHARD_BYTES), gpus or len(nodes) * per_node))


def actor_memory(shard: float) -> int:
    """Return the bytes of memory that the actor of a shard requests: its content, if nodes may still be added.

    Otherwise 0: the memory that a node declares was measured when Ray started, and an actor that requests more than any
    node has would wait forever. It is also 0 for a small shard, which fits anywhere.
    """
    living = sum(bool(node["Alive"]) for node in ray.nodes())
    grows = len(capacity.every_possible_node()) > living
    return int(_HELD * shard) if grows and shard > _SHARD_BYTES else 0


def _bounds(rows: int, workers: int) -> list[int]:
    """Return the bounds of as many shards of whole chunks as there are workers."""
    chunks = math.ceil(rows / CHUNK)
    return sorted({min(rows, chunks * i // workers * CHUNK) for i in range(workers + 1)})


def array_sources(array: ndarray, workers: int) -> list[Source]:
    """Put the rows of an array into the object store, in as many shards of whole chunks as there are workers."""
    spans = itertools.pairwise(_bounds(len(array), workers))
    return [functools.partial(_read_object, ray.put(np.asarray(array[a:b], np.float32))) for a, b in spans]


def dataset_sources(dataset: Any, workers: int) -> list[Source]:
    """Divide the rows of a Ray Dataset, in their order, into as many shards of whole chunks as there are workers."""
    dataset.context.execution_options.preserve_order = True  # row numbers must not depend on the order of the tasks
    dataset = dataset.materialize()
    bounds = _bounds(dataset.count(), workers)
    _column(dataset.columns())
    shards = dataset.split_at_indices(bounds[1:-1]) if len(bounds) > 2 else [dataset]
    return [
        functools.partial(_read_tables, shard.to_arrow_refs(), b - a)
        for shard, (a, b) in zip(shards, itertools.pairwise(bounds), strict=True)
    ]


def _read_object(reference: Any) -> dict[str, Rows]:
    return {ALL: Rows([ray.get(reference)])}


def _read_tables(references: Sequence[Any], rows: int) -> dict[str, Rows]:
    """Return one array of all blocks, which are fetched one at a time; its chunks are those of the whole array."""
    array, start = np.empty((rows, 0), np.float32), 0
    for reference in references:
        table = ray.get(reference)
        block = matrix(table[_column(table.column_names)])
        if start == 0:
            array = np.empty((rows, block.shape[1]), np.float32)
        array[start : start + len(block)] = block
        start += len(block)
    return {ALL: Rows([array])}


def _column(names: Sequence[str]) -> str:
    if "feature" in names:
        return "feature"
    if len(names) != 1:
        raise UserError(
            f"features need a column `feature`, or a single column; this dataset's: {', '.join(names)}",
            code="features-shape",
        )
    return names[0]
