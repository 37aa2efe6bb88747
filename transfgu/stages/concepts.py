"""The stage "concepts": cluster the class tokens of windows into the target concepts, by K-Means.

Features stay with the actors that read them (`transfgu.runtime.spread`). Ray is imported where it is used, because
clustering an array in one process does not need it.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import safetensors
import safetensors.numpy
from jaxtyping import Bool, Float32, Int
from numpy import ndarray

from transfgu.datasets.sample_cache import default_folder
from transfgu.errors import UserError, counted
from transfgu.inference.shards import PLACE, Rows, matrix, own_shard
from transfgu.kmeans import KMeansResult, Shard, Shards, Start, cluster, cores, whitened
from transfgu.recipe import Recipe
from transfgu.runtime.progress import Progress
from transfgu.store import parquet, storage
from transfgu.store.artifacts import Artifact, Outcome, Run
from transfgu.store.scratch import Scratch, available_memory

logger = logging.getLogger(__name__)

_RESTARTS = 5  # restarts of an actor, which is lost with its node; if memory runs out, every new one is lost, too
_READERS = 4  # parts read at a time, because of S3's latency

RESIDENT = 8 << 30
"""Maximum number of bytes of rows that an actor keeps in memory; more are stored on its node's disk."""

SAVE_SECONDS = 30.0
"""Time between two writes of the state of K-Means."""

PUBLISHED_SEED = 1
"""The seed that the published code gives to FAISS (utils/kmeans.py of damo-cv/TransFGU)."""

PIECE_PARTS = 32
"""Parts joined in a piece, because a part has a few hundred windows per group, and small chunks are slow."""


def kmeans(
    features: Any,
    k: int,
    *,
    iterations: int = 100,
    seed: int = 0,
    start: Start = "best",
    workers: int = 1,
    whiten: bool = False,
) -> KMeansResult:
    """Cluster features by K-Means, with the same result on any number of workers.

    Args:
        features: (n, d) array, or a Ray Dataset with a column `feature`, or with a single column, of d numbers a row.
        k: number of clusters.
        iterations: updates at most; fewer where assignments stop changing.
        seed: of the sample and the starts.
        start: `best` of several k-means++ starts on a sample, or the rows that `faiss` starts from with this seed.
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
            return cluster(spread, k, iterations=iterations, seed=seed, start=start)
        white = whitened(spread)
        found = cluster(white, k, iterations=iterations, seed=seed, start=start)
        return dataclasses.replace(found, centroids=white.means_before(found.centroids))


@contextlib.contextmanager
def shards(features: Any, workers: int, *, added_at_once: int | None = None) -> Iterator[Shards]:
    """Yield features as shards in memory.

    Args:
        features: as in :func:`kmeans`.
        workers: as in :func:`kmeans`.
        added_at_once: as in `SpreadShards`; None: its default.

    Raises:
        UserError: as in :func:`kmeans`.
    """
    if workers < 1:
        raise UserError(f"workers must be positive, not {workers}", code="argument-invalid")
    array = None if _is_dataset(features) else np.asarray(features)
    if array is not None and array.ndim != 2:
        raise UserError(f"features must have two dimensions, (n, d), not shape {array.shape}", code="features-shape")
    if array is not None and workers == 1:
        yield own_shard([array])
        return
    from transfgu.runtime import spread

    spread.connect_once()
    sources = spread.dataset_sources(features, workers) if array is None else spread.array_sources(array, workers)
    with spread.start_actors(sources, spread.actor_nodes(), restarts=0) as actors:
        yield spread.SpreadShards(actors, spread.ALL, added_at_once=added_at_once or spread.ADDED_AT_ONCE)


def run(recipe: Recipe, run: Run, progress: Progress, *, piece_parts: int = PIECE_PARTS) -> Outcome:
    """Cluster the windows' features into the recipe's concepts: things first, then stuff.

    A concept is the mean of its windows' features. `concepts.whiten` selects the groups whose features are whitened and
    scaled to unit length before clustering; the concepts are means of the original features.

    Reads `features/part-*.parquet`; writes `concepts.safetensors` (centroids, (K, d); counts, (K,)) and
    `nearest.parquet`: the windows nearest to each concept, from different images if there are enough.

    Raises:
        UserError: no window of a group that concepts are made from, fewer windows than concepts, features that are not
            finite, or an actor that was lost repeatedly.
    """
    from transfgu.runtime import spread

    groups = groups_of(recipe)
    parts, size = feature_parts(run.artifact("features"))
    if recipe.concepts.whiten != "none":
        size *= 2  # in memory: the features before and after
    folder = run.artifact("concepts")
    results: list[KMeansResult] = []
    concepts: list[Float32[ndarray, "k d"]] = []
    found: list[pa.Table] = []
    nodes = spread.actor_nodes(size)
    shares = in_pieces(parts, spread.actor_count(size, nodes), piece_parts)
    own, disk = size // len(shares), recipe.compute.cache_folder
    sources = [functools.partial(read_parts, share, groups, own, disk) for share in shares]
    memory = spread.actor_memory(size / len(sources))
    if memory:
        progress.note(f"{counted(len(sources), 'actor')}, each on a node with {memory / 1e9:.1f} GB of memory for it")
    with spread.start_actors(sources, nodes, restarts=_RESTARTS, memory=memory) as actors:
        shards = [spread.SpreadShards(actors, group.name) for group in groups]
        for group, shard in zip(groups, shards, strict=True):
            check_group(recipe, group, shard)
        for group, shard in zip(groups, shards, strict=True):
            white = recipe.concepts.whitens(group.windows)
            clustered = whitened(shard) if white else shard
            assert isinstance(clustered, spread.SpreadShards)
            results.append(cluster_group(recipe, group, clustered, folder, progress))
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
    parquet.write_table(folder.file("nearest.parquet"), pa.concat_tables(found))
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
class Group:
    """Concepts that are clustered together, and the windows that they come from."""

    name: str  # "things", "stuff", or "concepts" for both in one
    windows: str  # "foreground", "background", or "all"
    count: int


def groups_of(recipe: Recipe) -> list[Group]:
    """Return the groups of concepts that are clustered apart."""
    if recipe.windows.groups == "all":
        return [Group(name="concepts", windows="all", count=recipe.concepts.count)]
    things = Group(name="things", windows="foreground", count=recipe.concepts.things)
    stuff = Group(name="stuff", windows="background", count=recipe.concepts.stuff)
    return [group for group in (things, stuff) if group.count]


def feature_parts(features: Artifact) -> tuple[list[str], int]:
    """Return the URIs of the features' parts in order, and the sum of their sizes in bytes."""
    uris = [u for u in storage.list_files(features.uri, recursive=False) if u.endswith(".parquet")]
    if not uris:
        raise UserError(
            f"there are no features in {storage.shown(features.uri)}: delete that folder and run again",
            code="features-missing",
        )
    fs, path = storage.filesystem(features.uri)
    return uris, sum(f.size or 0 for f in fs.get_file_info(pafs.FileSelector(path)))


