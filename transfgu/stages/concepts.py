"""The stage "concepts": features stay with the actor that read them, and only centroids and sums travel.

An actor holds a shard, which it reads by itself, so that a lost one reads its shard again and the run goes on. Each
iteration sends it K x d centroids and takes back K x d sums, whatever the number of windows. Only one actor a node is
started (on large nodes a few), as threads share the node's cores.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import safetensors
import safetensors.numpy
from jaxtyping import Bool, Float, Float32, Int
from numpy import ndarray

from transfgu.datasets.sample_cache import default_folder
from transfgu.errors import UserError
from transfgu.kmeans import (
    CHUNK,
    START_NUMBERS,
    Assignment,
    Grid,
    KMeansResult,
    Shard,
    Shards,
    cluster,
    cores,
    least,
    means,
    whitened,
)
from transfgu.recipe import Recipe
from transfgu.runtime.progress import Progress
from transfgu.store import parquet, storage
from transfgu.store.artifacts import Artifact, Outcome, Run
from transfgu.store.scratch import Scratch, available_memory
from transfgu.whitening import Moments, Whitening

logger = logging.getLogger(__name__)

NEAREST = 8
"""Windows kept for each concept, to look at."""

RESIDENT = 8 << 30
"""Bytes of rows that an actor keeps in memory at most; more lie on its disk."""

_PLACE = ("index", "y0", "y1", "x0", "x1")
_SHARD_BYTES = 256 << 20  # below this, starting another actor costs more than it saves
_THREADS = 8  # an actor's at most: more of them wait for each other's Python
_HELD = 1.3  # bytes in memory for a byte of a shard's files, as it is read and worked on
_RESTARTS = 5  # of an actor: it goes with its node; but where memory runs out, each new one ends as the last
_SAVE_SECONDS = 30.0
_ADDED_AT_ONCE = 8  # passes, each with as many numbers as the centroids have
_READERS = 4  # parts read at a time, as S3 answers late
_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")  # where NVIDIA's driver is, on Linux and in WSL
_PIECE_PARTS = 32  # joined: a part has a few hundred windows of a group, and chunks of fewer rows than CHUNK are slow


def kmeans(
    features: Any, k: int, *, iterations: int = 100, seed: int = 0, workers: int = 1, whiten: bool = False
) -> KMeansResult:
    """K-Means of features, with the same result on any number of workers.

    Args:
        features: (n, d) array, or a Ray Dataset with a column `feature`, or with a single column, of d numbers a row.
        k: number of clusters.
        iterations: updates at most; fewer where assignments stop changing.
        seed: of the sample and the starts.
        workers: shards; an array with one worker is clustered in this process, without Ray; else each shard has an
            actor, on the cluster that this process is connected to or on a local one.
        whiten: cluster the features after whitening and scaling to unit length. The centroids are the means of the
            clusters' features as given; the inertia is of the whitened ones.

    Raises:
        UserError: features of another form, values that are not finite, or more clusters than features.

    Source: TransFGU, section 3.1.

    Examples:
        Two pairs of points, each pair around its mean:

        >>> import numpy as np
        >>> from transfgu.stages.concepts import kmeans
        >>> points = np.array([[0, 0], [0, 2], [10, 0], [10, 4]], dtype=np.float32)
        >>> found = kmeans(points, 2)
        >>> sorted(found.centroids.tolist())
        [[0.0, 1.0], [10.0, 2.0]]
        >>> found.counts.tolist(), found.inertia  # inertia: 1 + 1 + 4 + 4
        ([2, 2], 10.0)
    """
    with shards(features, workers) as spread:
        if not whiten:
            return cluster(spread, k, iterations=iterations, seed=seed)
        white = whitened(spread)
        found = cluster(white, k, iterations=iterations, seed=seed)
        return dataclasses.replace(found, centroids=white.means_before(found.centroids))


@contextlib.contextmanager
def shards(features: Any, workers: int) -> Iterator[Shards]:
    """Features as shards, in memory and ready; arguments and errors are those of `kmeans`."""
    if workers < 1:
        raise UserError(f"workers must be positive, not {workers}", code="argument-invalid")
    if _is_dataset(features):
        _connect()
        sources = _spread_dataset(features, workers)
    else:
        array = np.asarray(features)
        if array.ndim != 2:
            raise UserError(
                f"features must have two dimensions, (n, d), not shape {array.shape}", code="features-shape"
            )
        if workers == 1:
            yield _shard([array])
            return
        _connect()
        sources = _spread_array(array, workers)
    with _actors(sources, _nodes(), restarts=0) as actors:
        yield _Spread(actors, _ALL)


def run(recipe: Recipe, run: Run, progress: Progress) -> Outcome:
    """Cluster the windows' features into the recipe's concepts: things first, then stuff.

    A concept is the mean of its windows' features. `concepts.whiten` says in which groups the features that are
    clustered are whitened and of unit length; the concepts are means of the features before that.

    Reads `features/part-*.parquet`; writes `concepts.safetensors` (centroids, (K, d); counts, (K,)) and
    `nearest.parquet`: for each concept the windows nearest to it, from different images as far as there are some.

    Raises:
        UserError: no window of a group that concepts are made from, fewer windows than concepts, features that are
            not finite, or an actor that was lost again and again.
    """
    groups = _groups(recipe)
    parts, size = _parts(run.artifact("features"))
    if recipe.concepts.whiten != "none":
        size *= 2  # in memory: the features before and after
    folder = run.artifact("concepts")
    results: list[KMeansResult] = []
    concepts: list[Float32[ndarray, "k d"]] = []
    found: list[pa.Table] = []
    nodes = _nodes(size)
    shared = _share(parts, _worker_count(size, nodes))
    own, disk = size // len(shared), recipe.compute.cache_folder
    sources = [functools.partial(_read_parts, pieces, groups, own, disk) for pieces in shared]
    memory = _memory(size / len(sources))
    if memory:
        progress.note(f"{len(sources)} actors, each on a node with {memory / 1e9:.1f} GB of memory for it")
    with _actors(sources, nodes, restarts=_RESTARTS, memory=memory) as actors:
        shards = [_Spread(actors, group.name) for group in groups]
        for group, shard in zip(groups, shards, strict=True):
            _check(recipe, group, shard)
        for group, shard in zip(groups, shards, strict=True):
            white = recipe.concepts.whitens(group.windows)
            clustered = whitened(shard) if white else shard
            assert isinstance(clustered, _Spread)
            results.append(_cluster_group(recipe, group, clustered, folder, progress))
            centroids = results[-1].centroids
            first = sum(len(r.counts) for r in results[:-1])
            found.append(clustered.nearest(centroids, first))
            concepts.append(clustered.means_before(centroids) if white else centroids)
    for group in groups:
        storage.delete(_state_file(folder, group))
    tensors = {
        "centroids": np.concatenate(concepts),
        "counts": np.concatenate([r.counts for r in results]),
    }
    nearest = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(found), nearest)
    storage.write_bytes(folder.file("nearest.parquet"), nearest.getvalue().to_pybytes())
    storage.write_bytes(folder.file("concepts.safetensors"), safetensors.numpy.save(tensors))
    return Outcome(
        items=sum(s.rows for s in shards),
        details={
            "windows": {g.windows: s.rows for g, s in zip(groups, shards, strict=True)},
            "inertia": {g.windows: r.inertia for g, r in zip(groups, results, strict=True)},
            "iterations": {g.windows: r.iterations for g, r in zip(groups, results, strict=True)},
            "actors": len(actors),
        },
    )


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Concepts that are clustered together, and the windows that they come from."""

    name: str  # "things", "stuff", or "concepts" for both in one
    windows: str  # "foreground", "background", or "all"
    count: int


