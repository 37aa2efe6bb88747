"""Which images make up a batch depends on the seed, the epoch and the step alone, never on who reads them.

So a worker needs no other to know what to read: it takes every `world`-th row of each global batch, and any number of
workers trains on the same batches. An image's maps are read by their place in the pseudo labels' part files, one row
group at a time, so that a shuffled order costs a request an image and nothing is searched for.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int, Int16, UInt8

from transfgu import datasets
from transfgu.datasets import images
from transfgu.errors import BadInput, UserError
from transfgu.recipe import Protocol, Recipe, Size
from transfgu.store import parquet, storage

_OPEN_FILES = 16  # part files a reading process keeps open; a footer takes some 50 KB


@dataclass(frozen=True, kw_only=True)
class Order:
    """In which order an epoch sees the images.

    An epoch is `passes` over the images, shuffled as a whole, cut into global batches of `batch_size`; the rest that
    fills no batch is left for another epoch's shuffle, as published. Fewer images than a batch make one batch.

    A *slot* is one of the `passes * images` places of an epoch: image `slot % images`, on pass `slot // images`.
    """

    images: int
    passes: int
    batch_size: int
    seed: int

    @property
    def batch(self) -> int:
        """Images of a global batch."""
        return min(self.batch_size, self.images * self.passes)

    @property
    def steps(self) -> int:
        """Global batches of an epoch."""
        return self.images * self.passes // self.batch

    def epoch(self, epoch: int) -> Int[np.ndarray, "steps batch"]:
        """The slots of every global batch of an epoch."""
        slots = np.random.default_rng([self.seed, epoch]).permutation(self.images * self.passes)
        return slots[: self.steps * self.batch].reshape(self.steps, self.batch)

    def share(self, epoch: int, rank: int, world: int) -> Int[np.ndarray, "steps rows"]:
        """What worker `rank` of `world` takes of every global batch; `rows` may be 0 where workers outnumber images."""
        return self.epoch(epoch)[:, rank::world]


def index_maps(parts: list[str]) -> pa.Table:
    """Where each image's maps lie: `index` (of the sample) int32, `part` (URI) string, `row` (within it) int32."""

    def read(part: str) -> pa.Table:
        with parquet.opened(part) as file:
            index = file.read(columns=["index"]).column("index").cast(pa.int32())
        return pa.table(
            {
                "index": index,
                "part": pa.array([part] * len(index), pa.string()),
                "row": pa.array(np.arange(len(index), dtype=np.int32)),
            }
        )

    # A part's footer and one small column: requests, not bytes, are what takes time.
    with ThreadPoolExecutor(16) as pool:
        return pa.concat_tables(pool.map(read, parts))


def read_training_rows(rows: pa.Table, *, size: Size) -> dict[str, Any]:
    """Decode images and maps.

    Args:
        rows: columns `image` (URI), `part`, `row`; others are passed on.
        size: images are resized to this, bilinear.

    Returns:
        The columns of `rows` but `part` and `row`, `image` as (n, 3, H, W) uint8, and `maps` (n, K + 2, h, w) int16,
        packed as they are kept (see `packed_maps.unpack_maps`).

    Raises:
        UserError: an image that could be read when its maps were made, and now can't.
    """
    pixels = np.empty((len(rows), 3, *size), np.uint8)
    for i, uri in enumerate(rows["image"].to_pylist()):
        try:
            pixels[i] = images.resize(images.read_image(uri), size, "bilinear")
        except BadInput as error:
            raise UserError(
                f"{storage.shown(uri)} was read for its pseudo label, and now is bad ({error}): put it back"
            ) from None
    passed = {n: rows[n].to_numpy() for n in rows.column_names if n not in ("image", "part", "row")}
    return {**passed, "image": pixels, "maps": read_maps(rows)}


