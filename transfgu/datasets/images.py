"""Decode an image or a label to an array, or raise BadInput with the reason; no file content can end a run.

All images are read by :func:`pixels_of`, so that a file, its bytes, a PIL image and an array of the same picture give
the same pixels. `orient` applies EXIF's orientation, as viewers do; without it pixels are those that are stored, on
which the benchmarks' labels are drawn. Transparency is dropped; of an animation, the first frame is read. Labels are
read as raw samples. No torch here: decoding runs in many small processes.

A file of 20 KB may hold an image that fills the memory, so its size is looked at before it is decoded, and what follows
decoding goes by bands of rows: the whole takes `recipe.DECODING_BYTES` per pixel.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
from jaxtyping import Float32, Int16, Integer, UInt8
from PIL import Image, UnidentifiedImageError

try:
    import cv2
except ImportError:  # Pillow and NumPy do the same, but take twice as long
    cv2 = None  # type: ignore[assignment]
try:
    import pillow_heif
except ImportError:  # the extra `heic`
    pillow_heif = None  # type: ignore[assignment]

from transfgu.datasets.class_lists import Classes
from transfgu.errors import BadInput
from transfgu.recipe import MAX_PIXELS
from transfgu.store import storage

Size = tuple[int, int]
Picture = Image.Image | np.ndarray | bytes | str | Path
"""Inputs of :func:`pixels_of`."""
Item = TypeVar("Item")
Result = TypeVar("Result")

# Ignore Pillow's warnings about large images, which are used, and about damage, which is reported as a reason.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Only formats decoded by a library, not by a program that executes the file (as for PostScript).
Image.init()
if pillow_heif is not None:
    pillow_heif.register_heif_opener(thumbnails=False)
_FORMATS = tuple(
    f for f in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "HEIF") if f in Image.OPEN
)
HEAD = 32
"""Number of bytes at the start of a file that show whether it is an image."""
_STARTS = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    *(b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
)
_HEIF = re.compile(rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)", re.DOTALL)
_LOSSY = ("jpeg", "tiff_jpeg", "webp")  # compressions of a TIFF
_PGM = re.compile(rb"P[25]\s(?:\s|#[^\n]*\n)*\d+(?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+(\d+)")
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_ORIENTATION = 0x0112  # EXIF's and TIFF's tag
_BACK = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # the inverse of each orientation
_LABEL_FORMATS = ("PNG", "TIFF", "GIF", "BMP", "PPM")  # lossless, with one channel
_BAND_PIXELS = 1 << 20  # pixels converted at a time
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
if cv2 is not None:
    cv2.setNumThreads(1)  # many processes and threads decode at the same time


def pixels_of(source: Picture, *, orient: bool = False, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """Return red, green and blue of an image, 8 bits each, from any kind of source.

    Args:
        source: a path or URI; a file's bytes; a PIL image; or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of
            uint8 or uint16. 16-bit greys are divided by 257, a fourth channel is dropped.
        orient: apply EXIF's orientation, if `source` has one.
        max_pixels: maximum size of an image that is decoded here; an array has been.

    Raises:
        BadInput: missing, empty, unreadable, truncated, too large, or a side of one pixel.
        UserError: the storage fails.
    """
    if isinstance(source, np.ndarray):
        return _array_pixels(source)
    if isinstance(source, Image.Image):
        _check_size(source, "image", max_pixels)
        orientation = _orientation(source) if orient else 1
        return _turned(_picture_pixels(source), orientation)
    data = source if isinstance(source, bytes) else _read(str(source), "image")
    return decode_image(data, orient=orient, max_pixels=max_pixels)


def is_image(head: bytes) -> bool:
    """Return True if a file's first :data:`HEAD` bytes are those of an image format."""
    return (
        head.startswith(_STARTS)
        or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")
        or head[4:12] in (b"ftypavif", b"ftypavis")
        or _HEIF.match(head) is not None
    )