def _groups(recipe: Recipe) -> list[_Group]:
    if recipe.windows.groups == "all":
        return [_Group(name="concepts", windows="all", count=recipe.concepts.count)]
    things = _Group(name="things", windows="foreground", count=recipe.concepts.things)
    stuff = _Group(name="stuff", windows="background", count=recipe.concepts.stuff)
    return [group for group in (things, stuff) if group.count]


def _parts(features: Artifact) -> tuple[list[str], int]:
    """URIs of the features' parts in order, and their bytes in all."""
    uris = [u for u in storage.list_files(features.uri, recursive=False) if u.endswith(".parquet")]
    if not uris:
        raise UserError(
            f"there are no features in {storage.shown(features.uri)}: delete that folder and run again",
            code="features-missing",
        )
    fs, path = storage.filesystem(features.uri)
    return uris, sum(f.size or 0 for f in fs.get_file_info(pafs.FileSelector(path)))


def _check(recipe: Recipe, group: _Group, shards: Shards) -> None:
    encoder = f"encoder {recipe.encoder.name} (weights {recipe.encoder.weights})"
    if shards.rows == 0 and group.windows == "foreground":
        raise UserError(
            f"no window is foreground: the attention of {encoder} leaves none salient; lower windows.min_foreground "
            f"(now {recipe.windows.min_foreground:g}) or windows.saliency_factor (now "
            f"{recipe.windows.saliency_factor:g}), or use trained encoder.weights",
            code="windows-missing",
        )
    if shards.rows == 0 and group.windows == "background":
        raise UserError(
            f"no window is background: the attention of {encoder} leaves all of them salient; lower "
            f"windows.min_background (now {recipe.windows.min_background:g}), raise windows.saliency_factor (now "
            f"{recipe.windows.saliency_factor:g}), or use trained encoder.weights",
            code="windows-missing",
        )
    if shards.rows < group.count:
        kind = "" if group.windows == "all" else f"{group.windows} "
        field = "concepts.things and concepts.stuff" if group.name == "concepts" else f"concepts.{group.name}"
        raise UserError(
            f"{group.count} concepts can't be made of {shards.rows} {kind}windows: use more images (a higher limit), "
            f"more windows.scales, or lower {field}",
            code="concepts-too-many",
        )
    if not math.isfinite(shards.largest):
        raise UserError(
            f"features of {group.windows} windows hold NaN or infinite values: {encoder} can't do its arithmetic in "
            f"encoder.precision {recipe.encoder.precision}; use float32, or other encoder.weights",
            code="features-not-finite",
        )


