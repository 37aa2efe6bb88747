"""Write masks as FiftyOne's `ImageSegmentationDirectory`: a grey PNG per image, and a list of the images' paths.

FiftyOne reads masks by OpenCV, which would turn the palette of `predict`'s PNGs into colours. It does not show pixels
of value 0, so values are class indices + 1, as the categories of COCO.
"""

import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from transfgu.datasets.images import encoded
from transfgu.errors import UserError
from transfgu.sharing.exports import ExportedClass
from transfgu.store import storage

FOLDER = "fiftyone"
"""Folder of the files in the folder of the export."""


def write(files: Mapping[str, tuple[str, str]], classes: Sequence[ExportedClass], out: str) -> str:
    """Write `labels/` (masks), `data.json` (paths of their images) and `mask_targets.json` (class names by value).

    Images without a mask are skipped.

    Args:
        files: URIs of the image and of the mask (a PNG of class indices) by the mask's name without suffix.
        classes: the classes to export; pixels of others become 0.
        out: URI of the folder for :data:`FOLDER`.

    Returns:
        URI of the folder with the files.

    Raises:
        UserError: images are not on a disk.
    """
    remote = next((image for image, _ in files.values() if not storage.is_local(image)), None)
    if remote:
        raise UserError(
            f"{storage.shown(remote)} is not on a disk, from which FiftyOne reads images: copy the images there",
            code="export-images-remote",
        )
    folder = storage.join(out, FOLDER)
    values = np.zeros(256, np.uint16)
    for found in classes:
        values[found.index] = found.index + 1
    if values.max() < 256:
        values = values.astype(np.uint8)
    images = {}
    for name in sorted(files):
        image, mask = files[name]
        data = storage.read_bytes_or_none(mask)
        if data is None:
            continue
        label = Image.fromarray(values[np.asarray(Image.open(io.BytesIO(data)))])
        storage.write_bytes(storage.join(folder, "labels", f"{name}.png"), encoded(label, "PNG"))
        images[f"{name}.png"] = storage.absolute(image)  # FiftyOne drops the suffix, as that of the mask
    targets = {str(found.index + 1): found.name for found in classes}
    storage.write_bytes(storage.join(folder, "mask_targets.json"), json.dumps(targets).encode())
    storage.write_bytes(storage.join(folder, "data.json"), json.dumps(images).encode())
    return folder