def read_image(uri: str, *, orient: bool = False, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """Return the same as :func:`pixels_of`, for a file."""
    return decode_image(_read(uri, "image"), orient=orient, max_pixels=max_pixels)


def decode_file(
    data: bytes | None, *, orient: bool = False, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "H W 3"]:
    """Return the same as :func:`pixels_of`, for a file's bytes, or for None if the file is missing."""
    if data is None:
        raise BadInput("missing image")
    return decode_image(data, orient=orient, max_pixels=max_pixels)


def decode_image(data: bytes, *, orient: bool = False, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """Return the same as :func:`pixels_of`, for a file's bytes."""
    if (pixels := decode_jpeg(data, max_pixels)) is not None:
        return _turned(pixels, _orientation(Image.open(io.BytesIO(data), formats=("JPEG",)))) if orient else pixels
    picture, turned = _decode(data, "image", max_pixels)
    orientation = _orientation(picture) if orient else 1
    pixels = _picture_pixels(picture)
    del picture  # its memory is needed to turn the pixels
    if turned != 1:  # by Pillow, which does this for TIFF only
        return pixels if orient else _turned(pixels, _BACK[turned])
    return _turned(pixels, orientation)


def decode_intensities(data: bytes, max_pixels: int = MAX_PIXELS) -> Float32[np.ndarray, "H W"]:
    """Return the values of a grey image of more than 8 bits as they are stored, from a file's bytes.

    Raises:
        BadInput: unreadable, too large, in colour, or of 8 bits.
    """
    picture, _ = _decode(data, "image", max_pixels)
    if picture.mode not in (*_WIDE, "F"):
        raise BadInput("image of 8 bits or in colour, which needs no window")
    return np.asarray(picture).astype(np.float32)


def encoded(picture: Image.Image, kind: str, **options: int | bool) -> bytes:
    """Return a picture as the bytes of a file.

    Args:
        picture: any that Pillow can write as `kind`.
        kind: Pillow's name of the format, such as `PNG`.
        options: Pillow's for this format, such as `quality`.
    """
    sink = io.BytesIO()
    picture.save(sink, kind, **options)
    return sink.getvalue()


def read_rows(items: Iterable[Item], read: Callable[[Item], Result]) -> Iterator[tuple[Result | None, str]]:
    """Yield the result of `read` for each item, in order, or the reason why the item can't be used.

    Args:
        items: such as URIs, or rows of a table.
        read: raises BadInput for an item that can't be used.

    Yields:
        The result and an empty reason, or None and BadInput's message.
    """
    for item in items:
        try:
            yield read(item), ""
        except BadInput as error:
            yield None, str(error)


def _array_pixels(array: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.dtype not in (np.uint8, np.uint16):
        raise BadInput(f"an array of shape {array.shape} and type {array.dtype}, not (H, W, 3) of uint8 or uint16")
    if min(array.shape[:2]) < 2:
        raise BadInput(f"image of {_by(array.shape[:2])} pixels")
    planes = array.reshape(*array.shape[:2], channels)[..., :3]
    if array.dtype == np.uint16:
        planes = _from_16_bits(planes)
    return planes if planes.shape[2] == 3 else np.repeat(planes, 3, axis=2)


def _from_16_bits(values: np.ndarray) -> UInt8[np.ndarray, "*shape"]:
    narrow: UInt8[np.ndarray, "*shape"] = ((values.astype(np.int64) + 128) // 257).astype(np.uint8)
    return narrow


def _picture_pixels(picture: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    if min(picture.size) < 2:
        raise BadInput(f"image of {picture.height} x {picture.width} pixels")
    try:
        if picture.mode == "F":
            raise BadInput("image of floating-point numbers")
        picture.load()
        pixels = np.empty((picture.height, picture.width, 3), np.uint8)
        for rows in _bands(picture.height, picture.width):
            whole = rows == slice(0, picture.height)
            band = picture if whole else picture.crop((0, rows.start, picture.width, rows.stop))
            if picture.mode in _WIDE:
                values = np.asarray(band)
                if values.min() < 0 or values.max() > 0xFFFF:
                    raise BadInput("image of more than 16 bits a channel")
                pixels[rows] = _from_16_bits(values)[..., None]
                continue
            if band.mode == "P" and "transparency" in band.info:
                band = band.convert("RGBA")
            pixels[rows] = np.asarray(band.convert("RGB"))
        return pixels
    except (ValueError, OSError):  # an opened PIL image may be read only now
        raise BadInput(f"damaged image, or of mode {picture.mode}, which can't be converted to RGB") from None


def _bands(height: int, width: int) -> Iterator[slice]:
    """Yield rows from the top down, in bands of about `_BAND_PIXELS`."""
    rows = max(1, _BAND_PIXELS // width)
    for start in range(0, height, rows):
        yield slice(start, min(height, start + rows))


def _check_size(picture: Image.Image, what: str, most: int) -> None:
    """Raise BadInput if a picture, decoded or not, has more than `most` pixels."""
    if picture.width * picture.height > most:
        raise BadInput(f"{what} of {picture.height} x {picture.width} pixels, more than dataset.max_pixels ({most})")


def _orientation(picture: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8; 1 (as stored) if there is none, or EXIF is damaged."""
    try:
        if picture.format == "TIFF" and not getattr(picture, "is_animated", False):
            picture.load()
            return 1  # Pillow has applied it
        found = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # a parser of foreign bytes may raise anything
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _turned(pixels: Any, orientation: int) -> UInt8[np.ndarray, "H W 3"]:
    """Return stored pixels in an orientation of EXIF (TIFF 6.0, tag 274)."""
    if orientation > 4:  # rows and columns change places
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def read_label(
    uri: str | None, classes: Classes, image_shape: Size | None = None, *, max_pixels: int = MAX_PIXELS
) -> Int16[np.ndarray, "H W"]:
    """Read a label as class indices, -1 for ignored pixels.

    Args:
        uri: a lossless file, such as a PNG, with raw samples for `classes`: grey of 1 to 16 bits, or indices of a
            palette. A 4-bit sample of 3 is class 3, whatever grey viewers show.
        classes: from :func:`transfgu.datasets.classes`.
        image_shape: required height and width, those of the image, pixels; None: any.
        max_pixels: maximum size of a label.

    Raises:
        BadInput: missing, unreadable, in a lossy format, of another size, or with values that the data set does not
            have.
        UserError: the storage fails.
    """
    if uri is None:
        raise BadInput("missing label")
    values = _samples(_read(uri, "label"), "label", max_pixels, image_shape)
    if image_shape is not None and values.shape != image_shape:
        raise BadInput(f"label of {_by(values.shape)} pixels for an image of {_by(image_shape)}")
    low, high = int(values.min()), int(values.max())
    if not 0 <= low <= high <= 255:
        raise BadInput(f"label value {low if low < 0 else high}, which is not a class")
    present = np.zeros(256, bool)
    label = np.empty(values.shape, np.int16)
    for rows in _bands(*values.shape):  # NumPy makes eight bytes of each index
        present[values[rows]] = True
        label[rows] = classes.label_map[values[rows]]
    unknown = np.flatnonzero(present & ~classes.known)
    if len(unknown):
        raise BadInput(f"label value {unknown[0]}, which is not a class")
    return label


def read_mask(uri: str) -> Int16[np.ndarray, "H W"]:
    """Read a mask of class indices from any program: the stored values of one channel, or of a palette.

    Raises:
        BadInput: missing, unreadable, of several channels, in a lossy format, or with values beyond 16 bits.
        UserError: the storage fails.
    """
    values = _samples(_read(uri, "mask"), "mask", MAX_PIXELS)
    if values.min() < 0 or values.max() > np.iinfo(np.int16).max:
        raise BadInput("mask of more than 15 bits")
    return values.astype(np.int16)


def resize(
    image: UInt8[np.ndarray, "H W 3"], size: Size, interpolation: Literal["bilinear", "nearest"] = "bilinear"
) -> UInt8[np.ndarray, "3 h w"]:
    """Return an image resized to `size` (height, width; pixels), channels first.

    Bilinear is torch's `interpolate` without antialias or aligned corners, rounded to whole numbers; nearest is that of
    torch and OpenCV. With OpenCV one value in 2,000 differs by 1, where the exact result is halfway between two whole
    numbers.
    """
    if image.shape[:2] == size:
        return np.ascontiguousarray(image.transpose(2, 0, 1))
    if interpolation == "nearest":
        return np.ascontiguousarray(_nearest(image, size).transpose(2, 0, 1))
    if cv2 is not None and image.shape[:2] != (2 * size[0], 2 * size[1]):  # in this case OpenCV rounds halves upward
        # OpenCV averages 16-bit numbers in float32; 8-bit numbers with 11 bits only, and no faster.
        planes = np.empty((3, *size), np.uint8)
        if image.size > 3 * _BAND_PIXELS:  # a plane after the other takes a third of the memory
            for plane in range(3):
                wide = image[..., plane].astype(np.uint16)
                planes[plane] = cv2.resize(wide, size[::-1], interpolation=cv2.INTER_LINEAR)
            return planes
        small = cv2.resize(image.astype(np.uint16), size[::-1], interpolation=cv2.INTER_LINEAR)
        cv2.split(small.astype(np.uint8), list(planes))
        return planes
    (y0, y1, wy), (x0, x1, wx) = (_neighbours(n, m) for n, m in zip(image.shape[:2], size, strict=True))
    planes = image.transpose(2, 0, 1)
    # The two axes are separable; resize the one with the larger reduction first, which leaves less work.
    if size[0] * image.shape[1] <= size[1] * image.shape[0]:
        planes = _blend(planes[:, y0], planes[:, y1], wy[:, None])
        planes = _blend(planes[:, :, x0], planes[:, :, x1], wx)
    else:
        planes = _blend(planes[:, :, x0], planes[:, :, x1], wx)
        planes = _blend(planes[:, y0], planes[:, y1], wy[:, None])
    whole: UInt8[np.ndarray, "3 h w"] = np.rint(planes, out=planes).astype(np.uint8)
    return whole


def resize_label(label: Int16[np.ndarray, "H W"], size: Size) -> Int16[np.ndarray, "h w"]:
    """Return a label resized to `size` (height, width; pixels) by nearest neighbour."""
    return label if label.shape == size else np.ascontiguousarray(_nearest(label, size))


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _read(uri: str, what: str) -> bytes:
    data = storage.read_bytes_or_none(uri)
    if data is None:
        raise BadInput(f"missing {what}")
    return data


def _samples(data: bytes, what: str, max_pixels: int, image_shape: Size | None = None) -> Integer[np.ndarray, "H W"]:
    """Return the stored samples of an image with one channel; Pillow would scale those of 2 and 4 bits to 8."""
    picture, turned = _decode(data, what, max_pixels, image_shape)
    kind = picture.format or ""
    if kind not in _LABEL_FORMATS or str(picture.info.get("compression")) in _LOSSY:
        if kind in ("JPEG", "MPO", "JPEG2000", "TIFF"):
            raise BadInput(f"{what} in {'JPEG' if kind != 'JPEG2000' else 'JPEG 2000'}, which changes class indices")
        raise BadInput(f"{what} in {kind}, not in a lossless format: PNG, TIFF, GIF, BMP, PGM")
    if picture.mode not in ("L", "P", "1", *_WIDE):
        raise BadInput(f"{what} of mode {picture.mode}, not one channel of class indices")
    values = np.asarray(picture)
    if values.dtype == bool:
        values = values.astype(np.uint8)
    if picture.mode in ("L", "1") or kind == "PPM":
        shown_top = 1 if picture.mode == "1" else 255 if picture.mode == "L" else 0xFFFF
        top, inverted = _depth(picture, data, shown_top)
        if top != shown_top or inverted:
            sample = (np.arange(shown_top + 1) * top + shown_top // 2) // shown_top
            values = _looked_up(values, (top - sample if inverted else sample).astype(values.dtype))
    if turned != 1:
        values = _turned(values[..., None], _BACK[turned])[..., 0]
    return values


def _looked_up(values: Integer[np.ndarray, "H W"], table: Integer[np.ndarray, " n"]) -> Integer[np.ndarray, "H W"]:
    """Replace each value by that of the table, in bands, as NumPy makes eight bytes of each index."""
    found = np.empty(values.shape, table.dtype)
    for rows in _bands(values.shape[0], values.shape[1]):
        found[rows] = table[values[rows]]
    return found


def _depth(picture: Image.Image, data: bytes, shown_top: int) -> tuple[int, bool]:
    """Return the largest sample that a grey image can hold, and whether 0 is stored for white."""
    if picture.format == "PNG" and data[25] == 0:  # IHDR: bit depth, colour type grey
        return min((1 << data[24]) - 1, shown_top), False
    if picture.format == "TIFF":
        tags = cast(Any, picture).tag_v2
        bits = tags.get(258, (1,))[0]
        return (min((1 << int(bits)) - 1, shown_top), tags.get(262) == 0) if picture.mode != "I" else (shown_top, False)
    if picture.format == "PPM" and (header := _PGM.match(data)):
        return int(header[1]), False
    return shown_top, picture.format == "PPM" and picture.mode == "1"  # PBM: 1 is black


def _decode(data: bytes, what: str, max_pixels: int, image_shape: Size | None = None) -> tuple[Image.Image, int]:
    """Decode a picture.

    Args:
        data: a file's bytes.
        what: name of the picture in error messages.
        max_pixels: maximum size.
        image_shape: height and width of the label's image, pixels; None: not a label.

    Returns:
        The picture, and the orientation that Pillow applied by itself, 1 for none.

    Raises:
        BadInput: it can't be used.
    """
    if not data:
        raise BadInput(f"empty {what}")
    try:
        picture = Image.open(io.BytesIO(data), formats=[f for f in _FORMATS if f != "HEIF" or pillow_heif is not None])
        shape = picture.height, picture.width
        if image_shape and shape[0] * shape[1] > max(_BAND_PIXELS, image_shape[0] * image_shape[1]):
            raise BadInput(f"{what} of {_by(shape)} pixels for an image of {_by(image_shape)}")
        _check_size(picture, what, max_pixels)
        turned = 1
        if picture.format == "TIFF" and not getattr(picture, "is_animated", False):
            turned = int(picture.getexif().get(_ORIENTATION, 1))
        picture.load()
        return picture, turned if turned in _BACK else 1
    except UnidentifiedImageError:
        if pillow_heif is None and _HEIF.match(data):
            raise BadInput(f"{what} in HEIC, which needs pip install 'transfgu[heic]'") from None
        raise BadInput(f"unreadable {what}") from None
    except Image.DecompressionBombError:
        raise BadInput(f"{what} of more than {MAX_PIXELS} pixels") from None
    except BadInput:
        raise
    except Exception as error:  # decoders raise various errors for damaged files
        truncated = "truncated" in str(error).lower()
        raise BadInput(f"truncated {what}" if truncated else f"damaged {what}") from None


def decode_jpeg(data: bytes, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"] | None:
    """Decode a JPEG by OpenCV, whose libjpeg-turbo gives Pillow's pixels; return None if Pillow must decode it.

    The file must be complete, because OpenCV does not report truncated files.
    """
    if cv2 is None or not (data.startswith(_JPEG_START) and data.endswith(_JPEG_END)):
        return None
    try:
        picture = Image.open(io.BytesIO(data), formats=("JPEG",))  # reads only the header
        if picture.mode not in ("RGB", "L") or min(picture.size) < 2 or picture.width * picture.height > max_pixels:
            return None
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except Exception:  # Pillow reports the error
        return None
    if pixels is None or pixels.shape != (picture.height, picture.width, 3):
        return None
    return cast(np.ndarray, pixels)


def _neighbours(length: int, wanted: int) -> tuple[Any, Any, Any]:
    """Return for each of `wanted` pixels its two neighbours among `length` pixels, and the weight of the second."""
    centre = np.maximum((np.arange(wanted, dtype=np.float32) + 0.5) * np.float32(length / wanted) - 0.5, 0)
    first = np.minimum(centre.astype(np.intp), length - 1)
    return first, np.minimum(first + 1, length - 1), (centre - first).astype(np.float32)


def _blend(first: Any, second: Any, weight: Any) -> Any:
    first, second = first.astype(np.float32, copy=False), second.astype(np.float32, copy=False)
    second -= first
    second *= weight
    second += first
    return second


def _nearest(pixels: Any, size: Size) -> Any:
    rows, columns = (
        np.minimum((np.arange(m) * np.float32(n / m)).astype(np.intp), n - 1)
        for n, m in zip(pixels.shape[:2], size, strict=True)
    )
    return pixels[rows[:, None], columns]
