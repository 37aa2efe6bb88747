"""List the images of any folder: each image file is a sample, named by its relative path.

If the folder has sub-folders for training and validation, with the usual names (`train`, `training`; `val`, `valid`,
`validation`, `dev`; in any case, also inside a folder `images`), these are the splits, and other folders, such as
`test`, are counted. Otherwise every image is in both splits: nothing is learned from labels, so training images can be
scored, too, and all images get a prediction.

Labels, if any, are in a separate tree with the same relative names (`names.labels_of`), as PNGs of class indices (255:
ignored). With splits, a validation image without its label is left out, and reported; without splits, images with
labels are scored.
"""

from collections.abc import Iterable, Mapping
from functools import cache

from transfgu.datasets.listing import Images, Layout, Listing, find_images, pair
from transfgu.datasets.names import labels_of
from transfgu.errors import UserError
from transfgu.recipe import Recipe
from transfgu.store import storage

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
}
_IMAGES = "images/"  # a folder with the splits, next to one with labels


def _list(recipe: Recipe, split: str) -> Listing:
    data, label_root = storage.absolute(recipe.data), recipe.labels and storage.absolute(recipe.labels)
    found = find_images(data, recursive=True)
    images = _without(found, label_root, data) if label_root else dict(found.files)
    labels = _labels(images, label_root, data) if label_root else None
    notes = found.notes() if split == "train" else {}
    splits = _splits(images)
    if splits:
        if split == "train":
            notes["images in no split"] = len(images) - sum(map(len, splits.values()))
        return pair(recipe, split, splits[split], images, labels, notes=notes)
    if labels is None or split == "train":
        return pair(recipe, split, images, images, labels, notes=notes)
    return pair(recipe, split, labels, images, labels, notes={"unlabelled": len(images) - len(labels)})


def _splits(images: Iterable[str]) -> dict[str, list[str]]:
    """Return the images of each split; empty unless both exist."""
    inner = _IMAGES if images and all(name.startswith(_IMAGES) for name in images) else ""
    splits: dict[str, list[str]] = {}
    for name in images:
        top, slash, _ = name[len(inner) :].partition("/")
        if slash and top.lower() in _SPLITS:
            splits.setdefault(_SPLITS[top.lower()], []).append(name)
    return splits if len(splits) == 2 else {}


def _without(found: Images, label_root: str, data: str) -> dict[str, str]:
    """Return the images without labels: those outside the labels' folder, with links resolved."""
    if storage.within(data, label_root):  # the labels' folder contains the images
        return dict(found.files)
    inside = cache(lambda folder: storage.within(folder, label_root))
    return {name: uri for name, uri in found.files.items() if not inside(uri.rpartition("/")[0])}


def _labels(images: Mapping[str, str], label_root: str, data: str) -> dict[str, str]:
    files = find_images(label_root, recursive=True).files
    labels = labels_of(images, files)
    if not labels and images and all(name.startswith(_IMAGES) for name in images):
        short = labels_of([name.removeprefix(_IMAGES) for name in images], files)
        labels = {_IMAGES + name: label for name, label in short.items()}
    if images and not labels:
        raise UserError(
            f"no label below {storage.shown(label_root)} has the relative name of an image "
            f"below {storage.shown(data)}: use the same names, such as birds/1.jpg and birds/1.png",
            code="labels-missing",
        )
    return labels


FOLDER = Layout(
    expected="images (.jpg, .png, ...) at any depth, in train/ and val/ for separate splits",
    needed=(),
    listing=_list,
)
