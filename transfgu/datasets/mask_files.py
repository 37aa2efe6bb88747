"""Find the masks of another program by the relative paths of their images."""

from collections.abc import Mapping

import pyarrow as pa

from transfgu.datasets.listing import images_in
from transfgu.datasets.names import composed, stem
from transfgu.errors import UserError
from transfgu.store import storage

CLAIM = "prediction.json"  # lies beside the folder `masks` of what transfgu predict wrote


def no_objects(images: str) -> UserError:
    """Return the error to raise where MaskContrast has nothing to learn from in `images`."""
    return UserError(
        f"the class attention leaves no object in {images}: give a folder of masks by --maskcontrast.object_masks, or "
        "lower --windows.saliency_factor",
        code="objects-missing",
    )


def find_masks(rows: pa.Table, uri: str) -> dict[str, str]:
    """Find the mask of each image: the one whose path agrees with the longest end of the image's path.

    The mask of ``val2017/0001.jpg`` is ``val2017/0001.png``, else ``0001.png``, in whatever folder that lies where
    there is one of that name. A sample's name in its data set serves as well, such as Cityscapes' names without
    ``_leftImg8bit``.

    Args:
        rows: samples: `name`, `image` (URI).
        uri: a folder of masks at any depth, or the `--out` of transfgu predict.

    Returns:
        The mask's URI by sample name; samples without a mask are missing.

    Raises:
        UserError: the folder holds no masks, or two that could be an image's.
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
                f"{two} could both be the mask of {name}: keep one of them, or lay the masks in the images' folders",
                code="masks-ambiguous",
            )
        if candidates:
            found[name] = candidates[0]
            other = owners.setdefault(candidates[0], name)
            if other != name:
                raise UserError(
                    f"{storage.shown(candidates[0])} could be the mask of {other} and of {name}: lay the masks in the "
                    "images' folders, or name them after whole names, as photo.jpg.png",
                    code="masks-ambiguous",
                )
    return found


def _candidates(name: str, image: str, by_path: Mapping[str, list[str]], by_name: Mapping[str, list[str]]) -> list[str]:
    name, pieces = composed(name), composed(image).split("/")
    for start in range(len(pieces)):
        tail = "/".join(pieces[start:])
        # The mask of photo.jpg is photo.jpg.png where there is a photo.png as well.
        for key in (tail, stem(tail)):
            if key in by_path:
                return by_path[key]
    return by_name.get(stem(pieces[-1])) or by_path.get(name) or by_name.get(name.rpartition("/")[2]) or []
