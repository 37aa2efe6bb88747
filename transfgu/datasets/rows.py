"""Decode rows of a table of URIs to images and labels; bad input is left out, with the reason."""

from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int16, UInt8

from transfgu import datasets
from transfgu.datasets import images
from transfgu.datasets.map_files import PLACE, read_maps
from transfgu.errors import BadInput, UserError
from transfgu.recipe import MAX_PIXELS, Protocol, Recipe, Size
from transfgu.store import storage


def read_training_rows(
    rows: pa.Table, *, size: Size, orient: bool = False, max_pixels: int = MAX_PIXELS
) -> dict[str, Any]:
    """Decode images and maps.

    Args:
        rows: columns `image` (URI), and, if there are maps, `part` and `row`; others are passed on.
        size: images are resized to this, bilinear.
        orient: apply EXIF's orientation.
        max_pixels: maximum size of an image.

    Returns:
        The columns of `rows` except `part` and `row`, `image` as (n, 3, H, W) uint8, and `maps` (n, K + 2, h, w) int16,
            packed as stored (see `packed_maps.unpack_maps`), or without planes.

    Raises:
        UserError: an image that was readable when its maps were computed, and now is not.
    """
    pixels = np.empty((len(rows), 3, *size), np.uint8)
    uris = rows["image"].to_pylist()
    for i, (uri, data) in enumerate(zip(uris, storage.read_many(uris), strict=True)):
        pixels[i] = training_image(uri, data, size, orient=orient, max_pixels=max_pixels)
    passed = {n: rows[n].to_numpy() for n in rows.column_names if n not in ("image", *PLACE)}
    maps = read_maps(rows) if "part" in rows.column_names else np.empty((len(rows), 0, 0, 0), np.int16)
    return {**passed, "image": pixels, "maps": maps}


