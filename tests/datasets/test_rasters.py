"""Rows of a file against the whole image, read by Pillow."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfgu.datasets import images, rasters
from transfgu.errors import BadInput

rasterio = pytest.importorskip("rasterio")


def written(folder: Path, kind: str) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    picture = {
        "rgb.png": lambda: Image.fromarray(pixels),
        "rgba.png": lambda: Image.fromarray(np.dstack((pixels, pixels[..., :1]))),
        "grey.png": lambda: Image.fromarray(pixels[..., 0]),
        "palette.png": lambda: Image.fromarray(pixels).quantize(17),
        "wide.png": lambda: Image.fromarray(pixels[..., 0].astype(np.uint16) * 255),
        "rgb.tif": lambda: Image.fromarray(pixels),
        "rgb.jpg": lambda: Image.fromarray(pixels),
    }[kind]()
    if kind.endswith("jpg"):
        picture.save(folder / kind, subsampling=0, quality=95)
    else:
        picture.save(folder / kind)
    return folder / kind


@pytest.mark.parametrize("kind", ["rgb.png", "rgba.png", "grey.png", "palette.png", "wide.png", "rgb.tif", "rgb.jpg"])
def test_rows_are_those_of_the_image(kind: str, tmp_path: Path) -> None:
    file = written(tmp_path, kind)
    whole = images.read_image(str(file))
    assert isinstance(rasters.rows_of(str(file)), rasters.ArrayRows)
    for uri in (str(file), f"file://{file}"):
        rows = rasters.rows_of(uri, max_pixels=40 * 30 - 1)
        assert isinstance(rows, rasters.RasterRows)
        assert (rows.height, rows.width) == (40, 30)
        found = np.concatenate([rows.read(a, b) for a, b in ((0, 0), (0, 7), (7, 7), (7, 40))])
        np.testing.assert_allclose(found.astype(int), whole.astype(int), atol=2 if kind.endswith("jpg") else 0)


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(BadInput, match="unreadable"):
        rasters.rows_of(str(text))
    with pytest.raises(BadInput, match="not PNG, JPEG or TIFF"):
        rasters.RasterRows(str(text))
    text.write_bytes(b"II*\0" + bytes(40))
    with pytest.raises(BadInput, match="unreadable"):
        rasters.RasterRows(str(text))
    floating = tmp_path / "floating.tif"
    Image.fromarray(np.zeros((4, 4), np.float32)).save(floating)
    with pytest.raises(BadInput, match="float32"):
        rasters.RasterRows(str(floating))
    # A virtual raster names other files, so it is not opened.
    virtual = tmp_path / "virtual.tif"
    virtual.write_text('<VRTDataset rasterXSize="4" rasterYSize="4"></VRTDataset>')
    with pytest.raises(BadInput, match="not PNG, JPEG or TIFF"):
        rasters.RasterRows(str(virtual))
    cut = written(tmp_path, "rgb.png")
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(BadInput, match="truncated"):
        rasters.RasterRows(str(cut))
