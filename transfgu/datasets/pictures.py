"""Draw the pictures of reports: images, masks and heat maps as data URIs.

Every region of a mask has the number of its class, as on a map, so readers need not distinguish colours.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from scipy import ndimage

from transfgu.datasets.images import encoded

Colour = tuple[int, int, int]
Pixels = UInt8[np.ndarray, "H W 3"]
Resized = UInt8[np.ndarray, "h w 3"]
Mask = Int[np.ndarray, "H W"]
ResizedMask = Int[np.ndarray, "h w"]

_UNLABELLED = (150, 150, 150)
_EDGE = (20, 20, 20)
_PALE = 225  # colours whose red, green and blue are this at least are hatched: on white they would be invisible
_HATCH_STEP, _HATCH_WIDTH = 8, 2  # distance and width of the lines, px along a row
HATCH = (110, 110, 110)
"""Colour of the lines on pale colours."""
_WRONG = np.array((240, 110, 0), dtype=np.float32)
# Nine colours of viridis, whose lightness rises evenly (van der Walt and Smith, SciPy 2015).
_VIRIDIS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    dtype=np.float32,
)
_SMALLEST = 0.02  # regions with a smaller share of the picture have no number
_EACH = 3  # regions per class with a number
_GAP = 2  # px between tiles
_ROUGH = 96  # px, the longer side of the copy in which places for numbers are searched


@dataclass(frozen=True, kw_only=True)
class Key:
    """A class's number, and its position: percent of the picture's width and height."""

    number: int
    left: float
    top: float


def jpeg(image: Pixels) -> str:
    """Return an image as a data URI."""
    return _data_uri(Image.fromarray(image), "jpeg", quality=82)


def png(image: Pixels) -> str:
    """Return an image as a lossless data URI."""
    return _data_uri(Image.fromarray(image), "png", optimize=True)


def shrink(image: Pixels, side: int) -> Resized:
    """Return the image reduced to a longer side of `side` pixels; smaller images are unchanged."""
    height, width = image.shape[:2]
    factor = side / max(height, width)
    if factor >= 1:
        return image
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def paint(mask: Mask, colours: Sequence[Colour], side: int) -> Resized:
    """Paint a mask in its classes' colours with outlines of regions, the longer side `side` pixels; -1 is grey.

    Colours near white are hatched (:func:`is_pale`).
    """
    mask = _nearest(mask, side)
    table = np.array([*colours, _UNLABELLED], dtype=np.uint8)  # index -1 is the last
    painted: Resized = table[mask]
    y, x = np.ogrid[: mask.shape[0], : mask.shape[1]]
    pale = np.array([*map(is_pale, colours), False])
    painted[pale[mask] & ((x + y) % _HATCH_STEP < _HATCH_WIDTH)] = HATCH
    painted[:, 1:][mask[:, 1:] != mask[:, :-1]] = _EDGE
    painted[1:][mask[1:] != mask[:-1]] = _EDGE
    return painted


def is_pale(colour: Colour) -> bool:
    """Return True if a colour is so near to white that pages hatch it."""
    return min(colour) >= _PALE


def css(colour: Colour) -> str:
    """Return a colour, hatched if it is pale, as a value of CSS's `background`."""
    plain, lines = ("#{:02x}{:02x}{:02x}".format(*c) for c in (colour, HATCH))
    return f"repeating-linear-gradient(135deg, {lines} 0 1.5px, {plain} 1.5px 5px)" if is_pale(colour) else plain


def keys(mask: Mask) -> list[Key]:
    """Return, for each class, the places in its largest regions with the most room for a number."""
    rough = _nearest(mask, _ROUGH)
    found = []
    for number in np.unique(rough[rough >= 0]):
        regions, count = ndimage.label(rough == number)
        sizes = np.bincount(regions.ravel(), minlength=count + 1)[1:]
        for region in np.argsort(-sizes, kind="stable")[:_EACH]:
            if sizes[region] < _SMALLEST * rough.size:
                break
            # Padded, because the picture's border is an edge of a region, too.
            inside = np.pad(regions == 1 + int(region), 1)
            room = ndimage.distance_transform_edt(inside)[1:-1, 1:-1]
            y, x = np.unravel_index(room.argmax(), room.shape)
            height, width = rough.shape
            found.append(Key(number=int(number), left=_percent(int(x), width), top=_percent(int(y), height)))
    return found