def read_reasons(rows: pa.Table, *, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """Decode images (column `image`, URIs) to find bad ones: `reason` is empty for good ones."""
    reasons = []
    for uri in rows["image"].to_pylist():
        try:
            images.read_image(uri, max_pixels=max_pixels)
            reasons.append("")
        except BadInput as error:
            reasons.append(str(error))
    return {"reason": np.array(reasons, object)}


def training_image(
    uri: str, data: bytes | None, size: Size, *, orient: bool = False, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "3 H W"]:
    """Decode a training image, bilinear to `size`, from its file's bytes (None: the file is missing).

    Raises:
        UserError: it was readable when its maps were computed, and now is not.
    """
    try:
        return images.resize(images.decode_file(data, orient=orient, max_pixels=max_pixels), size, "bilinear")
    except BadInput as error:
        raise UserError(
            f"{storage.shown(uri)} was read for its pseudo label, but is bad now ({error}): restore it",
            code="image-changed",
        ) from None


def read_labelled_rows(rows: pa.Table, *, recipe: Recipe, protocol: Protocol = "published") -> dict[str, Any]:
    """Decode images and labels; unusable rows are passed on with the reason and a label without pixels to count.

    Args:
        rows: columns `image` (URI), `label` (URI or null); others are passed on.
        recipe: recipe with the images' size (`dataset.image_size`, bilinear) and the labels' classes.
        protocol: "published": labels are resized to the same size, nearest; "label": they are unchanged; "stego": both
            are resized to cover that size and cropped at the centre (for a square: shorter side, centre crop).

    Returns:
        The columns of `rows` except `label`, `image` as (n, 3, H, W) uint8, `label` as bytes of int16 with its `height`
            and `width`, and `reason`, empty for good rows.
    """
    classes, how = datasets.classes(recipe), recipe.dataset
    size = how.image_size
    pixels = np.zeros((len(rows), 3, *size), np.uint8)
    labels, reasons = [], []
    files = storage.read_many(rows["image"].to_pylist())
    for i, (data, label) in enumerate(zip(files, rows["label"].to_pylist(), strict=True)):
        try:
            decoded = images.decode_file(data, orient=how.orient, max_pixels=how.max_pixels)
            truth = images.read_label(label, classes, decoded.shape[:2], max_pixels=how.max_pixels)
            if protocol == "stego":
                decoded = _centre(decoded, size)
            pixels[i] = images.resize(decoded, size, "bilinear")
            labels.append(counted_label(truth, size, protocol))
            reasons.append("")
        except BadInput as error:
            labels.append(np.full((1, 1), -1, np.int16))
            reasons.append(str(error))
    passed = {n: rows[n].to_numpy() for n in rows.column_names if n not in ("image", "label")}
    # As objects, because an array of bytes would drop zeros at the end.
    content = np.array([label.tobytes() for label in labels] + [None], object)[:-1]
    return {
        **passed,
        "image": pixels,
        "label": content,
        "height": np.array([label.shape[0] for label in labels], np.int32),
        "width": np.array([label.shape[1] for label in labels], np.int32),
        "reason": np.array(reasons, object),
    }


def counted_label(label: Int16[np.ndarray, "H W"], size: Size, protocol: Protocol) -> Int16[np.ndarray, "h w"]:
    """Bring a label, or a mask of the same size, to the pixels that a protocol counts; nearest neighbour.

    Args:
        label: at its own resolution.
        size: height and width of the images, pixels.
        protocol: as for :func:`read_labelled_rows`.
    """
    if protocol == "label":
        return label
    if protocol == "stego":
        whole, there = _covering((label.shape[0], label.shape[1]), size)
        return images.resize_label(label, whole)[there]
    return images.resize_label(label, size)


def _centre(image: UInt8[np.ndarray, "H W 3"], size: Size) -> UInt8[np.ndarray, "h w 3"]:
    """Return the centre of an image that was resized to cover `size` (torchvision's `Resize` of the shorter side)."""
    whole, there = _covering((image.shape[0], image.shape[1]), size)
    return np.ascontiguousarray(images.resize(image, whole, "bilinear").transpose(1, 2, 0)[there])


def _covering(shape: Size, size: Size) -> tuple[Size, tuple[slice, slice]]:
    """Return the smallest size of the same proportions that covers `size`, and the position of its centre crop."""
    height, width = shape
    if size[0] * width >= size[1] * height:  # the height determines the scale
        whole = (size[0], max(size[1], width * size[0] // height))
    else:
        whole = (max(size[0], height * size[1] // width), size[1])
    top, left = (round((a - b) / 2) for a, b in zip(whole, size, strict=True))
    return whole, (slice(top, top + size[0]), slice(left, left + size[1]))


def read_plain_rows(
    rows: pa.Table, *, size: Size, orient: bool = False, max_pixels: int = MAX_PIXELS
) -> dict[str, Any]:
    """Decode images without labels, bilinear to `size`; unreadable ones are left out.

    Args:
        rows: column `image` (URI).
        size: of the result, pixels.
        orient: apply EXIF's orientation.
        max_pixels: maximum size of an image.

    Returns:
        `image` as (n, 3, H, W) uint8, and `good`, False for an unreadable one, which is black.
    """
    pixels = np.zeros((len(rows), 3, *size), np.uint8)
    good = np.ones(len(rows), bool)
    for i, data in enumerate(storage.read_many(rows["image"].to_pylist())):
        try:
            pixels[i] = images.resize(images.decode_file(data, orient=orient, max_pixels=max_pixels), size, "bilinear")
        except BadInput:
            good[i] = False
    return {"image": pixels, "good": good}


def usable(columns: dict[str, Any]) -> tuple[UInt8[np.ndarray, "n 3 H W"], list[Int16[np.ndarray, "_ _"]]]:
    """Return images and labels of the rows of :func:`read_labelled_rows` without a reason."""
    good = columns["reason"] == ""
    rows = zip(*(columns[name][good] for name in ("label", "height", "width")), strict=True)
    return columns["image"][good], [np.frombuffer(label, np.int16).reshape(h, w) for label, h, w in rows]
