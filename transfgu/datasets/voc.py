"""List Pascal VOC 2012: the images in the lists of ImageSets/Segmentation (1,464 and 1,449)."""

from transfgu.datasets.listing import Layout, Listing, images_in, in_parallel, pair, read_names
from transfgu.datasets.names import stems
from transfgu.recipe import Recipe
from transfgu.store import storage

_LISTS = {"train": "train.txt", "validation": "val.txt"}


def _list(recipe: Recipe, split: str) -> Listing:
    images, labels = in_parallel(
        lambda: stems(images_in(storage.join(recipe.data, "JPEGImages"))),
        lambda: stems(images_in(storage.join(recipe.data, "SegmentationClass"))),
    )
    names = read_names(storage.join(recipe.data, "ImageSets", "Segmentation", _LISTS[split]), images)
    return pair(recipe, split, names, images, labels)


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
