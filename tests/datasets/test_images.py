"""Decoding: every pixel format comes out as the same eight-bit picture; resizing equals torch's."""

import io
from pathlib import Path

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


def test_stored_pixels_count_not_the_orientation_tag() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it
    assert images.decode_image(encode(Image.new("RGB", (8, 4)), "JPEG", exif=exif.tobytes())).shape == (4, 8, 3)


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
    by_opencv = images._decode_jpeg(data)
    assert by_opencv is not None
    monkeypatch.setattr(images, "cv2", None)
    np.testing.assert_array_equal(by_opencv, images.decode_image(data))


def test_a_jpeg_that_is_cut_off_is_left_to_pillow() -> None:
    data = encode(Image.fromarray(photograph(0, 61, 83)), "JPEG")
    for length in (len(data) // 2, len(data) - 1):
        assert images._decode_jpeg(data[:length]) is None
    with pytest.raises(BadInput, match="truncated image"):
        images.decode_image(data[: len(data) // 2])
    assert images._decode_jpeg(encode(Image.new("CMYK", (16, 16)), "JPEG")) is None


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
