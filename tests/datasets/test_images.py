"""Decoding: every pixel format gives the same eight-bit picture; resizing equals torch's."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from torch.nn import functional as F

from transfgu import datasets
from transfgu.datasets import images
from transfgu.errors import BadInput
from transfgu.recipe import preset

# One row: black, mid grey, white, red.
PIXELS = np.array([[[0, 0, 0], [128, 128, 128], [255, 255, 255], [255, 0, 0]]] * 2, np.uint8)
GREYS = PIXELS[:, :3]


def encode(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind, **options)
    return sink.getvalue()


def rgb() -> Image.Image:
    return Image.fromarray(PIXELS)


def grey() -> Image.Image:
    return Image.fromarray(GREYS[..., 0])


def animation() -> bytes:
    frames = [Image.fromarray(GREYS[..., 0]), Image.new("L", (3, 2), 77)]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


def transparent_palette() -> Image.Image:
    picture = rgb().quantize(4)
    picture.info["transparency"] = 0
    return picture


def translucent() -> Image.Image:
    picture = rgb()
    picture.putalpha(Image.new("L", (4, 2), 3))
    return picture


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(encode(rgb()), PIXELS, id="rgb"),
        pytest.param(encode(rgb(), "BMP"), PIXELS, id="bmp"),
        pytest.param(encode(rgb(), "TIFF"), PIXELS, id="tiff"),
        pytest.param(encode(rgb(), "WEBP", lossless=True), PIXELS, id="webp"),
        pytest.param(encode(rgb(), "PPM"), PIXELS, id="ppm"),
        pytest.param(encode(translucent()), PIXELS, id="alpha is dropped"),
        pytest.param(encode(rgb().quantize(4)), PIXELS, id="palette"),
        pytest.param(encode(transparent_palette(), transparency=b"\x00\x40"), PIXELS, id="palette with transparency"),
        pytest.param(encode(grey()), GREYS, id="greyscale"),
        pytest.param(encode(grey().convert("LA")), GREYS, id="greyscale with alpha"),
        pytest.param(animation(), GREYS, id="animation: its first frame"),
        pytest.param(encode(Image.fromarray(GREYS[..., 0].astype(np.uint16) * 257)), GREYS, id="16-bit PNG"),
        pytest.param(encode(Image.fromarray(GREYS[..., 0].astype(np.uint16) * 257), "TIFF"), GREYS, id="16-bit TIFF"),
        pytest.param(
            encode(Image.fromarray(GREYS[..., 0].astype(np.int32) * 257), "TIFF"), GREYS, id="32-bit TIFF of 16"
        ),
        pytest.param(encode(Image.fromarray(GREYS[:, ::2, 0] > 0)), GREYS[:, ::2], id="one bit"),
        pytest.param(encode(rgb().convert("CMYK"), "TIFF"), PIXELS, id="CMYK"),
        pytest.param(encode(rgb(), exif=Image.Exif()), PIXELS, id="exif"),
    ],
)
def test_pixel_formats(data: bytes, expected: np.ndarray) -> None:
    decoded = images.decode_image(data)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, expected)


def test_cmyk_jpeg() -> None:
    flat = Image.new("RGB", (16, 16), (200, 40, 90))
    decoded = images.decode_image(encode(flat.convert("CMYK"), "JPEG", quality=95))
    np.testing.assert_allclose(decoded, np.broadcast_to([200, 40, 90], (16, 16, 3)), atol=4)


# Two rows of three greys, and how a viewer shows them under each orientation of EXIF (TIFF 6.0, tag 274), by hand.
STORED = [[0, 50, 100], [150, 200, 250]]
SHOWN = {
    1: [[0, 50, 100], [150, 200, 250]],
    2: [[100, 50, 0], [250, 200, 150]],
    3: [[250, 200, 150], [100, 50, 0]],
    4: [[150, 200, 250], [0, 50, 100]],
    5: [[0, 150], [50, 200], [100, 250]],
    6: [[150, 0], [200, 50], [250, 100]],
    7: [[250, 100], [200, 50], [150, 0]],
    8: [[100, 250], [50, 200], [0, 150]],
}


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "array"])
def test_orientation_is_applied_where_it_is_asked_for(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Blocks of 16 pixels of one colour, which JPEG keeps but for rounding.
    stored = np.kron(np.array(STORED, np.uint8), np.ones((16, 16), np.uint8))
    shown = np.kron(np.array(SHOWN[orientation], np.uint8), np.ones((16, 16), np.uint8))
    if kind == "array":
        np.testing.assert_array_equal(images.pixels_of(stored, orient=True)[..., 2], stored)
        return
    picture = Image.fromarray(stored).convert("RGB")
    options = {"quality": 98} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encode(picture, kind, exif=exif.tobytes() if kind != "TIFF" else exif, **options)
    (tmp_path / "x").write_bytes(data)
    for form in (data, tmp_path / "x", str(tmp_path / "x"), Image.open(tmp_path / "x")):
        np.testing.assert_allclose(images.pixels_of(form, orient=True)[..., 1].astype(int), shown, atol=2)
    np.testing.assert_allclose(images.decode_image(data)[..., 1].astype(int), stored, atol=2)


def test_damaged_exif_turns_nothing() -> None:
    data = encode(rgb().resize((16, 16)), "JPEG", exif=b"Exif\0\0nonsense")
    np.testing.assert_array_equal(images.decode_image(data, orient=True), images.decode_image(data))


def test_16_bits_are_scaled_alike_in_every_form(tmp_path: Path) -> None:
    wide = np.array([[0, 128 * 257, 65535], [257, 300, 1]], np.uint16)
    expected = np.array([[0, 128, 255], [1, 1, 0]], np.uint8)
    Image.fromarray(wide).save(tmp_path / "x.png")
    for form in (wide, wide[..., None], str(tmp_path / "x.png"), Image.open(tmp_path / "x.png")):
        np.testing.assert_array_equal(images.pixels_of(form), np.repeat(expected[..., None], 3, 2))
    colours = np.stack([wide, wide, wide, np.zeros_like(wide)], 2)
    np.testing.assert_array_equal(images.pixels_of(colours), np.repeat(expected[..., None], 3, 2))


@pytest.mark.parametrize(
    "array", [np.zeros((0, 0, 3), np.uint8), np.zeros((4, 4)), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)]
)
def test_arrays_that_are_no_image(array: np.ndarray) -> None:
    with pytest.raises(BadInput):
        images.pixels_of(array)


def grey_png(values: np.ndarray, depth: int) -> bytes:
    """A PNG of grey samples of 1 to 16 bits, packed by hand."""
    rows = b""
    for row in values:
        bits = "".join(f"{v:0{depth}b}" for v in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")

    def piece(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    head = values.shape[1].to_bytes(4, "big") + values.shape[0].to_bytes(4, "big") + bytes([depth, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + piece(b"IHDR", head) + piece(b"IDAT", zlib.compress(rows)) + piece(b"IEND", b"")


def grey_tiff(values: np.ndarray, depth: int, *, white_is_zero: bool) -> bytes:
    rows = b""
    for row in values:
        bits = "".join(f"{v:0{depth}b}" for v in row)
        bits += "0" * (-len(bits) % 8)
        rows += int(bits, 2).to_bytes(len(bits) // 8, "big")
    height, width = values.shape
    tags = [(256, width), (257, height), (258, depth), (259, 1), (262, 0 if white_is_zero else 1), (273, 8)]
    tags += [(277, 1), (278, height), (279, len(rows))]
    offset = 8 + len(rows)
    head = b"II*\0" + offset.to_bytes(4, "little")
    directory = len(tags).to_bytes(2, "little")
    for tag, value in tags:
        directory += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
    return head + rows + directory + bytes(4)


def labels_of_all_depths() -> list[Any]:
    found = []
    for depth, top in ((1, 1), (2, 3), (4, 15), (8, 20), (16, 20)):
        values = np.array([[0, 1, top, 0, 1], [top, 1, 0, top, 1]])
        found.append(pytest.param(grey_png(values, depth), values, id=f"PNG of {depth} bits"))
        if depth < 16:
            for white in (False, True):
                data = grey_tiff(values, depth, white_is_zero=white)
                found.append(pytest.param(data, values, id=f"TIFF of {depth} bits, white is zero: {white}"))
    values = np.array([[0, 1, 2], [3, 2, 1]])
    for top in (3, 255, 1000):
        samples = values.astype(np.uint8).tobytes() if top < 256 else values.astype(">u2").tobytes()
        found.append(pytest.param(b"P5 # made\n3 2\n%d\n" % top + samples, values, id=f"PGM up to {top}"))
        text = b"P2\n3 2\n%d\n" % top + b" ".join(b"%d" % v for v in values.ravel())
        found.append(pytest.param(text, values, id=f"plain PGM up to {top}"))
    found.append(
        pytest.param(b"P4\n3 2\n" + bytes([0b10100000, 0b01000000]), np.array([[1, 0, 1], [0, 1, 0]]), id="PBM")
    )
    return found


@pytest.mark.parametrize(("data", "values"), labels_of_all_depths())
def test_labels_are_raw_samples_of_any_depth(data: bytes, values: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "label").write_bytes(data)
    found = images.read_label(str(tmp_path / "label"), datasets.classes(preset("pascal-voc")))
    assert found.tolist() == values.tolist()
    assert images.read_mask(str(tmp_path / "label")).tolist() == values.tolist()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG2000", {}), ("WEBP", {}), ("TIFF", {"compression": "jpeg"})],
    ids=["JPEG", "JPEG 2000", "WebP", "JPEG in TIFF"],
)
def test_labels_with_loss_are_refused(kind: str, options: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "label").write_bytes(encode(Image.new("L", (16, 16)), kind, **options))
    with pytest.raises(BadInput, match=r"changes class indices|lossless"):
        images.read_label(str(tmp_path / "label"), datasets.classes(preset("pascal-voc")))


def test_rows_come_in_order_with_their_reasons() -> None:
    def read(number: int) -> int:
        if number % 2:
            raise BadInput(f"odd {number}")
        return number * 10

    assert list(images.read_rows([0, 1, 2], read)) == [(0, ""), (None, "odd 1"), (20, "")]


@given(
    npst.arrays(np.uint8, st.tuples(st.integers(2, 9), st.integers(2, 9), st.just(3))),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
@settings(deadline=None, max_examples=50)
def test_resizing_is_torchs(image: np.ndarray, size: tuple[int, int]) -> None:
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    bilinear = F.interpolate(planes.float(), size, mode="bilinear")[0].numpy()
    found = images.resize(image, size)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found, bilinear, atol=0.501)
    np.testing.assert_array_equal(
        images.resize(image, size, "nearest"), F.interpolate(planes, size, mode="nearest")[0].numpy()
    )


def test_resizing_by_hand() -> None:
    # 2 -> 4: each new pixel lies a quarter off an old one; the ends repeat. 10 + 1/4 (50 - 10) = 20.
    image = np.repeat(np.array([[10, 50], [10, 50]], np.uint8)[..., None], 3, 2)
    assert images.resize(image, (1, 4))[0].tolist() == [[10, 20, 40, 50]]
    label = np.array([[0, 1, -1], [3, 4, 5]], np.int16)
    assert images.resize_label(label, (2, 6)).tolist() == [[0, 0, 1, 1, -1, -1], [3, 3, 4, 4, 5, 5]]
    assert images.resize_label(label, (1, 2)).tolist() == [[0, 1]]
    assert images.resize_label(label, (2, 3)) is label


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_labels_are_values_whatever_the_palette(tmp_path: Path, mode: str) -> None:
    values = np.array([[0, 20, 255]], np.uint8)
    picture = Image.fromarray(values.astype(np.uint16) if mode == "I;16" else values)
    if mode == "P":
        picture = Image.fromarray(values)
        picture.putpalette([i % 7 for i in range(768)])
    assert picture.mode == mode
    picture.save(tmp_path / "label.png")
    label = images.read_label(str(tmp_path / "label.png"), datasets.classes(preset("pascal-voc")), (1, 3))
    assert label.dtype == np.int16
    assert label.tolist() == [[0, 20, -1]]


def photograph(seed: int, height: int, width: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}], ids=str)
def test_opencv_decodes_what_pillow_decodes(
    mode: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(Image.fromarray(photograph(0, 61, 83)).convert(mode), "JPEG", **options)
    by_opencv = images.decode_jpeg(data)
    assert by_opencv is not None
    monkeypatch.setattr(images, "cv2", None)
    np.testing.assert_array_equal(by_opencv, images.decode_image(data))


def test_a_jpeg_that_is_cut_off_is_left_to_pillow() -> None:
    data = encode(Image.fromarray(photograph(0, 61, 83)), "JPEG")
    for length in (len(data) // 2, len(data) - 1):
        assert images.decode_jpeg(data[:length]) is None
    with pytest.raises(BadInput, match="truncated image"):
        images.decode_image(data[: len(data) // 2])
    assert images.decode_jpeg(encode(Image.new("CMYK", (16, 16)), "JPEG")) is None


@pytest.mark.parametrize("size", [(320, 320), (40, 60), (61, 200), (30, 41)])
def test_opencv_resizes_as_numpy_does(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph(1, 60, 82)
    by_opencv = images.resize(image, size).astype(int)
    monkeypatch.setattr(images, "cv2", None)
    difference = np.abs(by_opencv - images.resize(image, size))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.002


def test_photographs_are_decoded_alike(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted((samples / "coco" / "images" / "val2017").glob("*.jpg"))[:20]
    found = [images.decode_image(file.read_bytes()) for file in files]
    small = np.stack([images.resize(image, (320, 320)) for image in found]).astype(int)
    monkeypatch.setattr(images, "cv2", None)
    for file, image in zip(files, found, strict=True):
        np.testing.assert_array_equal(image, images.decode_image(file.read_bytes()))
    difference = np.abs(small - np.stack([images.resize(image, (320, 320)) for image in found]))
    assert difference.max() == 1
    assert (difference > 0).mean() < 0.001


def test_heic_is_read_and_named_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.fromarray(np.full((16, 24, 3), (200, 40, 90), np.uint8)), "HEIF", quality=100)
    assert images.is_image(data[: images.HEAD])
    np.testing.assert_allclose(images.decode_image(data), np.broadcast_to([200, 40, 90], (16, 24, 3)), atol=4)
    monkeypatch.setattr(images, "pillow_heif", None)
    with pytest.raises(BadInput, match=r"image in HEIC, which needs pip install 'transfgu\[heic\]'"):
        images.decode_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "JPEG2000"])
def test_images_are_known_by_their_first_bytes(kind: str) -> None:
    data = encode(Image.fromarray(np.zeros((16, 24, 3), np.uint8)), kind)
    assert images.is_image(data[: images.HEAD])
    assert not images.is_image(b"P" + data[: images.HEAD])
