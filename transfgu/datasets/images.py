"""One image in, one array out, or one reason why not: whatever a file holds, it never ends a run by itself.

Pixels are taken as they are stored, as the published code does: an orientation in EXIF is not applied (the benchmarks'
labels are drawn on stored pixels, and a predicted mask should lie on them too), and transparency is dropped. Of an
animation, the first frame is read. No torch here: decoding runs in many small processes.
"""

import io
import warnings
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Int16, UInt8
from PIL import Image, UnidentifiedImageError

try:
    import cv2
except ImportError:  # Pillow and NumPy then do the same, in more than twice the time
    cv2 = None  # type: ignore[assignment]

from transfgu.datasets.class_lists import Classes
from transfgu.errors import BadInput
from transfgu.store import storage

Size = tuple[int, int]

MAX_PIXELS = 178_956_970  # where Pillow too suspects a small file that would fill the memory
# Pillow warns of large images, which are used, and of damage, which is told as a reason.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Formats that are decoded by a library, never by a program that runs what the file says (as PostScript would be).
Image.init()
_FORMATS = tuple(f for f in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000") if f in Image.OPEN)
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
if cv2 is not None:
    cv2.setNumThreads(1)  # many processes and threads decode at the same time


def read_image(uri: str) -> UInt8[np.ndarray, "H W 3"]:
    """An image's stored pixels as red, green, blue.

    Raises:
        BadInput: missing, empty, unreadable, truncated, too large, or a side of one pixel.
        UserError: the storage fails.
    """
    return decode_image(_read(uri, "image"))


def decode_image(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """As :func:`read_image`, from a file's bytes."""
    if (pixels := _decode_jpeg(data)) is not None:
        return pixels
    picture = _decode(data, "image")
    if min(picture.size) < 2:
        raise BadInput(f"image of {picture.height} x {picture.width} pixels")
    if picture.mode in _WIDE:
        wide = np.asarray(picture).astype(np.int64)
        if wide.min() < 0 or wide.max() > 0xFFFF:
            raise BadInput("image of more than 16 bits a channel")
        grey = ((wide + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode == "F":
        raise BadInput("image of floating-point numbers")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    try:
        return np.array(picture.convert("RGB"))
    except (ValueError, OSError):
        raise BadInput(f"image of mode {picture.mode}, which has no way to RGB") from None


def read_label(uri: str | None, classes: Classes, image_shape: Size | None = None) -> Int16[np.ndarray, "H W"]:
    """A label as class indices, -1 where it is ignored.

    Args:
        uri: a PNG whose pixel values `classes` explains (grey, or indices of a palette).
        classes: from :func:`transfgu.datasets.classes`.
        image_shape: height and width that the label must have, those of its image, pixels; None: any.

    Raises:
        BadInput: missing, unreadable, of another size, or with values that its data set does not have.
        UserError: the storage fails.
    """
    if uri is None:
        raise BadInput("missing label")
    picture = _decode(_read(uri, "label"), "label")
    if picture.mode not in ("L", "P", "1", *_WIDE):
        raise BadInput(f"label of mode {picture.mode}, not one channel of class indices")
    values = np.asarray(picture)
    if image_shape is not None and values.shape != image_shape:
        raise BadInput(f"label of {_by(values.shape)} pixels for an image of {_by(image_shape)}")
    low, high = int(values.min()), int(values.max())
    if not 0 <= low <= high <= 255:
        raise BadInput(f"label value {low if low < 0 else high}, which is no class")
    narrow = values.astype(np.uint8)
    unknown = np.flatnonzero((np.bincount(narrow.ravel(), minlength=256) > 0) & ~classes.known)
    if len(unknown):
        raise BadInput(f"label value {unknown[0]}, which is no class")
    label: Int16[np.ndarray, "H W"] = classes.label_map[narrow]
    return label


def read_mask(uri: str) -> Int16[np.ndarray, "H W"]:
    """A mask of class indices that any program wrote: the values of one channel, or of a palette, as they are stored.

    Raises:
        BadInput: missing, unreadable, of several channels, in a format with loss, or with values beyond 16 bits.
        UserError: the storage fails.
    """
    picture = _decode(_read(uri, "mask"), "mask")
    if picture.mode not in ("L", "P", "1", *_WIDE):
        raise BadInput(f"mask of mode {picture.mode}, not one channel of class indices")
    if picture.format == "JPEG":
        raise BadInput("mask in JPEG, which changes class indices")
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > np.iinfo(np.int16).max:
        raise BadInput("mask of more than 15 bits")
    return values.astype(np.int16)


def resize(
    image: UInt8[np.ndarray, "H W 3"], size: Size, interpolation: Literal["bilinear", "nearest"] = "bilinear"
) -> UInt8[np.ndarray, "3 h w"]:
    """An image brought to `size` (height, width; pixels), channels first.

    Bilinear is torch's `interpolate` without antialias or aligned corners, rounded to whole numbers; nearest is that
    of torch and OpenCV. With OpenCV one value in 2,000 is another by 1 than without, where the exact result lies half
    way between two whole numbers.
    """
    if image.shape[:2] == size:
        return np.ascontiguousarray(image.transpose(2, 0, 1))
    if interpolation == "nearest":
        return np.ascontiguousarray(_nearest(image, size).transpose(2, 0, 1))
    if cv2 is not None and image.shape[:2] != (2 * size[0], 2 * size[1]):  # where OpenCV would round halves upward
        # Of 16-bit numbers OpenCV takes the mean in float32; of 8-bit numbers, in 11 bits and not faster.
        small = cv2.resize(image.astype(np.uint16), size[::-1], interpolation=cv2.INTER_LINEAR)
        planes = np.empty((3, *size), np.uint8)
        cv2.split(small.astype(np.uint8), list(planes))
        return planes
    (y0, y1, wy), (x0, x1, wx) = (_neighbours(n, m) for n, m in zip(image.shape[:2], size, strict=True))
    planes = image.transpose(2, 0, 1).astype(np.float32)
    # The two axes are separate; the one that shrinks more goes first, and leaves less for the other.
    if size[0] * image.shape[1] <= size[1] * image.shape[0]:
        planes = _blend(planes[:, y0], planes[:, y1], wy[:, None])
        planes = _blend(planes[:, :, x0], planes[:, :, x1], wx)
    else:
        planes = _blend(planes[:, :, x0], planes[:, :, x1], wx)
        planes = _blend(planes[:, y0], planes[:, y1], wy[:, None])
    whole: UInt8[np.ndarray, "3 h w"] = np.rint(planes, out=planes).astype(np.uint8)
    return whole


def resize_label(label: Int16[np.ndarray, "H W"], size: Size) -> Int16[np.ndarray, "h w"]:
    """A label brought to `size` (height, width; pixels) by nearest neighbour."""
    return label if label.shape == size else np.ascontiguousarray(_nearest(label, size))


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _read(uri: str, what: str) -> bytes:
    data = storage.read_bytes_or_none(uri)
    if data is None:
        raise BadInput(f"missing {what}")
    return data


def _decode(data: bytes, what: str) -> Image.Image:
    if not data:
        raise BadInput(f"empty {what}")
    try:
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        if picture.width * picture.height > MAX_PIXELS:
            raise BadInput(f"{what} of more than {MAX_PIXELS // 10**6} million pixels")
        picture.load()
        return picture
    except UnidentifiedImageError:
        raise BadInput(f"unreadable {what}") from None
    except Image.DecompressionBombError:
        raise BadInput(f"{what} of more than {MAX_PIXELS // 10**6} million pixels") from None
    except BadInput:
        raise
    except Exception as error:  # decoders meet damage with whatever error lies nearest
        truncated = "truncated" in str(error).lower()
        raise BadInput(f"truncated {what}" if truncated else f"damaged {what}") from None


def _decode_jpeg(data: bytes) -> UInt8[np.ndarray, "H W 3"] | None:
    """Decode a JPEG by OpenCV, whose libjpeg-turbo gives Pillow's pixels, or return None where that is Pillow's work.

    A file must be whole to its end, as OpenCV does not say so where one is cut off.
    """
    if cv2 is None or not (data.startswith(_JPEG_START) and data.endswith(_JPEG_END)):
        return None
    try:
        picture = Image.open(io.BytesIO(data), formats=("JPEG",))  # which reads no more than the header
        if picture.mode not in ("RGB", "L") or min(picture.size) < 2 or picture.width * picture.height > MAX_PIXELS:
            return None
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except Exception:  # Pillow says what is wrong
        return None
    if pixels is None or pixels.shape != (picture.height, picture.width, 3):
        return None
    return cast(np.ndarray, pixels)


def _neighbours(length: int, wanted: int) -> tuple[Any, Any, Any]:
    """For each of `wanted` pixels the two pixels of `length` it lies between, and the second one's weight."""
    centre = np.maximum((np.arange(wanted, dtype=np.float32) + 0.5) * np.float32(length / wanted) - 0.5, 0)
    first = np.minimum(centre.astype(np.intp), length - 1)
    return first, np.minimum(first + 1, length - 1), (centre - first).astype(np.float32)


def _blend(first: Any, second: Any, weight: Any) -> Any:
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