def _cluster_group(recipe: Recipe, group: _Group, shards: Shards, folder: Artifact, progress: Progress) -> KMeansResult:
    """K-Means of one group, from where an interrupted attempt had come to."""
    limit = recipe.concepts.iterations
    resume = _saved(folder, group)
    if resume:
        progress.note(f"{group.name} resumed after {resume[0]} iterations")
    saved = time.monotonic()

    def after(made: int, centroids: ndarray) -> None:
        nonlocal saved
        progress.update(made, None, f"K-Means iterations over {group.name} (at most {limit})")
        if time.monotonic() - saved > _SAVE_SECONDS:
            _save(folder, group, made, centroids)
            saved = time.monotonic()

    result = cluster(shards, group.count, iterations=limit, seed=recipe.seed, resume=resume, after=after)
    _save(folder, group, result.iterations, result.centroids)
    settled = "settled after" if result.iterations < limit else "stopped at the limit of"
    updates = f"{result.iterations} iteration{'' if result.iterations == 1 else 's'}"
    progress.note(f"K-Means over {group.name} {settled} {updates} of the best start")
    return result


def _state_file(folder: Artifact, group: _Group) -> str:
    return folder.file(f"state-{group.name}.safetensors")


def _save(folder: Artifact, group: _Group, made: int, centroids: Float32[ndarray, "k d"]) -> None:
    tensors = {"centroids": centroids, "iterations": np.array([made])}
    storage.write_bytes(_state_file(folder, group), safetensors.numpy.save(tensors))


def _saved(folder: Artifact, group: _Group) -> tuple[int, ndarray] | None:
    data = storage.read_bytes_or_none(_state_file(folder, group))
    if data is None:
        return None
    try:
        tensors = safetensors.numpy.load(data)
        return int(tensors["iterations"][0]), tensors["centroids"]
    except (safetensors.SafetensorError, KeyError):
        return None  # damaged since: the iterations are made again


# What an actor holds, and where it comes from.

_ALL = "all"