def check_group(recipe: Recipe, group: Group, shards: Shards) -> None:
    """Raise UserError if the group has no features, fewer than concepts, or features that are not finite."""
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
            f"{group.count} concepts are too many for {shards.rows} {kind}windows: use more images (a higher limit), "
            f"more windows.scales, or lower {field}",
            code="concepts-too-many",
        )
    if not math.isfinite(shards.largest):
        raise UserError(
            f"features of {group.windows} windows have NaN or infinite values: {encoder} can't compute in "
            f"encoder.precision {recipe.encoder.precision}; use float32, or other encoder.weights",
            code="features-not-finite",
        )


def cluster_group(
    recipe: Recipe,
    group: Group,
    shards: Shards,
    folder: Artifact,
    progress: Progress,
    *,
    save_seconds: float | int = SAVE_SECONDS,
) -> KMeansResult:
    """Cluster the features of one group, continuing where an interrupted attempt stopped.

    Args:
        recipe: recipe with the maximum number of iterations.
        group: the concepts to compute.
        shards: the group's features.
        folder: folder of the stage; the state of K-Means is stored there.
        progress: reports each iteration.
        save_seconds: time between two writes of the state.
    """
    limit = recipe.concepts.iterations
    resume = saved_state(folder, group)
    if resume:
        progress.note(f"{group.name} resumed after {resume[0]} iterations")
    saved = time.monotonic()

    def after(made: int, centroids: ndarray) -> None:
        nonlocal saved
        progress.update(made, None, f"K-Means iterations over {group.name} (at most {limit})")
        if time.monotonic() - saved > save_seconds:
            _save(folder, group, made, centroids)
            saved = time.monotonic()

    start = recipe.concepts.start
    seed = recipe.seed if start == "best" else PUBLISHED_SEED
    result = cluster(shards, group.count, iterations=limit, seed=seed, start=start, resume=resume, after=after)
    _save(folder, group, result.iterations, result.centroids)
    settled = "settled after" if result.iterations < limit else "stopped at the limit of"
    updates = f"{result.iterations} iteration{'' if result.iterations == 1 else 's'}"
    of = "the best start" if start == "best" else "FAISS's start"
    progress.note(f"K-Means over {group.name} {settled} {updates} of {of}")
    return result


def _state_file(folder: Artifact, group: Group) -> str:
    return folder.file(f"state-{group.name}.safetensors")


def _save(folder: Artifact, group: Group, made: int, centroids: Float32[ndarray, "k d"]) -> None:
    tensors = {"centroids": centroids, "iterations": np.array([made])}
    storage.write_bytes(_state_file(folder, group), safetensors.numpy.save(tensors))


