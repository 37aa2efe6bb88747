"""Draw the images of the embedded demonstration; each has its own random generator, seeded by `(seed, split, index)`.

So any worker can draw any image, in any order, and nothing is stored, sent or downloaded: labelled scenes for the
method, and pictures of single objects, without labels, for pretraining.

A *thing* has a characteristic shape and texture, and any colour. *Stuff* has a characteristic texture; its colours are
in a broad, characteristic range (walls are reddish, meadows greenish), as they are outdoors.
"""

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from numpy import ndarray
from scipy.ndimage import gaussian_filter, zoom

THINGS = ("target", "quilt", "pennant", "star", "ring", "cross")
STUFF = ("water", "sky", "wall", "meadow")
CLASS_NAMES = THINGS + STUFF
# In the report: red, yellow, orange, pink, purple, white for things; blue, pale blue, brown, green for stuff.
CLASS_COLOURS = (
    (228, 26, 28),
    (255, 221, 51),
    (255, 127, 0),
    (247, 104, 161),
    (129, 45, 180),
    (245, 245, 245),
    (31, 90, 180),
    (160, 205, 235),
    (140, 86, 65),
    (77, 160, 70),
)
SCENE_SIZE = 128  # px
OBJECT_SIZE = 72  # px

_SUPERSAMPLING = 2  # drawing at twice the size smooths edges
_STREAMS = {"train": 0, "val": 1, "objects": 2}

Random = np.random.Generator
Plane = Float[ndarray, "h w"]
Mask = Bool[ndarray, "h w"]
Pixels = Float[ndarray, "h w 3"]
Colour = Float[ndarray, " 3"]


@dataclass(frozen=True, kw_only=True)
class _Canvas:
    """Coordinates of an image drawn at `_SUPERSAMPLING` times its size, in pixels of the final one."""

    x: Plane
    y: Plane

    @classmethod
    def square(cls, size: int) -> "_Canvas":
        axis = (np.arange(size * _SUPERSAMPLING, dtype=np.float32) + 0.5) / _SUPERSAMPLING
        y, x = np.meshgrid(axis, axis, indexing="ij")
        return cls(x=x, y=y)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.x.shape[0], self.x.shape[1])


