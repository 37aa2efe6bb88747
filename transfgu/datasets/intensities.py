"""Map measured intensities to 8 bits by a window: DICOM slices, and grey images of 12, 16 or 32 bits.

Intensities below the window become 0, those above it 255. A suitable window keeps differences that scaling the whole
range to 8 bits would lose.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8

from transfgu.datasets import images
from transfgu.errors import BadInput, UserError

Window = tuple[float | int, float | int]
"""The intensities that become 0 and 255."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """One image of intensities.

    Args:
        values: the intensities: of DICOM after its rescaling (Hounsfield units of CT), otherwise as stored.
        window: the window in the file, if any.
        inverted: True if high intensities are shown dark (DICOM's MONOCHROME1).
    """

    values: Float32[np.ndarray, "H W"]
    window: Window | None = None
    inverted: bool = False

    def narrowed(self, window: Window | None) -> UInt8[np.ndarray, "H W"]:
        """Return the image in 8 bits.

        Args:
            window: the window to use; None: that in the file.

        Raises:
            BadInput: there is no window.
        """
        window = window or self.window
        if window is None:
            raise BadInput("no window: give --low and --high")
        low, high = window
        scaled = 255 * np.clip((self.values - np.float32(low)) / np.float32(high - low), 0, 1)
        found: UInt8[np.ndarray, "H W"] = np.rint(255 - scaled if self.inverted else scaled).astype(np.uint8)
        return found


def is_dicom(data: bytes) -> bool:
    """Return True for the bytes of a DICOM file."""
    return data[128:132] == b"DICM"


def slices(data: bytes) -> Iterator[Slice]:
    """Read the images of a file's bytes: one, or the frames of a DICOM file.

    Raises:
        BadInput: damaged, in colour, or of 8 bits.
        UserError: a DICOM file, and pydicom is not installed.
    """
    if is_dicom(data):
        yield from _dicom(data)
    else:
        yield Slice(values=images.decode_intensities(data))


def _dicom(data: bytes) -> Iterator[Slice]:
    try:
        import pydicom
        from pydicom.pixels.processing import apply_modality_lut
    except ImportError:
        raise UserError("DICOM files require pydicom: pip install 'transfgu[dicom]'", code="package-missing") from None
    try:
        found = pydicom.dcmread(io.BytesIO(data))
        if found.get("SamplesPerPixel", 1) != 1:
            raise BadInput("DICOM image in colour")
        stored = found.pixel_array
        values = np.asarray(apply_modality_lut(stored, found), np.float32)
        inverted = found.PhotometricInterpretation == "MONOCHROME1"
        window = _proposed(found.get("WindowCenter"), found.get("WindowWidth"))
    except BadInput:
        raise
    except Exception as error:  # readers raise various errors for damaged files, and for compressions without a decoder
        reason = " ".join(str(error).split())[:120]
        raise BadInput(f"unreadable DICOM file: {reason}") from None
    for frame in values[None] if values.ndim == 2 else values:
        yield Slice(values=frame, window=window, inverted=inverted)


def _proposed(centre: object, width: object) -> Window | None:
    """Return a DICOM file's window, the first if there are several.

    Source: DICOM PS3.3, C.11.2.1.2: values up to c - 0.5 - (w - 1) / 2 become the least, above c - 0.5 + (w - 1) / 2
    the greatest.
    """
    if centre in (None, "") or width in (None, ""):
        return None
    c, w = (float(np.atleast_1d(np.asarray(x, np.float64))[0]) for x in (centre, width))
    half = max(w - 1, 1e-3) / 2
    return c - 0.5 - half, c - 0.5 + half
