"""List Cityscapes: the name of a sample, city_sequence_frame, is the common part of the names of image and label."""

from transfgu.datasets.listing import Layout, Listing, images_in, in_parallel, pair
from transfgu.datasets.names import stems
from transfgu.recipe import Recipe
from transfgu.store import storage

_FOLDERS = {"train": "train", "validation": "val"}


def _list(recipe: Recipe, split: str) -> Listing:
    folder = _FOLDERS[split]
    images, labels = in_parallel(
        lambda: stems(images_in(storage.join(recipe.data, "leftImg8bit", folder), recursive=True), "_leftImg8bit"),
        lambda: stems(images_in(storage.join(recipe.data, "gtFine", folder), recursive=True), "_gtFine_labelIds"),
    )
    return pair(recipe, split, images, images, labels)


CITYSCAPES = Layout(
    expected="leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and gtFine/{train,val}/<city>/*_gtFine_labelIds.png",
    needed=("leftImg8bit/train", "leftImg8bit/val", "gtFine/val"),
    listing=_list,
)
