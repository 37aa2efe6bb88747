"""List Cityscapes: the name of a sample, city_sequence_frame, is the common part of the names of image and label."""

from transfgu.datasets.listing import Layout, Listing, pair, two_folders
from transfgu.recipe import Recipe
from transfgu.store import storage

_EXPECTED = ("labels' files not read (.json)",)  # polygons, beside each label
_FOLDERS = {"train": "train", "validation": "val"}


def _list(recipe: Recipe, split: str) -> Listing:
    folder = _FOLDERS[split]
    images, labels, notes = two_folders(
        storage.join(recipe.data, "leftImg8bit", folder),
        storage.join(recipe.data, "gtFine", folder),
        ("_leftImg8bit", "_gtFine_labelIds"),
        recursive=True,
    )
    return pair(recipe, split, images, images, labels, notes={n: c for n, c in notes.items() if n not in _EXPECTED})


CITYSCAPES = Layout(
    expected="leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and gtFine/{train,val}/<city>/*_gtFine_labelIds.png",
    needed=("leftImg8bit/train", "leftImg8bit/val", "gtFine/val"),
    listing=_list,
)
