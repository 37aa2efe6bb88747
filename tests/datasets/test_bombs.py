"""Small files that hold large images: what decoding them takes, and that a limit is looked at before it is taken."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.refusals import refused
from transfgu import datasets
from transfgu.datasets import images
from transfgu.errors import BadInput
from transfgu.recipe import DECODING_BYTES, MAX_PIXELS, Recipe, preset
from transfgu.runtime import parts

SIDE, LARGE_SIDE = 5_000, 13_000
OTHERS = 64 << 20  # bytes that are no image: files, results, what libraries set aside

# Decodes each file of the list argv[1] in a process of its own, with no more than the stated bytes of address space
# beyond what there is. The processes are forked, as importing the package takes longer than decoding.
PROGRAM = """
import json, os, resource, sys
from transfgu import datasets
from transfgu.datasets import images
from transfgu.recipe import preset

def memory(what):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(what)]
    return int(line.split()[1]) << 10

def decode(path, what, most):
    data = open(path, "rb").read()
    open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
    before, held = memory("VmRSS"), memory("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (held + most, held + most))
    if what == "label":
        found = images.read_label(path, classes).shape
    else:
        found = images.resize(images.decode_image(data, orient=True), (320, 320)).shape
    return memory("VmHWM") - before, found

first, cases = json.loads(sys.argv[1])
classes = datasets.classes(preset("coco-stuff-27"))
images.resize(images.decode_image(open(first, "rb").read()), (4, 4))
for case in cases:
    process = os.fork()
    if not process:
        try:
            print(json.dumps(decode(*case)), flush=True)
        except BaseException as error:
            print(json.dumps(repr(error)), flush=True)
        os._exit(0)
    os.waitpid(process, 0)
"""


def png_of_zeros(side: int, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A black PNG that is written row by row."""
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    row, packed = bytes(1 + (side * channels * depth + 7) // 8), zlib.compressobj(9)
    data = b"".join(packed.compress(row) for _ in range(side)) + packed.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*one) for one in ((b"IHDR", head), *chunks, (b"IDAT", data), (b"IEND", b""))
    )


def jpeg() -> bytes:
    sink = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (SIDE, SIDE)).save(sink, "JPEG", exif=exif)
    return sink.getvalue()


PALETTE = ((b"PLTE", bytes(range(6))), (b"tRNS", b"\0"))
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "large": (lambda: png_of_zeros(LARGE_SIDE, 8, 2), "image"),
    "one bit": (lambda: png_of_zeros(SIDE, 1, 0), "image"),
    "grey": (lambda: png_of_zeros(SIDE, 8, 0), "image"),
    "16-bit grey": (lambda: png_of_zeros(SIDE, 16, 0), "image"),
    "colours": (lambda: png_of_zeros(SIDE, 8, 2), "image"),
    "16-bit colours": (lambda: png_of_zeros(SIDE, 16, 2), "image"),
    "transparent": (lambda: png_of_zeros(SIDE, 8, 6), "image"),
    "transparent palette": (lambda: png_of_zeros(SIDE, 8, 3, *PALETTE), "image"),
    "turned JPEG": (jpeg, "image"),
    "label": (lambda: png_of_zeros(SIDE, 8, 0), "label"),
    "16-bit label": (lambda: png_of_zeros(SIDE, 16, 0), "label"),
    "label of a palette": (lambda: png_of_zeros(SIDE, 1, 3, *PALETTE), "label"),
}


@pytest.mark.processes
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what a process holds is read from /proc")
def test_decoding_takes_what_is_declared(tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.write_bytes(png_of_zeros(64, 8, 2))
    cases = []
    for bomb, (make, what) in BOMBS.items():
        file, side = tmp_path / bomb, LARGE_SIDE if bomb == "large" else SIDE
        file.write_bytes(make())
        cases.append((str(file), what, DECODING_BYTES * side**2 + OTHERS))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([str(first), cases])],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for (bomb, (_, what)), (made, _, most), line in zip(BOMBS.items(), cases, done.stdout.splitlines(), strict=True):
        side, found = LARGE_SIDE if bomb == "large" else SIDE, json.loads(line)
        assert isinstance(found, list), f"{bomb}: {found}"
        taken, shape = found
        assert shape == ([side, side] if what == "label" else [3, 320, 320]), bomb
        print(f"{bomb}: {Path(made).stat().st_size / 1e3:.0f} KB, {taken / side**2:.1f} bytes per pixel")
        assert side**2 < taken < most, bomb  # what is measured is not nothing


