"""A block is a part is a file: one unit of work from list to disk, so any number of workers makes the same files.

A part is a fixed run of consecutive samples. Each operator of the plan turns one part's block into one block, and the
last one writes it whole, so nothing is grouped, ordered or waited for, and a part whose file is there is done. To the
driver comes back one small row a part. No torch here: the tasks that read and write start in a moment.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from jaxtyping import UInt8
from ray.data import Dataset
from ray.exceptions import RayError

from transfgu.datasets import images, map_files
from transfgu.errors import LeftOut, UserError
from transfgu.recipe import Recipe, Size
from transfgu.runtime import ray_internals
from transfgu.runtime.bottleneck import details
from transfgu.runtime.failures import find_user_error
from transfgu.runtime.progress import Progress
from transfgu.store import parquet, storage

_PART_BYTES = 20_000_000  # of decoded pixels: 16 images of 640 x 640
_PART_IMAGES = 32
READ_MEMORY = 256 << 20  # bytes of heap a decoding task may need: a photograph of 12 megapixels as numbers
_AHEAD = 3  # blocks of decoded images that may exist for each actor, besides one for each CPU that decodes
_METADATA = b"transfgu"


def part_size(size: Size) -> int:
    """How many images of `size` (height, width) make a part: of nothing else, so parts mean the same to any attempt."""
    return max(1, min(_PART_IMAGES, _PART_BYTES // (3 * size[0] * size[1])))


def split(samples: pa.Table, size: int) -> list[pa.Table]:
    """The sample list, rows of `datasets.SCHEMA`, as parts of `size` consecutive samples."""
    return [samples.slice(start, size) for start in range(0, len(samples), size)]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What there is to know of a part without opening it; it lies in the file's Parquet metadata, too."""

    part: int
    """Index of its first sample."""
    images: int
    """Samples it covers, those left out included."""
    left_out: tuple[LeftOut, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    """Sums of interest, by name."""
    size: int = 0
    """Bytes of the file, where this process or its driver's was told when the file was written; else 0."""
    places: Mapping[str, list[int]] = field(default_factory=dict)
    """Where the file keeps each row's maps (`map_files.places`), told likewise."""

    @property
    def file(self) -> str:
        """Name of the part's file."""
        return part_file(self.part)

    def to_json(self) -> str:
        """As JSON text; :meth:`from_json` reads it back."""
        left_out = [vars(x) for x in self.left_out]
        tree = {"part": self.part, "images": self.images, "left_out": left_out, "counts": dict(self.counts)}
        told = {"size": self.size, "places": dict(self.places)} if self.size else {}
        return json.dumps(tree | told)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Summary":
        """Raises ValueError, KeyError or TypeError where the text is no summary."""
        tree = json.loads(text)
        return cls(**{**tree, "left_out": tuple(LeftOut(**x) for x in tree["left_out"])})


def part_file(first: int) -> str:
    """Name of the file of the part whose first sample has this index."""
    return f"part-{first:08d}.parquet"


@dataclass(frozen=True, kw_only=True)
class ReadImages:
    """A task: the samples of a part to decoded, resized images.

    Out come rows part, index, name, image (3, H, W) uint8, reason: null, or why the image can't be used (it is blank).
    """

    size: Size
    """Height and width the images are resized to, pixels."""
    interpolation: Literal["bilinear", "nearest"]
    orient: bool = False
    """Apply EXIF's orientation."""

    def __call__(self, samples: pa.Table) -> pa.Table:
        """Raises UserError where the storage fails."""
        pixels = np.zeros((len(samples), 3, *self.size), np.uint8)

        def read(data: bytes | None) -> UInt8[np.ndarray, "3 H W"]:
            return images.resize(images.decode_file(data, orient=self.orient), self.size, self.interpolation)

        reasons: list[str | None] = []
        files = storage.read_many(samples["image"].to_pylist())
        for place, (image, reason) in zip(pixels, images.read_rows(files, read), strict=True):
            if image is not None:
                place[:] = image
            reasons.append(reason or None)
        index = samples["index"].combine_chunks()
        return pa.table(
            {
                "part": pa.array(np.full(len(samples), index[0].as_py(), np.int32)),
                "index": index,
                "name": samples["name"],
                "image": pa.FixedShapeTensorArray.from_numpy_ndarray(pixels),
                "reason": pa.array(reasons, pa.string()),
            }
        )


def usable(block: pa.Table) -> tuple[pa.Table, UInt8[np.ndarray, "n 3 H W"]]:
    """The rows of a block of `ReadImages` that have an image, without the images, and those (not copied if all do)."""
    column = block["image"]
    # Joining chunks copies even where there is just one, as there is in a block from Ray.
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    pixels = array.to_numpy_ndarray()
    good = np.flatnonzero(block["reason"].is_null().to_numpy())
    rows = block.drop_columns("image")
    return (rows, pixels) if len(good) == len(block) else (rows.take(good), pixels[good])


def write_part(
    folder: str,
    summary: Summary,
    table: pa.Table,
    note: str,
    *,
    places: Callable[[bytes], Mapping[str, list[int]]] | None = None,
    **options: Any,
) -> pa.Table:
    """Write a part's file in one piece.

    Args:
        folder: URI.
        summary: goes into the file's metadata.
        table: the part's rows.
        note: what the user should be told, if anything.
        places: from the file's bytes to what the driver is told of its rows.
        options: those of `pyarrow.parquet.write_table`.

    Returns:
        The row that the driver is told: `summary`, as JSON, and `note`.
    """
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_METADATA: summary.to_json()}), sink, **options)
    data = sink.getvalue()
    storage.write_bytes(storage.join(folder, summary.file), data)
    if places:
        summary = replace(summary, size=len(data), places=places(data))
    return pa.table({"summary": [summary.to_json()], "note": [note]})