def read_labelled_rows(rows: pa.Table, *, recipe: Recipe, protocol: Protocol = "published") -> dict[str, Any]:
    """Decode images and labels; what can't be used is passed on with the reason and a label that counts nothing.

    Args:
        rows: columns `image` (URI), `label` (URI or null); others are passed on.
        recipe: says the images' size (`dataset.image_size`, bilinear) and the labels' classes.
        protocol: "published": labels are resized to the same, nearest; "label": they stay as they are; "stego": both
            are resized until they just cover that size, and what juts out is cut off evenly (for a square: shorter
            side, centre crop).

    Returns:
        The columns of `rows` but `label`, `image` as (n, 3, H, W) uint8, `label` as bytes of int16 with its `height`
        and `width`, and `reason`, empty where all is well.
    """
    classes, size = datasets.classes(recipe), recipe.dataset.image_size
    pixels = np.zeros((len(rows), 3, *size), np.uint8)
    labels, reasons = [], []
    for i, (image, label) in enumerate(zip(rows["image"].to_pylist(), rows["label"].to_pylist(), strict=True)):
        try:
            decoded = images.read_image(image)
            truth = images.read_label(label, classes, decoded.shape[:2])
            if protocol == "stego":
                decoded, truth = _centre(decoded, truth, size)
            pixels[i] = images.resize(decoded, size, "bilinear")
            labels.append(truth if protocol == "label" else images.resize_label(truth, size))
            reasons.append("")
        except BadInput as error:
            labels.append(np.full((1, 1), -1, np.int16))
            reasons.append(str(error))
    passed = {n: rows[n].to_numpy() for n in rows.column_names if n not in ("image", "label")}
    # As objects: an array of bytes would drop the zeros at their end.
    content = np.array([label.tobytes() for label in labels] + [None], object)[:-1]
    return {
        **passed,
        "image": pixels,
        "label": content,
        "height": np.array([label.shape[0] for label in labels], np.int32),
        "width": np.array([label.shape[1] for label in labels], np.int32),
        "reason": np.array(reasons, object),
    }


def _centre(
    image: UInt8[np.ndarray, "H W 3"], label: Int16[np.ndarray, "H W"], size: Size
) -> tuple[UInt8[np.ndarray, "h w 3"], Int16[np.ndarray, "h w"]]:
    """Image and label resized to cover `size` (torchvision's `Resize` of a shorter side), and its centre of them."""
    height, width = image.shape[:2]
    if size[0] * width >= size[1] * height:  # too low for that width
        whole = (size[0], max(size[1], width * size[0] // height))
    else:
        whole = (max(size[0], height * size[1] // width), size[1])
    top, left = (round((a - b) / 2) for a, b in zip(whole, size, strict=True))
    there = (slice(top, top + size[0]), slice(left, left + size[1]))
    resized = images.resize(image, whole, "bilinear").transpose(1, 2, 0)
    return np.ascontiguousarray(resized[there]), images.resize_label(label, whole)[there]


def read_plain_rows(rows: pa.Table, *, size: Size) -> dict[str, Any]:
    """Decode images alone, bilinear to `size`; what can't be read is left out.

    Args:
        rows: column `image` (URI).
        size: of the result, pixels.

    Returns:
        `image` as (n, 3, H, W) uint8, and `good`, whether it is one; a bad one is black.
    """
    pixels = np.zeros((len(rows), 3, *size), np.uint8)
    good = np.ones(len(rows), bool)
    for i, uri in enumerate(rows["image"].to_pylist()):
        try:
            pixels[i] = images.resize(images.read_image(uri), size, "bilinear")
        except BadInput:
            good[i] = False
    return {"image": pixels, "good": good}


def usable(columns: dict[str, Any]) -> tuple[UInt8[np.ndarray, "n 3 H W"], list[Int16[np.ndarray, "_ _"]]]:
    """Images and labels of those rows of :func:`read_labelled_rows` that give no reason against it."""
    good = columns["reason"] == ""
    rows = zip(*(columns[name][good] for name in ("label", "height", "width")), strict=True)
    return columns["image"][good], [np.frombuffer(label, np.int16).reshape(h, w) for label, h, w in rows]


def read_maps(rows: pa.Table) -> Int16[np.ndarray, "n planes h w"]:
    """Packed maps of the images whose places `part` and `row` say; each row group is read once."""
    wanted: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for i, (part, row) in enumerate(zip(rows["part"].to_pylist(), rows["row"].to_pylist(), strict=True)):
        group, offset = _place(part, row)
        wanted.setdefault((part, group), []).append((i, offset))
    found: dict[int, np.ndarray] = {}
    for (part, group), places in sorted(wanted.items()):
        table = _cached(part).read_row_group(group, columns=["maps", "h", "w"])
        for i, offset in places:
            h, w = table["h"][offset].as_py(), table["w"][offset].as_py()
            found[i] = np.frombuffer(table["maps"][offset].as_buffer(), np.int16).reshape(-1, h, w)
    return np.stack([found[i] for i in range(len(rows))])


def _place(part: str, row: int) -> tuple[int, int]:
    """The row group that holds a row, and the row's place in it."""
    metadata = _cached(part).metadata
    for group in range(metadata.num_row_groups):
        if row < (rows := metadata.row_group(group).num_rows):
            return group, row
        row -= rows
    raise UserError(f"{storage.shown(part)} is shorter than it was: delete the pseudo labels' folder to make them anew")


@functools.lru_cache(maxsize=_OPEN_FILES)
def _cached(part: str) -> pq.ParquetFile:
    return parquet.opened(part)
