"""A few images are shown in every epoch, always the same: how their masks change is how training goes.

What a model's frozen part makes of them is kept, so a picture costs the trained part alone.
"""

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from transfgu import datasets
from transfgu.datasets import images, pictures
from transfgu.decoder import winners
from transfgu.learner import Model
from transfgu.recipe import Recipe
from transfgu.training import tracking

_IMAGES = 6
_SIDE = 160  # px, a picture's longer side


class Shown:
    """The images that are shown, and what a model makes of them."""

    def __init__(self, recipe: Recipe, rows: pa.Table, model: Model, folder: str) -> None:
        """Take images at even distances through `rows` (`image`, URI); their pictures go to `folder` (URI)."""
        self._folder, self._size, self._model = folder, recipe.dataset.image_size, model
        self._colours = datasets.classes(recipe).colours
        count = min(_IMAGES, len(rows))
        chosen = rows["image"].take([i * len(rows) // count for i in range(count)]).to_pylist()
        found = images.read_rows(
            chosen,
            lambda uri: images.read_image(uri, orient=recipe.dataset.orient, max_pixels=recipe.dataset.max_pixels),
        )
        # Of an image that can't be read training itself says so, where it needs it.
        self._images = [image for image, _ in found if image is not None]
        resized = [images.resize(image, self._size) for image in self._images]
        self._seen: Tensor | None = model.frozen(torch.from_numpy(np.stack(resized))) if resized else None

    def paint(self, epoch: int) -> None:
        """Write the picture of an epoch, from 1; clusters are painted in the order that the model has them in."""
        if self._seen is None:
            return
        logits = self._model.logits(self._seen, self._size)
        pairs = []
        for image, each in zip(self._images, logits, strict=True):
            small = pictures.shrink(image, _SIDE)
            mask = winners(each, (small.shape[0], small.shape[1])).cpu().numpy()
            pairs.append((small, pictures.paint(mask, self._colours, max(small.shape[:2]))))
        # Of unlike shapes the first one's decides, so that they stand in rows.
        height, width = pairs[0][0].shape[:2]
        fitted = [(_fitted(a, height, width), _fitted(b, height, width)) for a, b in pairs]
        tracking.write_picture(self._folder, epoch, fitted)


def _fitted(picture: pictures.Pixels, height: int, width: int) -> pictures.Resized:
    """A picture cut, or filled up in white, to a size."""
    cut = picture[:height, :width]
    missing = ((0, height - cut.shape[0]), (0, width - cut.shape[1]), (0, 0))
    return np.pad(cut, missing, constant_values=255)