def _percent(pixel: int, side: int) -> float:
    return round(100 * (pixel + 0.5) / side, 1)


def describe(mask: Mask, names: Sequence[str], at_most: int = 5) -> str:
    """Describe a mask as text: its largest classes with their shares."""
    counts = np.bincount(mask[mask >= 0].ravel(), minlength=1)
    largest = [int(c) for c in np.argsort(-counts, kind="stable")[:at_most] if counts[c]]
    words = [f"{names[c]} {100 * counts[c] / mask.size:.0f} %" for c in largest]
    more = np.count_nonzero(counts) - len(words)
    return ", ".join(words) + (f" and {more} more" if more else "") if words else "nothing"


def glow(image: Pixels, heat: Float[np.ndarray, "h w"]) -> Pixels:
    """Return the image in dim grey under the colours of `heat`, 0 to 1, by the scale of :func:`colour_scale`."""
    height, width = image.shape[:2]
    grey = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float32)[..., None] * 0.8
    resized = Image.fromarray(heat.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    lit: Pixels = (0.35 * grey + 0.65 * _viridis(np.clip(np.asarray(resized), 0, 1))).round().astype(np.uint8)
    return lit


def colour_scale(width: int, height: int) -> Pixels:
    """Return a bar of the colours from 0, left, to 1, right."""
    row = _viridis(np.linspace(0, 1, width, dtype=np.float32))
    return np.broadcast_to(row.round().astype(np.uint8), (height, width, 3)).copy()


def error_map(image: Pixels, prediction: Mask, label: Mask) -> Pixels:
    """Return the image in grey, with wrong pixels in orange and pixels without a label in flat grey."""
    grey = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float32)[..., None].repeat(3, axis=2)
    wrong = ((label >= 0) & (prediction != label))[..., None]
    painted = np.where(wrong, 0.35 * grey + 0.65 * _WRONG, grey)
    shown: Pixels = np.where((label < 0)[..., None], np.float32(_UNLABELLED[0]), painted).round().astype(np.uint8)
    return shown


def _viridis(values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape 3"]:
    places = np.linspace(0, 1, len(_VIRIDIS))
    return np.stack([np.interp(values, places, channel) for channel in _VIRIDIS.T], axis=-1).astype(np.float32)


def square(picture: Pixels, side: int) -> Resized:
    """Return a picture resized to a square of `side` pixels."""
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR))


def tiles(pictures: Sequence[Pixels], side: int, columns: int) -> Resized:
    """Arrange pictures as squares of `side` pixels, row by row; unused places are grey."""
    rows, step = -(-len(pictures) // columns), side + _GAP
    sheet = np.full((rows * step - _GAP, columns * step - _GAP, 3), _UNLABELLED, dtype=np.uint8)
    for place, picture in enumerate(pictures):
        y, x = place // columns * step, place % columns * step
        sheet[y : y + side, x : x + side] = square(picture, side)
    return sheet


def _nearest(mask: Mask, side: int) -> ResizedMask:
    """Return the mask with a longer side of `side` pixels, by nearest neighbour."""
    height, width = mask.shape
    factor = side / max(height, width)
    rows, columns = (
        np.minimum((np.arange(max(1, round(n * factor))) + 0.5) / factor, n - 1).astype(int) for n in (height, width)
    )
    taken: ResizedMask = mask[rows[:, None], columns]
    return taken


def _data_uri(image: Image.Image, kind: str, **options: int | bool) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(encoded(image, kind, **options)).decode()}"