def scene(
    seed: int,
    split: str,
    index: int,
    size: int = SCENE_SIZE,
    *,
    things: Sequence[int] = range(len(THINGS)),
    stuff: Sequence[int] = range(len(STUFF)),
) -> tuple[UInt8[ndarray, "H W 3"], UInt8[ndarray, "H W"]]:
    """Draw a labelled scene: one or two stuff regions with a wavy border, and one to three things on them.

    Args:
        seed: the data set's seed.
        split: "train" or "val".
        index: number of the scene in the split; unlimited.
        size: side, px.
        things: kinds of things that are drawn, as indices into `THINGS`; one at least.
        stuff: kinds of stuff, as indices into `STUFF`; two at least.

    Returns:
        image (size, size, 3) and label (size, size), an index into `CLASS_NAMES`.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split {split!r} is not one of train, val")
    random = _random(seed, split, index)
    canvas = _Canvas.square(size)
    first, second = (stuff[int(kind)] for kind in random.choice(len(stuff), 2, replace=False))
    lens = _Lens(blur=float(random.uniform(0.2, 0.8)), contrast=float(random.uniform(0.5, 0.9)))
    pixels = lens.beyond_focus(_draw_stuff(first, canvas, random))
    label = np.full(canvas.shape, len(THINGS) + first, np.uint8)
    if random.random() < 0.8:
        beyond = _beyond_wavy_border(canvas, size, random)
        pixels = np.where(beyond[..., None], lens.beyond_focus(_draw_stuff(second, canvas, random)), pixels)
        label[beyond] = len(THINGS) + second
    placed: list[tuple[float, float, float]] = []
    wanted = int(random.integers(1, 4))
    for _ in range(8 * wanted):  # a crowded scene may end with fewer
        if len(placed) == wanted:
            break
        radius = size * float(random.uniform(0.18, 0.30))
        x, y = (float(c) for c in random.uniform(0.12, 0.88, 2) * size)
        if all(np.hypot(x - x2, y - y2) > 0.85 * (radius + radius2) for x2, y2, radius2 in placed):
            placed.append((x, y, radius))
            kind = things[int(random.integers(len(things)))]
            pixels, inside = _paste_thing(pixels, kind, x, y, radius, canvas, random)
            label[inside] = kind
    centres = slice(_SUPERSAMPLING // 2, None, _SUPERSAMPLING)
    return _finish(pixels, random), np.ascontiguousarray(label[centres, centres])


def object_image(seed: int, index: int, size: int = OBJECT_SIZE) -> UInt8[ndarray, "H W 3"]:
    """Draw a picture for pretraining: a thing in front of a background out of focus, or stuff alone."""
    return object_image_and_class(seed, index, size)[0]


def object_image_and_class(seed: int, index: int, size: int = OBJECT_SIZE) -> tuple[UInt8[ndarray, "H W 3"], int]:
    """Return the picture of `object_image` with its class, for measurements only, not for training."""
    random = _random(seed, "objects", index)
    canvas = _Canvas.square(size)
    background = int(random.integers(len(STUFF)))
    pixels = _draw_stuff(background, canvas, random)
    if random.random() < 0.3:
        lens = _Lens(blur=float(random.uniform(0, 1)), contrast=float(random.uniform(0.5, 1)))
        return _finish(lens.beyond_focus(pixels), random), len(THINGS) + background
    lens = _Lens(blur=float(random.uniform(0, 2)), contrast=float(random.uniform(0.3, 0.9)))
    pixels = lens.beyond_focus(pixels)
    kind = int(random.integers(len(THINGS)))
    radius = size * float(random.uniform(0.3, 0.5))
    x, y = (float(c) for c in (0.5 + random.uniform(-0.12, 0.12, 2)) * size)
    pixels, _ = _paste_thing(pixels, kind, x, y, radius, canvas, random)
    return _finish(pixels, random), kind


def _random(seed: int, stream: str, index: int) -> Random:
    return np.random.default_rng((seed, _STREAMS[stream], index))


def _finish(pixels: Pixels, random: Random) -> UInt8[ndarray, "H W 3"]:
    """Average the supersampled pixels, in [0, 1], and add a camera's noise."""
    height, width = (side // _SUPERSAMPLING for side in pixels.shape[:2])
    small = pixels.reshape(height, _SUPERSAMPLING, width, _SUPERSAMPLING, 3).mean((1, 3))
    noisy = small + 0.015 * random.standard_normal(small.shape)
    finished: UInt8[ndarray, "H W 3"] = (np.clip(noisy, 0, 1) * 255).round().astype(np.uint8)
    return finished


def _rotate(x: Plane, y: Plane, angle: float) -> tuple[Plane, Plane]:
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _blend(low: Colour, high: Colour, tone: Shaped[ndarray, "h w"]) -> Pixels:
    """Map (h, w) tones in [0, 1] to (h, w, 3) colours from `low` to `high`."""
    mixed: Pixels = (low + (high - low) * tone[..., None]).astype(np.float32)
    return mixed


def _beyond_wavy_border(canvas: _Canvas, size: int, random: Random) -> Mask:
    along, across = _rotate(canvas.x - size / 2, canvas.y - size / 2, random.uniform(0, 2 * np.pi))
    wave = 6 * np.sin(along / 18 + random.uniform(0, 2 * np.pi))
    beyond: Mask = across + wave > random.uniform(-0.2, 0.2) * size
    return beyond


@dataclass(frozen=True, kw_only=True)
class _Lens:
    """A lens focused on the things: the background is blurred and loses contrast, as in most photographs of things."""

    blur: float  # standard deviation, pixels of the final image
    contrast: float  # remaining share of the contrast

    def beyond_focus(self, pixels: Pixels) -> Pixels:
        sigma = self.blur * _SUPERSAMPLING
        blurred = gaussian_filter(pixels, (sigma, sigma, 0))
        mean = pixels.mean((0, 1))
        pale: Pixels = (mean + self.contrast * (blurred - mean)).astype(np.float32)
        return pale


# ---- stuff: (x, y) in pixels -> tones in [0, 1]


def _water(x: Plane, y: Plane, scale: float, random: Random) -> Plane:
    crest = y + 4.5 * scale * np.sin(2 * np.pi * x / (26 * scale))
    ripple = 0.5 + 0.5 * np.sin(2 * np.pi * crest / (16 * scale))
    tone: Plane = ripple**1.3
    return tone


def _sky(x: Plane, y: Plane, scale: float, random: Random) -> Plane:
    height, width = x.shape
    step = 8 * scale * _SUPERSAMPLING
    coarse = random.standard_normal((int(height / step) + 4, int(width / step) + 4))
    smooth = zoom(coarse, step, order=3)[:height, :width]
    tone: Plane = np.clip(0.5 + 0.3 * smooth / smooth.std(), 0, 1)
    return tone


def _wall(x: Plane, y: Plane, scale: float, random: Random) -> Plane:
    width, height, mortar = 15 * scale, 7.5 * scale, 1.6
    row = np.floor(y / height)
    shifted = x + row % 2 * width / 2
    brick = (shifted % width > mortar) & (y % height > mortar)
    shade = 0.72 + 0.28 * np.sin(12.9 * row + 78.2 * np.floor(shifted / width))  # each brick its own
    tone: Plane = 1 - brick * shade
    return tone


def _meadow(x: Plane, y: Plane, scale: float, random: Random) -> Plane:
    long, thin = 2.2 * scale * _SUPERSAMPLING, 0.65 * scale * _SUPERSAMPLING
    blades = gaussian_filter(random.standard_normal(x.shape), (long, thin))
    tone: Plane = np.clip(0.5 + blades / blades.std() / 3, 0, 1)
    return tone


_Stuff = Callable[[Plane, Plane, float, Random], Plane]
# texture; centre and half width of the hue's range, turns; saturations, then values, of the dark and the light tone
_STUFF: tuple[tuple[_Stuff, float, float, tuple[float, float], tuple[float, float]], ...] = (
    (_water, 0.55, 0.12, (0.55, 0.35), (0.38, 0.72)),
    (_sky, 0.60, 0.18, (0.42, 0.10), (0.62, 0.92)),
    (_wall, 0.04, 0.12, (0.50, 0.18), (0.48, 0.78)),
    (_meadow, 0.27, 0.12, (0.60, 0.45), (0.25, 0.62)),
)


def _draw_stuff(kind: int, canvas: _Canvas, random: Random) -> Pixels:
    """Draw stuff that fills the canvas; (H', W', 3)."""
    texture, hue_centre, hue_spread, saturations, values = _STUFF[kind]
    x, y = _rotate(canvas.x, canvas.y, random.uniform(-0.4, 0.4))
    x, y = x + np.float32(random.uniform(200, 300)), y + np.float32(random.uniform(200, 300))
    tone = texture(x, y, float(random.uniform(0.8, 1.25)), random)
    hue = hue_centre + random.uniform(-hue_spread, hue_spread)
    exposure, vividness = random.uniform(0.85, 1.1), random.uniform(0.6, 1.1)
    dark, light = (
        _hsv(hue + random.uniform(-0.04, 0.04), min(1.0, s * vividness), min(1.0, v * exposure))
        for s, v in zip(saturations, values, strict=True)
    )
    return _blend(dark, light, tone)


# ---- things: (u, v) in units of the radius -> inside (h, w) bool, tones in [0, 1]

Drawing = tuple[Mask, Shaped[ndarray, "h w"]]


def _target(u: Plane, v: Plane) -> Drawing:
    r = np.hypot(u, v)
    return r < 0.95, np.sin(2 * np.pi * 1.9 * r + 1) > 0


def _quilt(u: Plane, v: Plane) -> Drawing:
    return np.maximum(abs(u), abs(v)) < 0.82, (np.floor(u / 0.33) + np.floor(v / 0.33)) % 2


def _pennant(u: Plane, v: Plane) -> Drawing:
    return (v > -0.6) & (1.7 * abs(u) < 1.1 - v), np.sin(2 * np.pi * 3.2 * v) > 0


def _star(u: Plane, v: Plane) -> Drawing:
    fifth = 2 * np.pi / 5
    from_notch = abs((np.arctan2(v, u) + np.pi) % fifth - fifth / 2) / (fifth / 2)
    dots = np.hypot(u % 0.34 - 0.17, v % 0.34 - 0.17) < 0.1
    return np.hypot(u, v) < 0.52 + 0.6 * from_notch, dots


def _ring(u: Plane, v: Plane) -> Drawing:
    # Grains of granite: a hash of the cell's position, as good as random numbers.
    grain = np.abs(np.sin(np.floor(u / 0.09) * 127.1 + np.floor(v / 0.09) * 311.7) * 43758.5453) % 1
    return abs(np.hypot(u, v) - 0.66) < 0.34, grain


def _cross(u: Plane, v: Plane) -> Drawing:
    bars = (abs(u) < 0.38) & (abs(v) < 1) | (abs(v) < 0.38) & (abs(u) < 1)
    return bars, (u % 0.22 < 0.08) | (v % 0.22 < 0.08)


_THINGS: tuple[Callable[[Plane, Plane], Drawing], ...] = (_target, _quilt, _pennant, _star, _ring, _cross)


def _thing_colours(kind: int, random: Random) -> tuple[Colour, Colour]:
    """Return the colours of tone 0 and tone 1: one of any hue, and its counterpart."""
    hue, saturation, value = random.random(), random.uniform(0.7, 1), random.uniform(0.75, 1)
    colour, deep = _hsv(hue, saturation, value), _hsv(hue, saturation, 0.45 * value)
    white = _hsv(hue, random.uniform(0, 0.15), random.uniform(0.9, 1.0))
    black = _hsv(hue, random.uniform(0, 0.6), random.uniform(0.02, 0.15))
    opposite = _hsv(hue + random.uniform(0.4, 0.6), saturation, value)
    pairs = (
        (opposite, colour),
        (black, colour),
        (white, colour),
        (deep, white),
        (black, white),
        (white, colour),
    )
    return pairs[kind]


def _paste_thing(
    pixels: Pixels, kind: int, x: float, y: float, radius: float, canvas: _Canvas, random: Random
) -> tuple[Pixels, Mask]:
    """Draw a thing with a soft shadow over `pixels`; returns the result, and the mask of the thing."""
    u, v = _rotate((canvas.x - x) / radius, (canvas.y - y) / radius, random.uniform(0, 2 * np.pi))
    u = u * np.float32(random.uniform(0.9, 1.1))
    inside, tone = _THINGS[kind](u, v)
    colours = _blend(*_thing_colours(kind, random), tone)
    shadow = gaussian_filter(inside.astype(np.float32), 1.5 * _SUPERSAMPLING)
    shadow = np.roll(shadow, (_SUPERSAMPLING, _SUPERSAMPLING), (0, 1))
    shaded = pixels * (1 - 0.45 * shadow[..., None])
    return np.where(inside[..., None], colours, shaded).astype(np.float32), inside
