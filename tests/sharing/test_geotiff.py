"""GeoTIFFs of masks, opened by rasterio."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.refusals import refused
from tests.sharing.test_exports import CLASSES
from transfgu import formats
from transfgu.cli import export
from transfgu.sharing import geotiff
from transfgu.stages.prediction import png

rasterio = pytest.importorskip("rasterio")
COLOURS = np.array([c.colour for c in CLASSES], np.uint8)
PLACE = {"crs": "EPSG:32632", "transform": rasterio.transform.from_origin(600_000, 5_100_000, 0.5, 0.5)}
SIZE = (300, 520)  # more than one block each way


def write_image(path: Path, size: tuple[int, int] = SIZE, **place: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, *size), np.uint8)
    with rasterio.open(path, "w", driver="GTiff", dtype="uint8", count=3, height=size[0], width=size[1], **place) as to:
        to.write(pixels)


def write_mask(path: Path, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.random.default_rng(1).integers(0, len(CLASSES), size, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(mask, COLOURS))
    return mask


def test_a_mask_lies_where_its_image_lies(tmp_path: Path) -> None:
    corners = [(0, 0, 11.0, 46.0), (0, 520, 11.1, 46.0), (300, 0, 11.0, 45.9)]
    points = [rasterio.control.GroundControlPoint(row=r, col=c, x=x, y=y) for r, c, x, y in corners]
    write_image(tmp_path / "images" / "a" / "field.tif", **PLACE)
    write_image(tmp_path / "images" / "points.tiff", gcps=points, crs="EPSG:4326")
    write_image(tmp_path / "images" / "plain.tif")
    Image.new("RGB", (520, 300)).save(tmp_path / "images" / "photo.jpg")
    masks = {name: write_mask(tmp_path / "out" / "masks" / f"{name}.png") for name in ("a/field", "points", "plain")}
    write_mask(tmp_path / "out" / "masks" / "photo.png")
    claim = {
        **{"model": "", "run": "", "files": "png"},
        "classes": [{"index": c.index, "name": c.name, "colour": c.colour} for c in CLASSES],
    }
    (tmp_path / "out" / "prediction.json").write_text(json.dumps(formats.stamp(claim)))
    words = ["--masks", str(tmp_path / "out"), "--images", str(tmp_path / "images"), "--to", "geotiff"]
    export.main(words)
    folder = tmp_path / "out" / "geotiff"
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*")) == ["a/field.tif", "points.tif"]
    with rasterio.open(folder / "a" / "field.tif") as found:
        assert (found.crs, found.transform) == (rasterio.crs.CRS.from_epsg(32632), PLACE["transform"])
        assert found.dtypes == ("uint8",)
        assert found.block_shapes == [(256, 256)]
        assert found.nodata is None
        np.testing.assert_array_equal(found.read(1), masks["a/field"])
        assert {k: v for k, v in found.tags(1).items() if k.startswith("class_")} == {
            f"class_{c.index}": c.name for c in CLASSES
        }
        assert found.colormap(1)[1] == (*CLASSES[1].colour, 255)
    with rasterio.open(folder / "points.tif") as found:
        assert [(p.row, p.col, p.x, p.y) for p in found.gcps[0]] == corners
        assert found.gcps[1] == rasterio.crs.CRS.from_epsg(4326)
    export.main([*words, "--classes", "ring"])
    with rasterio.open(folder / "a" / "field.tif") as found:
        assert found.nodata == geotiff.NODATA
        np.testing.assert_array_equal(found.read(1), np.where(masks["a/field"] == 2, 2, geotiff.NODATA))


def test_refusals(tmp_path: Path) -> None:
    write_image(tmp_path / "plain.tif")
    write_image(tmp_path / "field.tif", **PLACE)
    write_mask(tmp_path / "plain.png")
    write_mask(tmp_path / "small.png", (20, 30))
    (tmp_path / "broken.tif").write_bytes((tmp_path / "field.tif").read_bytes()[:6])

    def files(image: str, mask: str) -> dict[str, tuple[str, str]]:
        return {"x": (str(tmp_path / image), str(tmp_path / mask))}

    out = str(tmp_path / "out")
    with refused("export-no-georeference"):
        geotiff.write(files("plain.tif", "plain.png"), CLASSES, out)
    with refused("export-no-georeference"):
        geotiff.write(files("field.tif", "missing.png"), CLASSES, out)
    with refused("mask-size 30 x 20"):
        geotiff.write(files("field.tif", "small.png"), CLASSES, out)
    with refused("export-unreadable broken"):
        geotiff.write(files("broken.tif", "plain.png"), CLASSES, out)
