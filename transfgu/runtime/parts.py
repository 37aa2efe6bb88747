"""Process images in parts: a part is one block of Ray Data and one file, so any number of workers makes the same files.

A part has a fixed number of consecutive samples. Each operator of the plan turns the block of a part into one block,
and the last one writes it whole. So nothing is grouped or ordered, and a part whose file exists is done. The driver
gets one small row per part. This module does not import torch, so tasks that read and write start quickly.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import ray
from jaxtyping import UInt8
from ray.data import Dataset

from transfgu.datasets import images, map_files
from transfgu.errors import LeftOut, UserError
from transfgu.recipe import DECODING_BYTES, MAX_PIXELS, Recipe, Size
from transfgu.runtime import capacity, connect, ray_internals
from transfgu.runtime.bottleneck import details
from transfgu.runtime.failures import raises_user_errors
from transfgu.runtime.progress import Progress
from transfgu.store import parquet, storage

_PART_BYTES = 20_000_000  # of decoded pixels: 16 images of 640 x 640
_PART_IMAGES = 32
_READ_BYTES = 128 << 20  # heap of a decoding task besides the present image: the files and results of a part
_AHEAD = 3  # decoded blocks per actor, in addition to one per decoding CPU
_METADATA = b"transfgu"


def part_size(size: Size) -> int:
    """Return the number of images of `size` (height, width) per part; the same in every attempt."""
    return max(1, min(_PART_IMAGES, _PART_BYTES // (3 * size[0] * size[1])))


def read_memory(max_pixels: int) -> int:
    """Return the bytes of memory that a task which decodes images of up to `max_pixels` asks Ray for.

    It is what the largest image takes, but no more than half of the smallest node's, where it would never run.
    """
    return min(_READ_BYTES + DECODING_BYTES * max_pixels, capacity.task_memory())


def split(samples: pa.Table, size: int) -> list[pa.Table]:
    """Divide the sample list, rows of `datasets.SCHEMA`, into parts of `size` consecutive samples."""
    return [samples.slice(start, size) for start in range(0, len(samples), size)]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Facts about a part, which are also in the Parquet metadata of its file."""

    part: int
    """Index of its first sample."""
    images: int
    """Number of its samples, including left-out ones."""
    left_out: tuple[LeftOut, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    """Sums of interest, by name."""
    size: int = 0
    """Bytes of the file, if this process or its driver's was told when the file was written; otherwise 0."""
    places: Mapping[str, list[int]] = field(default_factory=dict)
    """Places of each row's maps in the file (`map_files.places`), if told likewise."""

    @property
    def file(self) -> str:
        """The name of the part's file."""
        return part_file(self.part)

    def to_json(self) -> str:
        """Return the summary as JSON, which :meth:`from_json` reads."""
        left_out = [vars(x) for x in self.left_out]
        tree = {"part": self.part, "images": self.images, "left_out": left_out, "counts": dict(self.counts)}
        told = {"size": self.size, "places": dict(self.places)} if self.size else {}
        return json.dumps(tree | told)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Summary":
        """Read a summary; raises ValueError, KeyError or TypeError if the text is not one."""
        tree = json.loads(text)
        return cls(**{**tree, "left_out": tuple(LeftOut(**x) for x in tree["left_out"])})


def part_file(first: int) -> str:
    """Return the name of the file of the part whose first sample has this index."""
    return f"part-{first:08d}.parquet"


@dataclass(frozen=True, kw_only=True)
class ReadImages:
    """A task that decodes and resizes the images of a part.

    It returns rows part, index, name, image (3, H, W) uint8, and reason: null, or why the image can't be used (blank).
    """

    size: Size
    """Height and width the images are resized to, pixels."""
    interpolation: Literal["bilinear", "nearest"]
    orient: bool = False
    """Apply EXIF's orientation."""
    max_pixels: int = MAX_PIXELS
    """Maximum size of an image; a larger one is left out."""

    def decode(self, data: bytes | None) -> UInt8[np.ndarray, "height width 3"]:
        """Decode a file's bytes; raises BadInput."""
        return images.decode_file(data, orient=self.orient, max_pixels=self.max_pixels)

    def __call__(self, samples: pa.Table) -> pa.Table:
        """Raise UserError if the storage fails."""
        pixels = np.zeros((len(samples), 3, *self.size), np.uint8)

        def read(data: bytes | None) -> UInt8[np.ndarray, "3 H W"]:
            return images.resize(self.decode(data), self.size, self.interpolation)

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
    """Return the rows of a block of `ReadImages` that have an image, and their images (not copied if all rows have)."""
    column = block["image"]
    # Joining chunks copies even a single one, which a block from Ray has.
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
        note: a line for the user; may be empty.
        places: returns the places of the rows from the file's bytes.
        options: those of `pyarrow.parquet.write_table`.

    Returns:
        A row for the driver: `summary`, as JSON, and `note`.
    """
    data = parquet.encoded(table.replace_schema_metadata({_METADATA: summary.to_json()}), **options)
    storage.write_bytes(storage.join(folder, summary.file), data)
    if places:
        summary = replace(summary, size=len(data), places=places(data))
    return pa.table({"summary": [summary.to_json()], "note": [note]})


def write_maps(folder: str, summary: Summary, table: pa.Table, note: str) -> pa.Table:
    """Write rows `index`, `maps`, `h`, `w` as :func:`write_part` does: uncompressed, one row per row group, indexed."""
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
    """Return the images of a block that can't be used, with the reason."""
    bad = block.filter(block["reason"].is_valid())
    return tuple(
        LeftOut(name=n, reason=r) for n, r in zip(*(bad[c].to_pylist() for c in ("name", "reason")), strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """The operators of a plan: a part is read in a task, encoded in an actor, and written in a task."""

    read: ReadImages
    actor: type[Any]
    """A class; it is called with blocks of `ReadImages`."""
    arguments: Mapping[str, Any]
    """Arguments of the class's constructor."""
    write: Callable[[pa.Table], pa.Table]
    """Turns a block of the actor into the row of :func:`write_part`."""

    @property
    def operators(self) -> list[str]:
        """The operators of :meth:`plan`, in the order in which Ray Data executes them."""
        read, write = type(self.read).__name__, type(self.write).__name__
        return ["Input", f"{read} (tasks)", f"{self.actor.__name__} (actors)", f"{write} (tasks)"]

    def plan(self, parts: Sequence[pa.Table], pool: Mapping[str, Any]) -> Dataset:
        """Return the plan for any number of parts; `pool` as in :func:`encoded`."""
        return written(encoded(parts, self.read, self.actor, self.arguments, pool), self.write)

    def here(self, part: pa.Table) -> pa.Table:
        """Run the plan for one part, in this process."""
        return self.write(self.actor(**self.arguments)(self.read(part)))


def ahead(pool: Mapping[str, Any]) -> int:
    """Return the number of decoded parts that may wait for the actors of `pool`; Ray must be running."""
    return _AHEAD * int(pool["compute"].max_size) + int(ray.cluster_resources().get("CPU", 1))


def encoded(
    parts: Sequence[pa.Table],
    read: ReadImages,
    actor: type[Any],
    arguments: Mapping[str, Any],
    pool: Mapping[str, Any],
) -> Dataset:
    """Return a plan with `read` in tasks on CPUs, then `actor` in a pool of actors; one block per part.

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
            read, batch_size=None, batch_format="pyarrow", num_cpus=1, memory=read_memory(read.max_pixels)
        )
        return ray_internals.map_whole_blocks(images_read, actor, arguments, pool)


def handled(
    parts: Sequence[pa.Table], actor: type[Any], arguments: Mapping[str, Any], pool: Mapping[str, Any]
) -> Dataset:
    """Return a plan with `actor` in a pool of actors, which read and write blocks of the sample list themselves.

    Arguments are those of :func:`encoded`.
    """
    with ray_internals.data_context(whole_blocks=True):
        return ray_internals.map_whole_blocks(ray.data.from_arrow(list(parts)), actor, arguments, pool)


def written(data: Dataset, write: Callable[[pa.Table], pa.Table]) -> Dataset:
    """Add an operator to the plan `data` that writes each part in a task."""
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
    """Compute the parts of `samples` that are missing in `folder`.

    Args:
        recipe: recipe with the maximum share of bad images.
        samples: the sample list.
        folder: URI of the artefact.
        size: samples per part.
        plan: turns parts into a dataset whose last operator is that of `write_part`.
        progress: reports images, and each different note once.
        here: turns one part into `write_part`'s row, in this process; used for a single part if
            `transfgu.runtime.connect.works_here`.

    Returns:
        The summaries of all parts, in order, and Ray Data's statistics for the report, if Ray Data was used.

    Raises:
        UserError: too many bad images, or an error of a task or an actor.
    """
    parts = {part["index"][0].as_py(): part for part in split(samples, size)}
    summaries = {s.part: s for s in _found(folder, parts)}
    missing = [table for part, table in parts.items() if part not in summaries]
    done = sum(s.images for s in summaries.values())

    def check_bad() -> None:
        """Raise UserError as soon as there are too many bad images, even if all others are good."""
        bad = [x for _, summary in sorted(summaries.items()) for x in summary.left_out]
        recipe.dataset.bad_share.check(bad, len(samples), "images", at_least=True)

    if done:
        progress.update(done, len(samples), "images")
    check_bad()
    noted = {""}
    data: Dataset | None = None
    rows: Iterator[tuple[Summary, str]] = iter(())
    if here and len(missing) == 1 and connect.works_here():
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
        check_bad()
    return [summaries[part] for part in parts], {} if data is None else details(data, recipe)


def _told(rows: pa.Table) -> Iterator[tuple[Summary, str]]:
    """Yield the content of rows of :func:`write_part`."""
    for row in rows.to_pylist():
        yield Summary.from_json(row["summary"]), row["note"]


def _made(data: Dataset) -> Iterator[tuple[Summary, str]]:
    with raises_user_errors():
        for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from _told(cast(pa.Table, batch))


def _found(folder: str, parts: Mapping[int, pa.Table]) -> list[Summary]:
    """Return the summaries of parts that exist, are complete, and have the same samples."""
    there = {uri.rsplit("/", 1)[-1]: uri for uri in storage.list_files(folder)}
    wanted = [(there[part_file(part)], table) for part, table in parts.items() if part_file(part) in there]
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda job: read_summary(*job), wanted)
        return [summary for summary in found if summary is not None]


def read_summary(uri: str, part: pa.Table) -> Summary | None:
    """Return the summary of a part's file; None if the file is damaged or of other samples."""
    try:
        metadata = parquet.opened(uri).metadata.metadata or {}
        summary = Summary.from_json(metadata[_METADATA])
    except (UserError, KeyError, ValueError, TypeError):
        return None  # damaged: it is computed again
    return summary if (summary.part, summary.images) == (part["index"][0].as_py(), len(part)) else None
