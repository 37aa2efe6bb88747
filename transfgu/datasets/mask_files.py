"""Find the masks of another program by the relative paths of their images."""

from collections.abc import Mapping

import pyarrow as pa

from transfgu.datasets.listing import images_in
from transfgu.datasets.names import composed, stem
from transfgu.errors import UserError
from transfgu.store import storage

CLAIM = "prediction.json"  # in the --out of transfgu predict, next to the folder `masks`


def no_objects(images: str) -> UserError:
    """Return the error for `images` without any object for MaskContrast."""
    return UserError(
        f"the class attention finds no object in {images}: give a folder of masks by --maskcontrast.object_masks, or "
        "lower --windows.saliency_factor",
        code="objects-missing",
    )


def find_masks(rows: pa.Table, uri: str) -> dict[str, str]:
    """Find the mask of each image: the one whose path agrees with the longest end of the image's path.

    The mask of ``val2017/0001.jpg`` is ``val2017/0001.png``, or ``0001.png`` in any folder if there is only one with
    that name. The name of a sample in its data set can be used as well, such as Cityscapes' names without
    ``_leftImg8bit``.

    Args:
        rows: samples: `name`, `image` (URI).
        uri: a folder of masks with subfolders, or the `--out` of transfgu predict.

    Returns:
        The mask's URI by sample name; samples without a mask are missing.

    Raises:
        UserError: the folder has no masks, or two that could be an image's.
    """
    storage.check_readable(uri)
    folder = storage.join(uri, "masks") if storage.exists(storage.join(uri, CLAIM)) else uri
    files = images_in(folder, recursive=True)
    if not files:
        raise UserError(
            f"{storage.shown(folder)} has no masks: give --masks a folder of indexed or grey PNGs, one per image",
            code="masks-missing",
        )
    by_path: dict[str, list[str]] = {}
    by_name: dict[str, list[str]] = {}
    for relative, mask in files.items():
        key = composed(stem(relative))
        by_path.setdefault(key, []).append(mask)
        by_name.setdefault(key.rpartition("/")[2], []).append(mask)
    found: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name, image in zip(rows["name"].to_pylist(), rows["image"].to_pylist(), strict=True):
        candidates = _candidates(name, image, by_path, by_name)
        if len(candidates) > 1:
            two = " and ".join(storage.shown(mask) for mask in sorted(candidates)[:2])
            raise UserError(
                f"{two} could both be the mask of {name}: keep one, or put the masks into the folders of the images",
                code="masks-ambiguous",
            )
        if candidates:
            found[name] = candidates[0]
            other = owners.setdefault(candidates[0], name)
            if other != name:
                raise UserError(
                    f"{storage.shown(candidates[0])} could be the mask of {other} and of {name}: put masks into the "
                    "images' folders, or use full names, such as photo.jpg.png",
                    code="masks-ambiguous",
                )
    return found


def _candidates(name: str, image: str, by_path: Mapping[str, list[str]], by_name: Mapping[str, list[str]]) -> list[str]:
    name, pieces = composed(name), composed(image).split("/")
    for start in range(len(pieces)):
        tail = "/".join(pieces[start:])
        # The mask of photo.jpg is photo.jpg.png if there is a photo.png as well.
        for key in (tail, stem(tail)):
            if key in by_path:
                return by_path[key]
    return by_name.get(stem(pieces[-1])) or by_path.get(name) or by_name.get(name.rpartition("/")[2]) or []
