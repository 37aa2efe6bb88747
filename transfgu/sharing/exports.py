"""Export masks to the formats of labelling tools and data set libraries.

Every format gets one entry per connected region of a chosen class, with a simplified outline. Most formats have no
holes, so the outline enters each hole through a slit. GeoJSON has holes, and COCO's panoptic format stores pixels.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Integer
from PIL import Image

from transfgu.datasets.class_lists import Colour
from transfgu.datasets.images import encoded
from transfgu.errors import UserError
from transfgu.sharing.names import IGNORE
from transfgu.sharing.polygons import Region, regions
from transfgu.store import storage

UNCHOSEN = (IGNORE, "background")
"""Names of classes that are exported only if they are chosen."""


@dataclass(frozen=True, kw_only=True)
class ExportedClass:
    """A class of the masks."""

    index: int
    name: str
    colour: Colour


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportedMask:
    """The mask of one image.

    Args:
        name: the image's path below its folder.
        mask: class indices.
    """

    name: str
    mask: Integer[np.ndarray, "H W"]


@dataclass(frozen=True, kw_only=True)
class Outlines:
    """Settings for turning regions into polygons.

    Args:
        tolerance: maximum distance between a simplified outline and the edge of its region, in pixels.
        least: regions of fewer pixels are left out.
    """

    tolerance: float = 1.0
    least: int = 16

    def of(self, mask: Integer[np.ndarray, "H W"], index: int) -> list[Region]:
        """Return the regions of a class."""
        return regions(mask, index, tolerance=self.tolerance, least=self.least)


def chosen(classes: Sequence[ExportedClass], names: Sequence[str]) -> list[ExportedClass]:
    """Return the classes with the given names; without names, all except :data:`UNCHOSEN`.

    Raises:
        UserError: no class has one of the names.
    """
    known = [found.name for found in classes]
    for name in names:
        if name not in known:
            raise UserError(
                f"the masks have no class {name}; choose from {', '.join(known)}", code="export-class-unknown"
            )
    return [found for found in classes if (found.name in names if names else found.name not in UNCHOSEN)]


def write(
    kind: str,
    masks: Iterable[ExportedMask],
    classes: Sequence[ExportedClass],
    out: str,
    outlines: Outlines | None = None,
) -> str:
    """Write masks in a format.

    Args:
        kind: one of :data:`FORMATS`.
        masks: in the order in which they are written.
        classes: the classes to export (:func:`chosen`).
        out: URI of the folder for the file.
        outlines: settings for turning regions into polygons.

    Returns:
        The file's URI.

    Raises:
        UserError: no such format.
    """
    check_format(kind)
    name, writer = FORMATS[kind]
    uri = storage.join(out, name)
    storage.write_bytes(uri, writer(masks, classes, out, outlines or Outlines()))
    return uri


def check_format(kind: str) -> None:
    """Raise UserError unless `kind` is one of :data:`NAMES`."""
    if kind not in NAMES:
        raise UserError(f"there is no export {kind}; choose one of {', '.join(NAMES)}", code="export-unknown")


def _coco(masks: Iterable[ExportedMask], classes: Sequence[ExportedClass], out: str, outlines: Outlines) -> bytes:
    """Return COCO's instance annotations: one polygon per region; category ids are class indices + 1."""
    pictures: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, item in enumerate(masks, start=1):
        height, width = item.mask.shape
        pictures.append({"id": number, "file_name": item.name, "height": height, "width": width})
        for found in classes:
            for region in outlines.of(item.mask, found.index):
                low, high = region.outline.min(axis=0), region.outline.max(axis=0)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": found.index + 1,
                        "segmentation": [region.keyhole.ravel().tolist()],
                        "area": region.area,
                        "bbox": [*low.tolist(), *(high - low).tolist()],
                        "iscrowd": 0,
                    }
                )
    return _json({"images": pictures, "annotations": annotations, "categories": _categories(classes)})


def _panoptic(masks: Iterable[ExportedMask], classes: Sequence[ExportedClass], out: str, outlines: Outlines) -> bytes:
    """Return COCO's panoptic annotations: one segment per class; PNGs of segment ids are written to `panoptic/`."""
    pictures, annotations = [], []
    for number, item in enumerate(masks, start=1):
        height, width = item.mask.shape
        pictures.append({"id": number, "file_name": item.name, "height": height, "width": width})
        ids = np.zeros((height, width), np.uint32)
        segments = []
        for found in classes:
            inside = item.mask == found.index
            if not inside.any():
                continue
            ids[inside] = found.index + 1
            rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
            box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            segments.append(
                {
                    "id": found.index + 1,
                    "category_id": found.index + 1,
                    "area": int(inside.sum()),
                    "bbox": [int(side) for side in box],
                    "iscrowd": 0,
                }
            )
        file = f"{item.name}.png"
        pixels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        storage.write_bytes(storage.join(out, "panoptic", file), encoded(Image.fromarray(pixels), "PNG"))
        annotations.append({"image_id": number, "file_name": file, "segments_info": segments})
    categories = [{**category, "isthing": 0} for category in _categories(classes)]
    return _json({"images": pictures, "annotations": annotations, "categories": categories})


