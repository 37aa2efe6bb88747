"""List LIP (Look into Person), single persons: one list, one image folder and one label folder per split."""

from transfgu.datasets.listing import Layout, Listing, pair, read_names, two_folders
from transfgu.recipe import Recipe
from transfgu.store import storage

_PREFIXES = {"train": "train", "validation": "val"}


def _list(recipe: Recipe, split: str) -> Listing:
    prefix = _PREFIXES[split]
    images, labels, notes = two_folders(
        storage.join(recipe.data, f"{prefix}_images"), storage.join(recipe.data, f"{prefix}_segmentations")
    )
    names = read_names(storage.join(recipe.data, f"{prefix}_id.txt"), images)
    return pair(recipe, split, names, images, labels, notes=notes)


LIP = Layout(
    expected="{train,val}_images/*.jpg, {train,val}_segmentations/*.png and {train,val}_id.txt",
    needed=("train_images", "val_images", "val_segmentations", "train_id.txt", "val_id.txt"),
    listing=_list,
)
