"""Draw the predictions for a few images in every epoch, always the same, to show the progress of training.

The results of a model's frozen part are kept, so a picture needs only the trained part.
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
    """The images of the pictures, and the results of the model's frozen part."""

    def __init__(self, recipe: Recipe, rows: pa.Table, model: Model, folder: str) -> None:
        """Select images at equal distances from `rows` (`image`, URI); their pictures go to `folder` (URI)."""
        self._folder, self._size, self._model = folder, recipe.dataset.image_size, model
        self._colours = datasets.classes(recipe).colours
        count = min(_IMAGES, len(rows))
        chosen = rows["image"].take([i * len(rows) // count for i in range(count)]).to_pylist()
        found = images.read_rows(
            chosen,
            lambda uri: images.read_image(uri, orient=recipe.dataset.orient, max_pixels=recipe.dataset.max_pixels),
        )
        # Training itself reports unreadable images when it needs them.
        self._images = [image for image, _ in found if image is not None]
        resized = [images.resize(image, self._size) for image in self._images]
        self._seen: Tensor | None = model.frozen(torch.from_numpy(np.stack(resized))) if resized else None

    def paint(self, epoch: int) -> None:
        """Draw the picture of an epoch, counted from 1; clusters have the colours of the model's order."""
        if self._seen is None:
            return
        logits = self._model.logits(self._seen, self._size)
        pairs = []
        for image, each in zip(self._images, logits, strict=True):
            small = pictures.shrink(image, _SIDE)
            mask = winners(each, (small.shape[0], small.shape[1])).cpu().numpy()
            pairs.append((small, pictures.paint(mask, self._colours, max(small.shape[:2]))))
        # All pictures have the shape of the first, so that they form rows.
        height, width = pairs[0][0].shape[:2]
        fitted = [(_fitted(a, height, width), _fitted(b, height, width)) for a, b in pairs]
        tracking.write_picture(self._folder, epoch, fitted)


def _fitted(picture: pictures.Pixels, height: int, width: int) -> pictures.Resized:
    """Crop a picture to a size, or pad it with white."""
    cut = picture[:height, :width]
    missing = ((0, height - cut.shape[0]), (0, width - cut.shape[1]), (0, 0))
    return np.pad(cut, missing, constant_values=255)