@dataclass
class _Rows:
    """Rows of features, in pieces, and for windows where they are: columns index, y0, y1, x0, x1."""

    pieces: list[ndarray]
    scratch: Scratch | None = None
    """Where the pieces lie, if on disk; None: in memory."""
    places: list[ndarray] = field(default_factory=list)


_Source = Callable[[], dict[str, _Rows]]


class KMeansActor:
    """One shard, read when it is first needed, in this process or, as a Ray actor, in another."""

    def __init__(self, source: _Source, threads: int) -> None:
        self._source, self._threads = source, threads
        self._white: dict[str, Shard] = {}

    # Methods that take a whitening are of the whitened rows; without one, of the rows as they are. Each call carries
    # it, as a restarted actor has none.

    @functools.cached_property
    def _groups(self) -> dict[str, tuple[Shard, list[ndarray]]]:
        rows = self._source()
        return {name: (_shard(r.pieces, self._threads, r.scratch), r.places) for name, r in rows.items()}

    def computes_on(self) -> str:
        """Return the name of the class that assigns rows in this process: `Shard` or `DeviceShard`."""
        return type(next(iter(self._groups.values()))[0]).__name__

    def _shard(self, group: str, whitening: Whitening | None) -> Shard:
        if whitening is None:
            return self._groups[group][0]
        if group not in self._white:
            self._white[group] = self._groups[group][0].whitened(whitening)
        return self._white[group]

    def measure(self, group: str, whitening: Whitening | None = None) -> tuple[int, float]:
        """Number of rows and their largest absolute value, which is not finite if one of theirs is not."""
        shard = self._shard(group, whitening)
        return shard.rows, shard.largest

    def moments(self, group: str, step: float) -> Moments | None:
        """Sums from which a whitening follows; None without a row."""
        shard = self._shard(group, None)
        return shard.moments(step) if shard.rows else None

    def sums_before(
        self, group: str, centroids: Float32[ndarray, "k d"], grid: Grid, grid_before: Grid, whitening: Whitening
    ) -> tuple[ndarray, Int[ndarray, " k"]]:
        """Sums, before whitening, and number of the rows that are nearest to each centroid."""
        sums, counts = self._shard(group, whitening).sums_before(centroids, grid, grid_before)
        return (sums if sums.size else np.zeros_like(centroids, np.float64)), counts

    def take(
        self, group: str, rows: Int[ndarray, " n"], whitening: Whitening | None = None
    ) -> Float32[ndarray, "n d"] | None:
        """The rows of these numbers within the shard; None for none."""
        return self._shard(group, whitening).take(rows) if len(rows) else None

    def starts(
        self, k: int, seed: int, numbers: Sequence[int], *samples: Float32[ndarray, "_ d"] | None
    ) -> list[tuple[float, Float32[ndarray, "k d"]]]:
        """K-Means on a sample from the starts of these numbers: inertia and centroids of each."""
        sample = np.concatenate([s for s in samples if s is not None])
        return _shard([sample], self._threads).starts(k, seed, numbers)

    def assign(
        self, group: str, centroids: Float32[ndarray, "k d"], grid: Grid, whitening: Whitening | None = None
    ) -> Assignment:
        """One pass over the shard."""
        return self._shard(group, whitening).assign(centroids, grid)

    def nearest(
        self, group: str, centroids: Float32[ndarray, "k d"], grid: Grid, whitening: Whitening | None = None
    ) -> pa.Table:
        """The windows of this shard that may be among the nearest to their concept."""
        shard, places = self._shard(group, whitening), self._groups[group][1]
        shard.assign(centroids, grid)  # a restarted actor has no assignment yet
        columns = {"concept": shard.labels(), **dict(zip(_PLACE, np.concatenate(places).T, strict=True))}
        return _nearest(pa.table({**columns, "distance": shard.distances(centroids).astype(np.float32)}))


