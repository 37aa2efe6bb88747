"""List the images of any folder: each image file is a sample, named by its relative path.

If the folder has the sub-folders `train` and `val` (or `validation`), these are the splits. Otherwise all images are in
both splits, because labels are not used for training and training images can be scored. Labels are PNGs of class
indices (255: ignored) in a folder of their own, under the same relative names. With splits, validation images without a
label are left out and reported; otherwise the images with labels are scored.
"""

from transfgu.datasets.listing import Layout, Listing, images_in, in_parallel, pair, stem
from transfgu.errors import UserError
from transfgu.recipe import Recipe
from transfgu.store import storage

_FOLDERS = {"train": ("train",), "validation": ("val", "validation")}


def _list(recipe: Recipe, split: str) -> Listing:
    data, label_root = storage.absolute(recipe.data), recipe.labels and storage.absolute(recipe.labels)
    images, label_files = in_parallel(
        lambda: images_in(data, recursive=True),
        lambda: images_in(label_root, recursive=True) if label_root else {},
    )
    if label_root.startswith(data + "/"):
        inside = label_root[len(data) + 1 :] + "/"
        images = {n: uri for n, uri in images.items() if not n.startswith(inside)}
    by_stem = {stem(n): uri for n, uri in label_files.items()}
    labels = {n: by_stem[stem(n)] for n in images if stem(n) in by_stem} if label_root else None
    if labels is not None and images and not labels:
        raise UserError(
            f"no label below {storage.shown(label_root)} has the relative name of an image "
            f"below {storage.shown(data)}: name them alike, as in birds/1.jpg and birds/1.png",
            code="labels-missing",
        )
    tops = {n.partition("/")[0] for n in images if "/" in n}
    validation = next((f for f in _FOLDERS["validation"] if f in tops), None)
    if "train" in tops and validation:
        top = "train" if split == "train" else validation
        return pair(recipe, split, (n for n in images if n.startswith(top + "/")), images, labels)
    if labels is None or split == "train":
        return pair(recipe, split, images, images, labels)
    return pair(recipe, split, labels, images, labels, notes={"unlabelled": len(images) - len(labels)})


FOLDER = Layout(
    expected="images (.jpg, .png, ...) at any depth, in train/ and val/ if they are to be told apart",
    needed=(),
    listing=_list,
)
