"""List COCO 2017 with stuffthingmaps labels: the images that have an instance annotation, as published.

The instances JSON has half a gigabyte, of which only image ids are needed, so it is searched as a stream of bytes and
not parsed. Without the JSON all images of the folder are used.
"""

import functools
import lzma
import re
from importlib import resources

from transfgu.datasets.listing import Layout, Listing, pair, two_folders
from transfgu.errors import UserError
from transfgu.recipe import Recipe
from transfgu.store import storage

_FOLDERS = {"train": "train2017", "validation": "val2017"}
_CURATED = {"train": "curated_train.txt.xz", "validation": "curated_val.txt.xz"}
_IMAGE_ID = re.compile(rb'"image_id"\s*:\s*(\d+)')
_OVERLAP = 64  # bytes; longer than any match


@functools.cache
def curated_names(split: str) -> frozenset[str]:
    """Return the curated COCO-Stuff subset of IIC and PiCIE: 49,628 training and 2,174 validation images."""
    data = (resources.files("transfgu.datasets") / _CURATED[split]).read_bytes()
    return frozenset(lzma.decompress(data).decode().split())


def annotated_names(uri: str, chunk_bytes: int = 1 << 24) -> set[str] | None:
    """Return the names of the images that an instances JSON annotates; None if there is no such file.

    Args:
        uri: URI of the file.
        chunk_bytes: number of bytes read at a time.

    Raises:
        UserError: the file is truncated, or annotates nothing.
    """
    if not storage.is_file(uri):
        return None
    ids: set[int] = set()
    rest = b""
    for chunk in storage.read_chunks(uri, chunk_bytes):
        rest += chunk
        # A number at the very end may continue in the next chunk, where it is found again.
        ids.update(int(m[1]) for m in _IMAGE_ID.finditer(rest) if m.end() < len(rest))
        rest = rest[-_OVERLAP:]
    if not rest.rstrip().endswith(b"}") or not ids:
        raise UserError(
            f"{storage.shown(uri)} is truncated or annotates no image: download it again, or remove it",
            code="annotations-damaged",
        )
    return {f"{i:012d}" for i in ids}


def _list(recipe: Recipe, split: str) -> Listing:
    folder = _FOLDERS[split]
    images, labels, notes = two_folders(
        storage.join(recipe.data, "images", folder), storage.join(recipe.data, "annotations", folder)
    )
    names = annotated_names(storage.join(recipe.data, "annotations", f"instances_{folder}.json"))
    curated = curated_names(split)
    return pair(
        recipe,
        split,
        images if names is None else names,
        images,
        labels,
        curated=curated.__contains__,
        notes=notes if names is None else {"unannotated": len(images.keys() - names), **notes},
    )


COCO = Layout(
    expected="images/{train2017,val2017}/*.jpg and annotations/{train2017,val2017}/*.png (stuffthingmaps)",
    needed=("images/train2017", "images/val2017", "annotations/val2017"),
    listing=_list,
)