def _nearest(windows: pa.Table) -> pa.Table:
    """Of each concept's windows the nearest, one an image; where images are too few, the next nearest of any image.

    An image's windows are all in one shard, so what is chosen from the shards' choices is chosen from all windows.
    """
    concept, image, distance = (windows[name].to_numpy() for name in ("concept", "index", "distance"))
    order = np.lexsort((distance, concept))  # stable: by concept, distance, and place in the table
    chosen = []
    for rows in np.split(order, np.flatnonzero(np.diff(concept[order])) + 1):
        first = np.zeros(len(rows), bool)
        first[np.unique(image[rows], return_index=True)[1]] = True
        preferred = np.concatenate([rows[first], rows[~first]])[:NEAREST]
        chosen.append(preferred[np.argsort(distance[preferred], kind="stable")])
    return windows.take(np.concatenate(chosen))


def _read_parts(
    pieces: Sequence[Sequence[str]],
    groups: Sequence[_Group],
    size: int = 0,
    folder: str = "",
    resident: int = RESIDENT,
) -> dict[str, _Rows]:
    """Read the windows of each group; the parts of a piece are joined, the files of one being held twice at most.

    Args:
        pieces: URIs of parts.
        groups: whose windows are read.
        size: bytes that all rows take. Where that is more than `resident` or half of the memory that is free, they
            lie on disk; the result is the same.
        folder: for those.
        resident: bytes.

    Raises:
        UserError: that folder's disk has become full.
    """
    scratch = _scratch(folder, size) if size > min(resident, available_memory() / 2) else None
    found = {group.name: _Rows([], scratch) for group in groups}
    with ThreadPoolExecutor(_READERS) as pool:
        for uris in pieces:
            parts = list(pool.map(lambda uri: _read_part(uri, groups), uris))
            for group, windows in zip(groups, zip(*parts, strict=True), strict=True):
                rows, joined = found[group.name], np.concatenate([features for features, _ in windows])
                rows.pieces.append(_kept(joined, scratch))
                rows.places.append(np.concatenate([places for _, places in windows]))
    return found


def _kept(rows: Float32[ndarray, "n d"], scratch: Scratch | None) -> Float32[ndarray, "n d"]:
    if scratch is None:
        return rows
    try:
        return scratch.keep(rows)
    except OSError as error:
        raise UserError(
            f"concepts: can't keep features in {error.filename or 'the cache folder'}: {error.strerror}: make room, or "
            "set --compute.cache_folder to a larger disk",
            code="disk-full",
        ) from None


def _scratch(folder: str, size: int) -> Scratch | None:
    """Return room on disk for rows of `size` bytes; None where the disk has none."""
    try:
        return Scratch(folder or default_folder(), size)
    except OSError as error:
        logger.warning(
            "concepts: %.1f GB of features stay in memory, as %s has no room for them (%s): set "
            "--compute.cache_folder to a larger disk",
            *(size / 1e9, folder or default_folder(), error.strerror),
        )
        return None


def rows_of_parts(uris: Sequence[str], folder: str, resident: int = RESIDENT) -> tuple[Shard, bool]:
    """Read the windows of part files as the stage's actor does, if there is just one.

    Args:
        uris: of the files.
        folder: for rows that are more than memory should hold; empty: that of the node's caches.
        resident: bytes of rows that are kept in memory at most.

    Returns:
        The rows, and whether they lie on disk.
    """
    size = sum(version.size for version in storage.versions(uris) if version)
    (pieces,) = _share(uris, 1)
    group = _Group(name=_ALL, windows="all", count=1)
    rows = _read_parts(pieces, [group], size, folder, resident)[_ALL]
    return _shard(rows.pieces, cores(), rows.scratch), rows.scratch is not None


def _read_part(uri: str, groups: Sequence[_Group]) -> list[tuple[Float32[ndarray, "_ d"], Int[ndarray, "_ 5"]]]:
    table = parquet.read(uri, ["group", "feature", *_PLACE])
    features = _matrix(table["feature"])
    places = np.stack([table[name].to_numpy().astype(np.int32) for name in _PLACE], 1)
    masks = [_mask(table["group"], group.windows) for group in groups]
    return [(features[mask], places[mask]) for mask in masks]


def _mask(column: pa.ChunkedArray, windows: str) -> Bool[ndarray, " n"]:
    if windows == "all":
        return np.ones(len(column), bool)
    mask: ndarray = pc.equal(column.cast(pa.string()), windows).to_numpy()
    return mask


