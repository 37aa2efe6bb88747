"""Read images that are too large for memory by rows, from the top down.

Images within Pillow's limit are decoded by Pillow, so that a tiled prediction gets the same pixels as a plain one. GDAL
(through rasterio, the extra `geo`) reads larger images.
"""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from transfgu.datasets import images
from transfgu.errors import BadInput
from transfgu.recipe import MAX_PIXELS
from transfgu.store import storage

# GDAL's drivers by a file's first bytes, without drivers that read other files, such as VRT.
_DRIVERS = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",
    b"MM\0+": "GTiff",
}

_GDAL = {"GDAL_CACHEMAX": 64}  # MB: rows are read once, but GDAL's default cache is a twentieth of the memory
_TAIL = 64  # bytes at the end that show whether a file is complete


class ArrayRows:
    """An image in memory."""

    def __init__(self, image: UInt8[np.ndarray, "H W 3"]) -> None:
        self._image = image
        self.height, self.width = image.shape[:2]

    def read(self, start: int, stop: int) -> UInt8[np.ndarray, "rows W 3"]:
        """Return the rows `start` to `stop`."""
        return self._image[start:stop]


class RasterRows:
    """An image file of any size; rows are decoded when they are read.

    Raises:
        BadInput: not a raster of 8 or 16 bits, unreadable, or rasterio is not installed.
    """

    def __init__(self, uri: str, max_pixels: int = MAX_PIXELS) -> None:
        larger = f"image of more pixels than dataset.max_pixels ({max_pixels})"
        try:
            import rasterio
            from rasterio.errors import NotGeoreferencedWarning, RasterioError
        except ImportError:
            raise BadInput(f"{larger}: pip install 'transfgu[geo]' reads it") from None
        self._broken, self._environment = RasterioError, rasterio.Env
        data = b"" if storage.is_local(uri) else storage.read_bytes(uri)
        head, tail = _ends(uri) if storage.is_local(uri) else (data[:4], data[-_TAIL:])
        driver = next((name for first, name in _DRIVERS.items() if head.startswith(first)), None)
        if driver is None:
            raise BadInput(f"{larger} that is not PNG, JPEG or TIFF")
        if (driver == "PNG" and b"IEND" not in tail) or (driver == "JPEG" and b"\xff\xd9" not in tail):
            raise BadInput("truncated image")  # GDAL fills missing data with black
        try:
            with rasterio.Env(**_GDAL), warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                if storage.is_local(uri):
                    self._file: Any = rasterio.open(storage.absolute(uri), driver=driver)
                else:
                    self._memory = rasterio.MemoryFile(data)
                    self._file = self._memory.open(driver=driver)
        except RasterioError:
            raise BadInput("unreadable image") from None
        self.height, self.width = int(self._file.height), int(self._file.width)
        self._palette: UInt8[np.ndarray, "256 3"] | None = None
        if self._file.colorinterp[0].name == "palette":
            colours = self._file.colormap(1)
            self._palette = np.array([colours.get(i, (0, 0, 0))[:3] for i in range(256)], np.uint8)
        self._bands = [1, 2, 3] if self._file.count >= 3 else [1]
        if any(kind not in ("uint8", "uint16") for kind in self._file.dtypes[: len(self._bands)]):
            raise BadInput(f"image of {self._file.dtypes[0]}, not of 8 or 16 bits")

    def read(self, start: int, stop: int) -> UInt8[np.ndarray, "rows W 3"]:
        """Return the rows `start` to `stop`.

        Raises:
            BadInput: they are damaged.
        """
        if stop <= start:
            return np.zeros((0, self.width, 3), np.uint8)
        try:
            with self._environment(**_GDAL):
                pixels = self._file.read(self._bands, window=((start, stop), (0, self.width)))
        except self._broken:
            raise BadInput("damaged image") from None
        if self._palette is not None:
            painted: UInt8[np.ndarray, "rows W 3"] = self._palette[pixels[0]]
            return painted
        if pixels.dtype == np.uint16:
            pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
        whole = np.ascontiguousarray(pixels.transpose(1, 2, 0))
        return whole if whole.shape[2] == 3 else np.repeat(whole, 3, axis=2)


def _ends(uri: str) -> tuple[bytes, bytes]:
    """Return the first and the last bytes of a local file."""
    path = Path(storage.absolute(uri))
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(max(0, path.stat().st_size - _TAIL))
        return head, file.read()


def rows_of(uri: str, *, orient: bool = False, max_pixels: int = MAX_PIXELS) -> ArrayRows | RasterRows:
    """Open an image file to read it by rows: by Pillow, in memory, or a larger one by GDAL.

    Args:
        uri: URI of the file.
        orient: apply EXIF's orientation, if Pillow reads the file.
        max_pixels: maximum number of pixels for Pillow.

    Raises:
        BadInput: it can't be used.
        UserError: the storage fails.
    """
    if _pixels(uri) > max_pixels:
        return RasterRows(uri, max_pixels)
    return ArrayRows(images.read_image(uri, orient=orient, max_pixels=max_pixels))


def _pixels(uri: str) -> int:
    """Return the number of pixels in a file's header; 0 if Pillow can't read it."""
    try:
        data: Any = storage.absolute(uri) if storage.is_local(uri) else io.BytesIO(storage.read_bytes(uri))
        with Image.open(data) as picture:
            return picture.width * picture.height
    except Image.DecompressionBombError:  # beyond twice the limit
        return 2 * MAX_PIXELS
    except Exception:  # its reader reports the error
        return 0
