"""List Pascal VOC 2012: the images in the lists of ImageSets/Segmentation (1,464 and 1,449)."""

from transfgu.datasets.listing import Layout, Listing, pair, read_names, two_folders
from transfgu.recipe import Recipe
from transfgu.store import storage

_LISTS = {"train": "train.txt", "validation": "val.txt"}


def _list(recipe: Recipe, split: str) -> Listing:
    images, labels, notes = two_folders(
        storage.join(recipe.data, "JPEGImages"), storage.join(recipe.data, "SegmentationClass")
    )
    names = read_names(storage.join(recipe.data, "ImageSets", "Segmentation", _LISTS[split]), images)
    # Both splits have the same folders.
    return pair(recipe, split, names, images, labels, notes=notes if split == "train" else {})


VOC = Layout(
    expected="JPEGImages/*.jpg, SegmentationClass/*.png and ImageSets/Segmentation/{train,val}.txt",
    needed=(
        "JPEGImages",
        "SegmentationClass",
        "ImageSets/Segmentation/train.txt",
        "ImageSets/Segmentation/val.txt",
    ),
    listing=_list,
)