def _matrix(column: pa.ChunkedArray) -> Float[ndarray, "n d"]:
    """A column of lists or tensors of one length as a matrix, without a copy where it lies in one piece."""
    array = column.combine_chunks()
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    width = getattr(array.type, "list_size", -1 if len(array) else 0)
    matrix: ndarray = array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), width)
    return matrix


def _read_object(reference: Any) -> dict[str, _Rows]:
    import ray

    return {_ALL: _Rows([ray.get(reference)])}


def _read_tables(references: Sequence[Any], rows: int) -> dict[str, _Rows]:
    """One array of all the blocks, which are fetched one at a time: its chunks are those of the whole array."""
    import ray

    array, start = np.empty((rows, 0), np.float32), 0
    for reference in references:
        table = ray.get(reference)
        matrix = _matrix(table[_column(table.column_names)])
        if start == 0:
            array = np.empty((rows, matrix.shape[1]), np.float32)
        array[start : start + len(matrix)] = matrix
        start += len(matrix)
    return {_ALL: _Rows([array])}


# Ray is imported where it is used: clustering an array in one process needs none of it.


class _Spread(Shards):
    """Rows of one group on several actors, which `cluster` works on as if they were one shard."""

    def __init__(
        self, actors: Sequence[Any], group: str, whitening: Any = None, before: "_Spread | None" = None
    ) -> None:
        """`whitening` is a reference to one for the rows of `before`, if these are to be whitened."""
        import ray

        self._actors, self._group, self._whitening, self._before = actors, group, whitening, before
        # Tasks, not calls of the actors: those run in order, and a restarted one may have to assign before it adds.
        self._add = ray.remote(num_cpus=0)(_added)
        measures = _get([a.measure.remote(group, whitening) for a in actors])
        self._bounds = np.cumsum([0, *(rows for rows, _ in measures)])
        self.rows = int(self._bounds[-1])
        self.largest = float(np.max([largest for _, largest in measures]))  # keeps NaN

    def best_start(self, rows: Int[ndarray, " n"], k: int, seed: int) -> Float32[ndarray, "k d"]:
        """The starts are shared out; the sample goes from actor to actor, not through this process."""
        cuts = np.searchsorted(rows, self._bounds[1:-1])
        own = [r - first for r, first in zip(np.split(rows, cuts), self._bounds[:-1], strict=True)]
        samples = [a.take.remote(self._group, r, self._whitening) for a, r in zip(self._actors, own, strict=True)]
        busy = self._actors[: len(START_NUMBERS)]
        shares = [s.tolist() for s in np.array_split(START_NUMBERS, len(busy))]
        found = _get([a.starts.remote(k, seed, share, *samples) for a, share in zip(busy, shares, strict=True)])
        return least([start for several in found for start in several])

    def assign(self, centroids: Float32[ndarray, "k d"], grid: Grid) -> Assignment:
        """One pass over all rows."""
        import ray

        reference = ray.put(centroids)
        passes = [a.assign.remote(self._group, reference, grid, self._whitening) for a in self._actors]
        while len(passes) > _ADDED_AT_ONCE:  # what is left is what this process fetches
            groups = [passes[i : i + _ADDED_AT_ONCE] for i in range(0, len(passes), _ADDED_AT_ONCE)]
            passes = [self._add.remote(*group) for group in groups]
        return _added(*_get(passes))

    def moments(self, step: float) -> Moments:
        """Sums over all rows, from which a whitening follows."""
        found = _get([a.moments.remote(self._group, step) for a in self._actors])
        total: Moments = functools.reduce(Moments.__add__, [m for m in found if m is not None])
        return total

    def whitened(self, whitening: Whitening) -> "_Spread":
        """The rows whitened and of unit length; actors keep those before, too."""
        import ray

        return _Spread(self._actors, self._group, ray.put(whitening), self)

    def means_before(self, centroids: Float32[ndarray, "k d"]) -> Float32[ndarray, "k d"]:
        """Of whitened rows: for each centroid the mean, before whitening, of the rows that are nearest to it."""
        before = self._before
        assert before is not None
        grids = Grid(self.rows, self.largest), Grid(before.rows, before.largest)
        found = _get([a.sums_before.remote(self._group, centroids, *grids, self._whitening) for a in self._actors])
        sums, counts = zip(*found, strict=True)
        return means(np.sum(sums, axis=0), np.sum(counts, axis=0))

    def nearest(self, centroids: Float32[ndarray, "k d"], first_concept: int) -> pa.Table:
        """The windows nearest to each concept, concepts numbered from `first_concept`."""
        grid = Grid(self.rows, self.largest)
        tables = _get([a.nearest.remote(self._group, centroids, grid, self._whitening) for a in self._actors])
        table = _nearest(pa.concat_tables(tables))
        types = {name: pa.int16() for name in _PLACE} | {"index": pa.int32()}
        columns = {name: table[name].cast(types[name]) for name in _PLACE}
        concept = pc.add(table["concept"], first_concept).cast(pa.int32())
        return pa.table({"concept": concept, **columns, "distance": table["distance"]})


