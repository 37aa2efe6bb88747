"""Write masks as GeoTIFFs with the georeference of their images.

GDAL (through rasterio, the extra `geo`) opens masks and images and copies strips of rows, so memory does not grow with
their height.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from transfgu.errors import UserError
from transfgu.sharing.exports import ExportedClass
from transfgu.store import storage

FOLDER = "geotiff"
"""Folder of the files in the folder of the export."""

NODATA = 255
"""Value of pixels whose classes are not exported."""

_BLOCK = 256  # pixels; side of the stored tiles of a GeoTIFF, and number of rows copied at a time
_GDAL = {"GDAL_CACHEMAX": 64}  # MB


def write(
    files: Mapping[str, tuple[str, str]],
    classes: Sequence[ExportedClass],
    out: str,
    *,
    chosen: Sequence[ExportedClass] | None = None,
) -> str:
    """Write a GeoTIFF for each mask whose image is a georeferenced TIFF: class indices, with palette and class names.

    Other images are skipped. Coordinate system, transform and ground control points are those of the image.

    Args:
        files: URIs of the image and of the mask (a PNG of class indices) by the mask's name without suffix.
        classes: all classes of the masks.
        out: URI of the folder for :data:`FOLDER`.
        chosen: classes to export; pixels of others become :data:`NODATA`. None: all.

    Returns:
        URI of the folder with the files, each named after its mask.

    Raises:
        UserError: rasterio is not installed, no image is georeferenced, or a mask differs in size from its image.
    """
    try:
        import rasterio
    except ImportError:
        raise UserError("geotiff requires rasterio: pip install 'transfgu[geo]'", code="package-missing") from None
    folder, written = storage.join(out, FOLDER), 0
    values = np.arange(256, dtype=np.uint8)
    if chosen is not None:
        values[:] = NODATA
        for found in chosen:
            values[found.index] = found.index
    with rasterio.Env(**_GDAL):
        for name in sorted(files):
            image, mask = files[name]
            if not image.lower().endswith((".tif", ".tiff")) or not storage.exists(mask):
                continue
            with _opened(image, "GTiff") as source:
                place = _place(source)
                if not place:
                    continue
                with _opened(mask, "PNG") as indices:
                    if indices.shape != source.shape:
                        raise UserError(
                            f"{storage.shown(mask)} has {indices.width} x {indices.height} pixels, but its image has "
                            f"{source.width} x {source.height}: predict with --orient false",
                            code="mask-size",
                        )
                    data = _encoded(indices, place, classes, None if chosen is None else values)
            storage.write_bytes(storage.join(folder, f"{name}.tif"), data)
            written += 1
    if not written:
        raise UserError(
            "no image is a TIFF with a georeference and a mask: give --images the folder of GeoTIFFs; geojson exports "
            "others",
            code="export-no-georeference",
        )
    return folder


@contextlib.contextmanager
def _opened(uri: str, driver: str) -> Iterator[Any]:
    """Open a raster on any storage with one driver only, so that a file can't refer to others."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioIOError

    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            if storage.is_local(uri):
                found = stack.enter_context(rasterio.open(storage.absolute(uri), driver=driver))
            else:
                memory = stack.enter_context(rasterio.MemoryFile(storage.read_bytes(uri)))
                found = stack.enter_context(memory.open(driver=driver))
        except RasterioIOError:
            raise UserError(
                f"{storage.shown(uri)} can't be read as {driver}: predict again, or remove it from --images",
                code="export-unreadable",
            ) from None
        yield found


def _place(source: Any) -> dict[str, Any]:
    """Return the georeference of a raster for rasterio's profile; empty if it has none."""
    points, system = source.gcps
    if points:
        return {"gcps": points, "crs": system}
    if source.crs is None and source.transform.is_identity:
        return {}
    return {"crs": source.crs, "transform": source.transform}


def _encoded(
    indices: Any, place: Mapping[str, Any], classes: Sequence[ExportedClass], values: np.ndarray | None
) -> bytes:
    """Return a tiled, compressed GeoTIFF of a raster of class indices."""
    import rasterio

    profile = {
        **place,
        **{"driver": "GTiff", "dtype": "uint8", "count": 1, "width": indices.width, "height": indices.height},
        **{"tiled": True, "blockxsize": _BLOCK, "blockysize": _BLOCK, "compress": "deflate", "bigtiff": "if_safer"},
        **({} if values is None else {"nodata": NODATA}),
    }
    with rasterio.MemoryFile() as memory:
        with memory.open(**profile) as target:
            target.write_colormap(1, {found.index: (*found.colour, 255) for found in classes})
            target.update_tags(1, **{f"class_{found.index}": found.name for found in classes})
            for start in range(0, indices.height, _BLOCK):
                window = ((start, min(start + _BLOCK, indices.height)), (0, indices.width))
                rows = indices.read(1, window=window)
                target.write(rows if values is None else values[rows], 1, window=window)
        return bytes(memory.read())