def write_maps(folder: str, summary: Summary, table: pa.Table, note: str) -> pa.Table:
    """As :func:`write_part`, for rows `index`, `maps`, `h`, `w`: uncompressed, one row per row group, and indexed."""
    return write_part(
        folder,
        summary,
        table,
        note,
        places=map_files.places,
        row_group_size=1,
        use_dictionary=False,
        write_statistics=["index"],
        compression="none",
    )


def left_out(block: pa.Table) -> tuple[LeftOut, ...]:
    """The images of a block that have a reason not to be used."""
    bad = block.filter(block["reason"].is_valid())
    return tuple(
        LeftOut(name=n, reason=r) for n, r in zip(*(bad[c].to_pylist() for c in ("name", "reason")), strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What becomes of a part: read in a task, encoded in an actor, written in a task."""

    read: ReadImages
    actor: type[Any]
    """A class; its calls get a block of `ReadImages`."""
    arguments: Mapping[str, Any]
    """Of the class's constructor."""
    write: Callable[[pa.Table], pa.Table]
    """From a block of the actor's to :func:`write_part`'s row."""

    def plan(self, parts: Sequence[pa.Table], pool: Mapping[str, Any]) -> Dataset:
        """All of it, for any number of parts; `pool` as in :func:`encoded`."""
        return written(encoded(parts, self.read, self.actor, self.arguments, pool), self.write)

    def here(self, part: pa.Table) -> pa.Table:
        """The same for one part, in this process."""
        return self.write(self.actor(**self.arguments)(self.read(part)))


def ahead(pool: Mapping[str, Any]) -> int:
    """How many parts may lie decoded at a time, before actors of `pool`, as in :func:`encoded`; Ray is up."""
    return _AHEAD * int(pool["compute"].max_size) + int(ray.cluster_resources().get("CPU", 1))


def encoded(
    parts: Sequence[pa.Table],
    read: ReadImages,
    actor: type[Any],
    arguments: Mapping[str, Any],
    pool: Mapping[str, Any],
) -> Dataset:
    """A plan: `read` in tasks on CPUs, then `actor` in a pool of actors, a block a part.

    Args:
        parts: from :func:`split`.
        read: from samples to images.
        actor: a class; its calls get a block of `ReadImages`.
        arguments: of the class's constructor.
        pool: arguments of `map_batches` for the pool, from `transfgu.runtime.capacity.encoder_pool`.
    """
    # Decoding may be faster than encoding: without a limit, decoded images would fill the object store.
    block = part_size(read.size) * 3 * read.size[0] * read.size[1]
    with ray_internals.data_context(whole_blocks=True, store_bytes=block * ahead(pool)):
        # Asking for memory also keeps Ray from fusing the reading into the actor, where nothing would overlap.
        images_read = ray.data.from_arrow(list(parts)).map_batches(
            read, batch_size=None, batch_format="pyarrow", num_cpus=1, memory=READ_MEMORY
        )
        return ray_internals.map_whole_blocks(images_read, actor, arguments, pool)


def handled(
    parts: Sequence[pa.Table], actor: type[Any], arguments: Mapping[str, Any], pool: Mapping[str, Any]
) -> Dataset:
    """A plan: `actor` in a pool of actors, which reads and writes itself, a block of the sample list at a time.

    Arguments are those of :func:`encoded`.
    """
    with ray_internals.data_context(whole_blocks=True):
        return ray_internals.map_whole_blocks(ray.data.from_arrow(list(parts)), actor, arguments, pool)


def written(data: Dataset, write: Callable[[pa.Table], pa.Table]) -> Dataset:
    """The plan `data` with a last operator that writes each part in a task."""
    return ray_internals.map_with_context_of(data, write)


def complete(
    recipe: Recipe,
    samples: pa.Table,
    folder: str,
    size: int,
    plan: Callable[[Sequence[pa.Table]], Dataset],
    progress: Progress,
    here: Callable[[pa.Table], pa.Table] | None = None,
) -> tuple[list[Summary], dict[str, Any]]:
    """Make the parts of `samples` that `folder` lacks.

    Args:
        recipe: says which share of bad images ends the run.
        samples: the sample list.
        folder: URI of the artefact.
        size: samples a part.
        plan: from parts to make to a dataset whose last operator is `write_part`'s.
        progress: told of images, and once of each note.
        here: from one part to `write_part`'s row, in this process; serves where there is one to make, and
            `transfgu.runtime.connect.works_here`.

    Returns:
        The summaries of all parts, in order, and for the report what Ray Data says of the work, if it had any.

    Raises:
        UserError: too many bad images, or one that a task or an actor raised.
    """
    parts = {part["index"][0].as_py(): part for part in split(samples, size)}
    summaries = {s.part: s for s in _found(folder, parts)}
    missing = [table for part, table in parts.items() if part not in summaries]
    done = sum(s.images for s in summaries.values())
    if done:
        progress.update(done, len(samples), "images")
    _check_share(recipe, samples, summaries)
    noted = {""}
    data: Dataset | None = None
    rows: Iterator[tuple[Summary, str]] = iter(())
    if here and len(missing) == 1 and _works_here():
        rows = _told(here(missing[0]))
    elif missing:
        data = plan(missing)
        rows = _made(data)
    for summary, note in rows:
        if note not in noted:
            progress.note(note)
            noted.add(note)
        summaries[summary.part] = summary
        done += summary.images
        progress.update(done, len(samples), "images")
        _check_share(recipe, samples, summaries)
    return [summaries[part] for part in parts], {} if data is None else details(data, recipe)


def _works_here() -> bool:
    from transfgu.runtime import connect  # it brings torch

    return connect.works_here()


def _told(rows: pa.Table) -> Iterator[tuple[Summary, str]]:
    """What :func:`write_part` tells."""
    for row in rows.to_pylist():
        yield Summary.from_json(row["summary"]), row["note"]


def _made(data: Dataset) -> Iterator[tuple[Summary, str]]:
    try:
        for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from _told(cast(pa.Table, batch))
    except RayError as error:
        cause = find_user_error(error)
        if cause:
            raise cause from None
        raise


def _found(folder: str, parts: Mapping[int, pa.Table]) -> list[Summary]:
    """Summaries of the parts that are there, whole, and of the same samples."""
    there = {uri.rsplit("/", 1)[-1]: uri for uri in storage.list_files(folder)}
    wanted = [(there[part_file(part)], table) for part, table in parts.items() if part_file(part) in there]
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda job: _summary(*job), wanted)
        return [summary for summary in found if summary is not None]


def _summary(uri: str, part: pa.Table) -> Summary | None:
    try:
        metadata = parquet.opened(uri).metadata.metadata or {}
        summary = Summary.from_json(metadata[_METADATA])
    except (UserError, KeyError, ValueError, TypeError):
        return None  # damaged since: it is made anew
    return summary if (summary.part, summary.images) == (part["index"][0].as_py(), len(part)) else None


def _check_share(recipe: Recipe, samples: pa.Table, summaries: Mapping[int, Summary]) -> None:
    """Raises UserError as soon as the bad images are too many, however good the rest may be."""
    bad = [x for _, summary in sorted(summaries.items()) for x in summary.left_out]
    limit = recipe.dataset.max_bad_share
    if len(bad) <= limit * len(samples):
        return
    first = ", ".join(f"{x.name} ({x.reason})" for x in bad[:3])
    raise UserError(
        f"at least {len(bad)} of {len(samples)} images ({len(bad) / len(samples):.0%}) can't be used, such as {first}: "
        f"mend or remove them, or raise --dataset.max_bad_share from {limit:g}",
        code="images-bad",
    )