def saved_state(folder: Artifact, group: Group) -> tuple[int, ndarray] | None:
    """Return the iterations made and the centroids of an interrupted attempt; None without one."""
    data = storage.read_bytes_or_none(_state_file(folder, group))
    if data is None:
        return None
    try:
        tensors = safetensors.numpy.load(data)
        return int(tensors["iterations"][0]), tensors["centroids"]
    except (safetensors.SafetensorError, KeyError):
        return None  # damaged: the iterations are repeated


def read_parts(
    pieces: Sequence[Sequence[str]],
    groups: Sequence[Group],
    size: int = 0,
    folder: str = "",
    resident: int = RESIDENT,
) -> dict[str, Rows]:
    """Read the windows of each group; parts of a piece are joined, and only one file is in memory twice.

    Args:
        pieces: URIs of parts.
        groups: groups of windows to read.
        size: bytes of all rows. If they exceed `resident` or half of the free memory, they are stored on disk; the
            result is the same.
        folder: folder for these.
        resident: bytes.

    Raises:
        UserError: that folder's disk is full.
    """
    scratch = _scratch(folder, size) if size > min(resident, available_memory() / 2) else None
    found = {group.name: Rows([], scratch) for group in groups}
    with ThreadPoolExecutor(_READERS) as pool:
        for uris in pieces:
            parts = list(pool.map(lambda uri: read_part(uri, groups), uris))
            for group, windows in zip(groups, zip(*parts, strict=True), strict=True):
                rows, joined = found[group.name], np.concatenate([features for features, _ in windows])
                rows.pieces.append(kept_rows(joined, scratch))
                rows.places.append(np.concatenate([places for _, places in windows]))
    return found


def kept_rows(rows: Float32[ndarray, "n d"], scratch: Scratch | None) -> Float32[ndarray, "n d"]:
    """Move rows to disk; without `scratch` they stay in memory. Raises UserError if the disk is full."""
    if scratch is None:
        return rows
    try:
        return scratch.keep(rows)
    except OSError as error:
        raise UserError(
            f"concepts: can't keep features in {error.filename or 'the cache folder'}: {error.strerror}: free space, "
            "or set --compute.cache_folder to a larger disk",
            code="disk-full",
        ) from None


def _scratch(folder: str, size: int) -> Scratch | None:
    """Return space on disk for rows of `size` bytes; None if the disk has too little."""
    try:
        return Scratch(folder or default_folder(), size)
    except OSError as error:
        logger.warning(
            "concepts: %.1f GB of features stay in memory, because %s has no space for them (%s): set "
            "--compute.cache_folder to a larger disk",
            *(size / 1e9, folder or default_folder(), error.strerror),
        )
        return None


def rows_of_parts(uris: Sequence[str], folder: str, resident: int = RESIDENT) -> tuple[Shard, bool]:
    """Read the windows of part files as the stage's actor does, if there is just one.

    Args:
        uris: URIs of the files.
        folder: folder for rows that don't fit in memory; empty: that of the node's caches.
        resident: maximum number of bytes of rows in memory.

    Returns:
        The rows, and True if they are on disk.
    """
    size = sum(version.size for version in storage.versions(uris) if version)
    (pieces,) = in_pieces(uris, 1)
    group = Group(name="all", windows="all", count=1)
    rows = read_parts(pieces, [group], size, folder, resident)["all"]
    return own_shard(rows.pieces, cores(), rows.scratch), rows.scratch is not None


def read_part(uri: str, groups: Sequence[Group]) -> list[tuple[Float32[ndarray, "_ d"], Int[ndarray, "_ 5"]]]:
    """Read one part: its features and places (columns `PLACE`) for each group."""
    table = parquet.read(uri, ["group", "feature", *PLACE])
    features = matrix(table["feature"])
    places = np.stack([table[name].to_numpy().astype(np.int32) for name in PLACE], 1)
    masks = [_mask(table["group"], group.windows) for group in groups]
    return [(features[mask], places[mask]) for mask in masks]


def _mask(column: pa.ChunkedArray, windows: str) -> Bool[ndarray, " n"]:
    if windows == "all":
        return np.ones(len(column), bool)
    mask: ndarray = pc.equal(column.cast(pa.string()), windows).to_numpy()
    return mask


def in_pieces(parts: Sequence[str], workers: int, piece_parts: int = PIECE_PARTS) -> list[list[list[str]]]:
    """Divide parts among workers: the pieces of each worker, and the parts of each piece.

    A piece is `piece_parts` consecutive parts (the last may have fewer), for any number of workers, and so are the
    chunks in which sums are computed.
    """
    pieces = [list(parts[i : i + piece_parts]) for i in range(0, len(parts), piece_parts)]
    bounds = np.linspace(0, len(pieces), min(workers, len(pieces)) + 1).astype(int).tolist()
    return [pieces[a:b] for a, b in itertools.pairwise(bounds)]


def _is_dataset(features: Any) -> bool:
    data = sys.modules.get("ray.data")  # a caller with a Dataset has imported it
    return data is not None and isinstance(features, data.Dataset)
