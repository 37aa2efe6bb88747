"""List the samples of a recipe's data set and the classes of its labels.

`list_samples` and `classes` are the whole interface; :mod:`transfgu.datasets.images` reads pixels. Each folder layout
has a module.
"""

import pyarrow as pa

from transfgu.datasets import packed
from transfgu.datasets.cityscapes import CITYSCAPES
from transfgu.datasets.class_lists import Classes, class_lists, classes, palette
from transfgu.datasets.coco import COCO
from transfgu.datasets.folder import FOLDER
from transfgu.datasets.lip import LIP
from transfgu.datasets.listing import SCHEMA, SPLITS, Layout, Listing
from transfgu.datasets.voc import VOC
from transfgu.errors import UserError
from transfgu.recipe import Recipe
from transfgu.store import storage

__all__ = [
    "LAYOUTS",
    "SCHEMA",
    "SPLITS",
    "Classes",
    "Listing",
    "class_lists",
    "classes",
    "list_samples",
    "listing",
    "palette",
    "preflight",
]

LAYOUTS: dict[str, Layout] = {"coco": COCO, "voc": VOC, "cityscapes": CITYSCAPES, "lip": LIP, "folder": FOLDER}
"""Layouts that are read; `shapes` is drawn by the samples stage."""

_PRESET_OF = {"coco": "coco-stuff-27", "voc": "pascal-voc", "cityscapes": "cityscapes", "lip": "lip-16"}


def list_samples(recipe: Recipe, split: str) -> pa.Table:
    """Return the samples of a split: rows of `SCHEMA` (index, name, image, label, curated), sorted by name.

    Args:
        recipe: its layout, data, labels, limit and `dataset.curated` are used.
        split: "train" or "validation".

    Raises:
        UserError: the data is missing or empty, or is not in the recipe's layout.
    """
    return listing(recipe, split).table


def listing(recipe: Recipe, split: str) -> Listing:
    """Return the same as :func:`list_samples`, with left-out samples. No image is opened."""
    layout = LAYOUTS[recipe.dataset.layout]
    found = layout.listing(recipe, split)
    if not found.table.num_rows:
        why = f" ({len(found.left_out)} samples, the first with a {found.left_out[0].reason})" if found.left_out else ""
        raise UserError(
            f"{storage.shown(recipe.data)} has no usable {split} image{why}: "
            f"preset {recipe.preset} expects {layout.expected}",
            code="images-missing",
        )
    return found


def preflight(recipe: Recipe) -> None:
    """Check the data before work starts, with a few requests and without listing it.

    Raises:
        UserError: data that is missing, empty, unreadable or in another layout; labels that are missing or not for this
            layout; concepts that do not fit the class list.
    """
    layout, data, labels = recipe.dataset.layout, recipe.data, recipe.labels
    classes(recipe)
    if recipe.dataset.curated and layout != "coco":
        raise UserError(
            f"--dataset.curated selects COCO-Stuff ids, but preset {recipe.preset} is not COCO: leave it out",
            code="curated-unsupported",
        )
    if labels and layout != "folder":
        raise UserError(
            f"--labels is for preset folder; preset {recipe.preset} finds its labels below --data: leave it out",
            code="labels-unsupported",
        )
    if layout == "shapes":
        if data:
            raise UserError(
                "preset shapes draws its own images: leave out --data, or choose preset folder", code="data-unsupported"
            )
        return
    if not data:
        raise UserError(
            f"preset {recipe.preset} needs --data, a folder with {LAYOUTS[layout].expected}", code="data-missing"
        )
    for uri in (data, labels):
        if uri:
            storage.check_readable(uri)
            if uri == data and layout == "folder" and packed.is_pack(uri):
                packed.check(uri)
                continue
            if storage.is_file(uri):
                raise UserError(f"{storage.shown(uri)} is a file, not a folder", code="folder-expected")
            if storage.is_empty(uri):
                raise UserError(
                    f"the folder {storage.shown(uri)} is empty: put the images there, or check the path",
                    code="folder-empty",
                )
    if labels and storage.resolved(labels) == storage.resolved(data):
        raise UserError(
            f"--labels {storage.shown(labels)} and --data {storage.shown(data)} are the same folder: labels would be "
            "used as photographs, so put them in a separate folder",
            code="labels-among-images",
        )
    if missing := LAYOUTS[layout].missing(data):
        raise UserError(
            f"{storage.shown(data)} has no {' and no '.join(missing)}: preset {recipe.preset} expects "
            f"{LAYOUTS[layout].expected}{_hint(recipe)}",
            code="data-layout",
        )


def _hint(recipe: Recipe) -> str:
    for name, layout in LAYOUTS.items():
        if name != recipe.dataset.layout and layout.needed and not layout.missing(recipe.data):
            return f"; it looks like the data of preset {_PRESET_OF[name]}"
    return ""