def _cvat(masks: Iterable[ExportedMask], classes: Sequence[ExportedClass], out: str, outlines: Outlines) -> bytes:
    """Return CVAT for images 1.1: one polygon per region."""
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    labels = ElementTree.SubElement(ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task"), "labels")
    for found in classes:
        label = ElementTree.SubElement(labels, "label")
        ElementTree.SubElement(label, "name").text = found.name
        ElementTree.SubElement(label, "color").text = _hex(found.colour)
        ElementTree.SubElement(label, "type").text = "polygon"
        ElementTree.SubElement(label, "attributes")
    for number, item in enumerate(masks):
        height, width = item.mask.shape
        image = ElementTree.SubElement(
            root, "image", {"id": f"{number}", "name": item.name, "width": f"{width}", "height": f"{height}"}
        )
        for found in classes:
            for region in outlines.of(item.mask, found.index):
                points = ";".join(f"{x:.2f},{y:.2f}" for x, y in region.keyhole)
                ElementTree.SubElement(
                    image,
                    "polygon",
                    {"label": found.name, "source": "auto", "occluded": "0", "points": points, "z_order": "0"},
                )
    ElementTree.indent(root)
    data: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return data


def _labelstudio(
    masks: Iterable[ExportedMask], classes: Sequence[ExportedClass], out: str, outlines: Outlines
) -> bytes:
    """Return Label Studio's tasks with predictions, and write their labelling interface `labelstudio.xml`."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", {"name": "image", "value": "$image"})
    labels = ElementTree.SubElement(view, "PolygonLabels", {"name": "label", "toName": "image"})
    for found in classes:
        ElementTree.SubElement(labels, "Label", {"value": found.name, "background": _hex(found.colour)})
    ElementTree.indent(view)
    storage.write_bytes(storage.join(out, "labelstudio.xml"), ElementTree.tostring(view, encoding="utf-8"))
    tasks = []
    for item in masks:
        height, width = item.mask.shape
        result: list[dict[str, Any]] = []
        for found in classes:
            for region in outlines.of(item.mask, found.index):
                points = region.keyhole * (100 / width, 100 / height)
                result.append(
                    {
                        "id": f"region-{len(result)}",
                        "type": "polygonlabels",
                        "from_name": "label",
                        "to_name": "image",
                        "original_width": width,
                        "original_height": height,
                        "image_rotation": 0,
                        "value": {"points": points.round(4).tolist(), "closed": True, "polygonlabels": [found.name]},
                    }
                )
        tasks.append({"data": {"image": item.name}, "predictions": [{"model_version": "transfgu", "result": result}]})
    return _json(tasks)


def _geojson(masks: Iterable[ExportedMask], classes: Sequence[ExportedClass], out: str, outlines: Outlines) -> bytes:
    """Return GeoJSON in pixels: x to the right, y down; properties `image`, `class`, `index`."""
    features = [
        {
            "type": "Feature",
            "properties": {"image": item.name, "class": found.name, "index": found.index},
            "geometry": {
                "type": "Polygon",
                "coordinates": [[*ring.tolist(), ring[0].tolist()] for ring in (region.outline, *region.holes)],
            },
        }
        for item in masks
        for found in classes
        for region in outlines.of(item.mask, found.index)
    ]
    return _json({"type": "FeatureCollection", "features": features})


def _categories(classes: Sequence[ExportedClass]) -> list[dict[str, Any]]:
    return [
        {"id": found.index + 1, "name": found.name, "supercategory": "", "color": list(found.colour)}
        for found in classes
    ]


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


_Writer = Callable[[Iterable[ExportedMask], Sequence[ExportedClass], str, Outlines], bytes]

FORMATS: Mapping[str, tuple[str, _Writer]] = MappingProxyType(
    {
        "coco": ("coco.json", _coco),
        "coco-panoptic": ("panoptic.json", _panoptic),
        "cvat": ("cvat.xml", _cvat),
        "labelstudio": ("labelstudio.json", _labelstudio),
        "geojson": ("masks.geojson", _geojson),
    }
)
"""File name and writer of each format."""

GEOTIFF = "geotiff"
"""The format that `transfgu.sharing.geotiff` writes; it needs the files of the images, too."""

FIFTYONE = "fiftyone"
"""The format that `transfgu.sharing.fiftyone` writes; it names the files of the images, too."""

NAMES = (*FORMATS, GEOTIFF, FIFTYONE)
"""The names of all formats."""


def predicted(names: Mapping[str, str], read: Callable[[str], bytes | None]) -> Iterator[ExportedMask]:
    """Yield the masks that `predict` wrote as PNGs, in the order of the images' names; skip images without a mask.

    Args:
        names: the mask of each image, relative to the folder of masks and without an extension.
        read: returns the content of a mask's file, or None if there is no such file.
    """
    for name in sorted(names):
        data = read(names[name])
        if data is not None:
            yield ExportedMask(name=name, mask=np.asarray(Image.open(io.BytesIO(data))))