def _added(*passes: Assignment) -> Assignment:
    return functools.reduce(Assignment.__add__, passes)


@contextlib.contextmanager
def _actors(
    sources: Sequence[_Source], nodes: Sequence[Mapping[str, float]], restarts: int, memory: int = 0
) -> Iterator[list[Any]]:
    """An actor for each source, gone at the end; one that is lost is started again, and reads its source again.

    Args:
        sources: of each actor.
        nodes: resources of those that the actors are for.
        restarts: of each actor at most.
        memory: bytes that each asks for; 0: it is started wherever there is a CPU for it.

    Raises:
        UserError: an actor was lost once more than it is started again.
    """
    import ray

    per_node = math.ceil(len(sources) / len(nodes))
    node_cpus = min(node["CPU"] for node in nodes)
    # Ray's count may be more than the cores, as in an embedded cluster, or less, as in a container.
    threads = max(1, int(min(cores(), node_cpus)) // per_node)
    actor = ray.remote(KMeansActor).options(
        **_resources(len(sources), nodes),
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
            f"concepts: one of {len(sources)} actors that hold the features was lost {restarts + 1} times, as happens "
            "where memory runs out: use more nodes, nodes of more memory, or fewer images (a lower limit)",
            code="actor-lost",
        ) from None
    finally:
        for handle in actors:
            ray.kill(handle)


def _resources(actors: int, nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return what each actor asks for: up to one CPU and one GPU, less where more actors share them."""
    shares = {"num_cpus": "CPU", "num_gpus": "GPU"}
    totals = {name: sum(node.get(kind, 0.0) for node in nodes) for name, kind in shares.items()}
    return {name: min(1.0, math.floor(100 * total / actors) / 100) for name, total in totals.items()}


def _get(references: list[Any]) -> list[Any]:
    """What actors answer; a user's mistake that one of them found is raised as it was there, in one line."""
    import ray

    try:
        return list(ray.get(references))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def _connect() -> None:
    import ray

    if not ray.is_initialized():
        from transfgu.runtime import connect as runtime

        runtime.connect()


def _nodes(size: int = 0) -> Sequence[Mapping[str, float]]:
    """Resources of each node that has a CPU, whose cores and memory are for features of `size` bytes.

    They are those that are there, as far as these have the memory, else all that the cluster may come to have. Where
    there is neither a node nor a size, they are one of those to come. If any node has a GPU, or may come with one, only
    nodes with GPUs count.
    """
    import ray

    from transfgu.runtime import capacity as runtime

    there = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
    may_be = [node for node in runtime.every_possible_node() if node["CPU"]]
    if any(node.get("GPU") for node in [*there, *may_be]):
        there, may_be = ([node for node in nodes if node.get("GPU")] for nodes in (there, may_be))
    if not size:
        return there or may_be[:1]
    if not there:
        return may_be
    actors = _worker_count(size, there)
    shard = _HELD * size / actors
    room = sum(int(node.get("memory", 0.0) / shard) for node in there)
    return there if room >= actors else max(there, may_be, key=len)


def _worker_count(size: int, nodes: Sequence[Mapping[str, float]]) -> int:
    """Return the number of actors for features of `size` bytes.

    On nodes with GPUs it is one per GPU, else as many as use every node's cores; fewer if there is not that much work.
    """
    per_node = math.ceil(min(node["CPU"] for node in nodes) / _THREADS)
    gpus = int(sum(node.get("GPU", 0.0) for node in nodes))
    return max(1, min(math.ceil(size / _SHARD_BYTES), gpus or len(nodes) * per_node))


def _memory(shard: float) -> int:
    """Bytes of memory that the actor of a shard of so many bytes asks for: what it holds, where nodes may yet come.

    Elsewhere 0: what a machine declares is a share of what was free when Ray began, and an actor that asks for more
    than any has would wait for ever. It is 0 for a small shard, too, that finds its place anywhere.
    """
    import ray

    from transfgu.runtime import capacity as runtime

    living = sum(bool(node["Alive"]) for node in ray.nodes())
    grows = len(runtime.every_possible_node()) > living
    return int(_HELD * shard) if grows and shard > _SHARD_BYTES else 0


def _share(parts: Sequence[str], workers: int) -> list[list[list[str]]]:
    """Pieces of consecutive parts, shared out: what makes a piece, and so a chunk, is the same for any workers."""
    pieces = [list(parts[i : i + _PIECE_PARTS]) for i in range(0, len(parts), _PIECE_PARTS)]
    bounds = np.linspace(0, len(pieces), min(workers, len(pieces)) + 1).astype(int).tolist()
    return [pieces[a:b] for a, b in itertools.pairwise(bounds)]


def _shard(pieces: Sequence[ndarray], threads: int | None = None, scratch: Scratch | None = None) -> Shard:
    """Return the rows in the memory of this process's GPU if it has one and they fit, else in its own.

    Each process decides for itself: the driver may run on a machine without a GPU.
    """
    if not any(Path(file).exists() for file in _GPU_FILES):  # torch takes seconds to import
        return Shard(pieces, threads, scratch)
    import torch

    from transfgu.device_kmeans import DeviceShard
    from transfgu.inference.device import without_gpus

    if without_gpus() or not torch.cuda.is_available():
        return Shard(pieces, threads, scratch)
    try:
        return DeviceShard(pieces, torch.device("cuda"), threads, scratch=scratch)
    except torch.OutOfMemoryError:
        logger.warning("concepts: the features do not fit the GPU's memory: K-Means runs on the CPU of this node")
        torch.cuda.empty_cache()
        return Shard(pieces, threads, scratch)


def _is_dataset(features: Any) -> bool:
    data = sys.modules.get("ray.data")  # who has made a Dataset has imported it
    return data is not None and isinstance(features, data.Dataset)


def _bounds(rows: int, workers: int) -> list[int]:
    """Where to cut rows into as many shards of whole chunks."""
    chunks = math.ceil(rows / CHUNK)
    return sorted({min(rows, chunks * i // workers * CHUNK) for i in range(workers + 1)})


def _spread_array(array: ndarray, workers: int) -> list[_Source]:
    import ray

    spans = itertools.pairwise(_bounds(len(array), workers))
    return [functools.partial(_read_object, ray.put(np.asarray(array[a:b], np.float32))) for a, b in spans]


def _spread_dataset(dataset: Any, workers: int) -> list[_Source]:
    dataset.context.execution_options.preserve_order = True  # row numbers must not depend on which task ends first
    dataset = dataset.materialize()
    bounds = _bounds(dataset.count(), workers)
    _column(dataset.columns())
    shards = dataset.split_at_indices(bounds[1:-1]) if len(bounds) > 2 else [dataset]
    return [
        functools.partial(_read_tables, shard.to_arrow_refs(), b - a)
        for shard, (a, b) in zip(shards, itertools.pairwise(bounds), strict=True)
    ]


def _column(names: Sequence[str]) -> str:
    if "feature" in names:
        return "feature"
    if len(names) != 1:
        raise UserError(
            f"features need a column `feature`, or a single column; this dataset's: {', '.join(names)}",
            code="features-shape",
        )
    return names[0]