def test_a_limit_is_looked_at_before_anything_is_decoded(tmp_path: Path) -> None:
    data = png_of_zeros(100, 8, 2)[:60] + b"damaged, which decoding would find"
    for size, reason in ((10_000, "damaged|truncated"), (9_999, r"100 x 100 pixels.*dataset\.max_pixels \(9999\)")):
        with pytest.raises(BadInput, match=reason):
            images.decode_image(data, max_pixels=size)
    (tmp_path / "a.png").write_bytes(png_of_zeros(20, 8, 0))
    classes = datasets.classes(preset("coco-stuff-27"))
    assert images.read_label(str(tmp_path / "a.png"), classes, (20, 20), max_pixels=400).shape == (20, 20)
    with pytest.raises(BadInput, match=r"dataset\.max_pixels \(399\)"):
        images.read_label(str(tmp_path / "a.png"), classes, max_pixels=399)
    with pytest.raises(BadInput, match="label of 20 x 20 pixels for an image of 4 x 4"):
        images.read_label(str(tmp_path / "a.png"), classes, (4, 4))
    with pytest.raises(BadInput, match=r"dataset\.max_pixels"):
        images.pixels_of(Image.new("L", (5, 5)), max_pixels=24)


def test_a_task_leaves_out_what_is_larger(tmp_path: Path) -> None:
    for name, side in (("a", 8), ("b", 9)):
        (tmp_path / f"{name}.png").write_bytes(png_of_zeros(side, 8, 2))
    listed = pa.table({"index": [0, 1], "name": ["a", "b"], "image": [str(tmp_path / f"{n}.png") for n in "ab"]})
    read = parts.ReadImages(size=(4, 4), interpolation="bilinear", max_pixels=64)
    assert read(listed)["reason"].to_pylist() == [None, "image of 9 x 9 pixels, more than dataset.max_pixels (64)"]


def test_what_the_field_takes() -> None:
    recipe = preset("folder")
    assert recipe.dataset.max_pixels == MAX_PIXELS
    for value in (3, MAX_PIXELS + 1):
        with refused("field-range"):
            recipe.with_fields({"max_pixels": value})


@pytest.mark.parametrize("stage", ["features", "pseudo_labels", "training", "evaluation"])
def test_what_is_left_out_is_another_artefact(stage: str) -> None:
    usual = preset("folder")
    small = usual.with_fields({"max_pixels": 1000})
    assert usual.digest(stage) != small.digest(stage)
    assert usual.digest("samples") == small.digest("samples")
    assert "dataset.max_pixels" in Recipe.stage_fields(usual, stage)


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "P", "CMYK", "1"])
def test_bands_and_planes_change_no_pixel(mode: str) -> None:
    random, side = np.random.default_rng(0), 1030  # two bands, and planes that are resized one by one
    pixels = random.integers(0, 256, (side, side, 4), np.uint8)
    palette = Image.fromarray(pixels[..., 0] % 7, "P")
    palette.putpalette(random.integers(0, 256, 21, np.uint8).tobytes())
    palette.info["transparency"] = 3
    pictures = {
        "RGBA": Image.fromarray(pixels),
        "I;16": Image.fromarray(random.integers(0, 1 << 16, (side, side), np.uint16)),
        "P": palette,
        "CMYK": Image.fromarray(pixels, "CMYK"),
        "1": Image.fromarray(pixels[..., 0]).convert("1"),
    }
    picture = pictures[mode]
    assert picture.mode == mode
    whole = images.pixels_of(picture)
    halves = [images.pixels_of(picture.crop((0, top, side, top + side // 2))) for top in (0, side // 2)]
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    wanted = F.interpolate(torch.from_numpy(whole.transpose(2, 0, 1)[None].copy()).double(), (67, 91), mode="bilinear")
    off = np.abs(images.resize(whole, (67, 91)) - wanted[0].round().numpy())
    assert off.max() <= 1
    assert (off > 0).mean() < 1 / 500  # where the exact result is halfway between two whole numbers
