"""A trained model is a frozen encoder, a small decoder and one table, so it predicts anywhere, and needs no Ray.

The table takes clusters, which carry no names, to classes: where a run had labels, its Hungarian matching is the table.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from transfgu import datasets, storage
from transfgu.artifacts import Run
from transfgu.datasets import images
from transfgu.decoder import MaskDecoder
from transfgu.errors import BadInput, UserError
from transfgu.recipe import Recipe, from_yaml
from transfgu.tokens import PatchTokens
from transfgu.weight_files import read_weights

Pixels = UInt8[np.ndarray, "H W 3"]
Classes = Int[np.ndarray, "H W"]
Photo = Image.Image | np.ndarray | str | Path

_AT_ONCE = 16  # images that go through the encoder together
_NUMBERS = 1 << 24  # logits held at the image's own size: 64 MiB, however large the image


class Segmenter:
    """Images to class indices. Made by :meth:`load`; runs on the device that it was loaded to."""

    classes: tuple[str, ...]
    """A name for each index that :meth:`predict` returns.

    Where the run had labels, clusters were matched to classes one to one (Hungarian matching, as evaluation does), and
    these are the classes' names. Without labels it is the index itself, ``concept 7``, and ``background`` for 0 where
    the recipe has one.
    """
    colours: tuple[tuple[int, int, int], ...]
    """A colour for each index: red, green, blue, 0 to 255."""

    def __init__(
        self,
        encode: PatchTokens,
        decoder: MaskDecoder,
        *,
        size: tuple[int, int],
        classes: tuple[str, ...],
        colours: tuple[tuple[int, int, int], ...],
        class_of: Int[np.ndarray, " clusters"],
    ) -> None:
        """Join the parts of a model.

        Args:
            encode: the frozen encoder, on its device.
            decoder: the mask decoder, on the same.
            size: what images are resized to, (height, width), pixels.
            classes: names of the classes.
            colours: colours of the classes.
            class_of: each cluster's class index.
        """
        self.encode = encode
        self.decoder = decoder
        self.size = size
        self.classes = classes
        self.colours = colours
        self.class_of = class_of

    @staticmethod
    def load(uri: str | Path, *, device: str = "") -> "Segmenter":
        """The model of a run.

        Args:
            uri: the run's folder, a path or URI; it holds `recipe.yaml` and `model.safetensors`.
            device: as torch names it; a GPU where there is one unless given.

        Raises:
            UserError: the folder holds no trained run, or its weights are no safetensors file (nothing that could run
                code is ever loaded), or they are not those of its recipe's decoder.
        """
        run = Run(str(uri))
        recipe = _recipe(run)
        # A run that scored other weights than its own is shown, and predicts, by those.
        model = recipe.decoder.weights or run.file("model.safetensors")
        if not storage.exists(model):
            raise UserError(f"{run.uri} holds no model yet: finish its training, by the command that began it")
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        weights = read_weights(model).tensors
        encode = PatchTokens(recipe.encoder, where)
        decoder = MaskDecoder.from_state_dict(weights, num_heads=encode.encoder.num_heads).to(where)
        if (decoder.classes, decoder.proj_dec.in_features) != (recipe.classes, encode.encoder.width):
            raise UserError(
                f"{model} tells {decoder.classes} classes apart from tokens of width {decoder.proj_dec.in_features}, "
                f"and its recipe wants {recipe.classes} from width {encode.encoder.width}: it is another run's"
            )
        classes, class_of = class_table(recipe, matching(run))
        colours = datasets.classes(recipe).colours
        return Segmenter(
            encode, decoder, size=recipe.dataset.image_size, classes=classes, colours=colours, class_of=class_of
        )

    @overload
    def predict(self, image: Photo) -> Classes: ...  # type: ignore[overload-overlap]  # a path is no list of paths
    @overload
    def predict(self, image: Sequence[Photo]) -> list[Classes]: ...
    def predict(self, image: Photo | Sequence[Photo]) -> Classes | list[Classes]:
        """Which class each pixel is of.

        As in evaluation, the image is resized to the recipe's size, and the logits bilinearly to the image's own.

        Args:
            image: a PIL image, an (H, W, 3) uint8 array, a path or URI; or a list of these.

        Returns:
            (H, W) indices into :attr:`classes`; for a list, one such array for each image.

        Raises:
            UserError: an image that can't be read.
        """
        if isinstance(image, Image.Image | np.ndarray | str | Path):
            return next(self._predict_all([image]))
        return list(self._predict_all(image))

    def _predict_all(self, photos: Sequence[Photo]) -> Iterator[Classes]:
        for start in range(0, len(photos), _AT_ONCE):
            pixels = [_pixels(photo) for photo in photos[start : start + _AT_ONCE]]
            resized = np.stack([images.resize(image, self.size, "bilinear") for image in pixels])  # (B, 3, h, w)
            for logits, image in zip(self.logits(torch.from_numpy(resized)), pixels, strict=True):
                yield self.class_of[winners(logits, image.shape[:2]).cpu().numpy()]

    @torch.inference_mode()
    def logits(self, batch: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B clusters h w"]:
        """Logits of every patch, clusters as the decoder orders them; images must have the recipe's size."""
        logits, _ = self.decoder(self.encode(batch))  # (B, hw, clusters)
        height, width = (side // self.encode.encoder.patch_size for side in self.size)
        maps: Tensor = logits.mT.unflatten(2, (height, width))
        return maps


def winners(logits: Float[Tensor, "clusters h w"], size: tuple[int, int]) -> Int[Tensor, "H W"]:
    """The cluster with the largest logit at each pixel, logits resized bilinearly to `size`; the first of equals.

    Clusters are gone through in groups, so that a large photograph takes no more memory than a small one.
    """
    at_once = max(1, _NUMBERS // (size[0] * size[1]))
    best = torch.full(size, -torch.inf, device=logits.device)
    winner: Tensor = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for start in range(0, len(logits), at_once):
        group = F.interpolate(logits[None, start : start + at_once].float(), size, mode="bilinear")[0]
        value, index = group.max(dim=0)
        better = value > best
        winner = torch.where(better, index + start, winner)
        best = torch.where(better, value, best)
    return winner


def class_table(
    recipe: Recipe, clusters: Int[np.ndarray, " C"] | None
) -> tuple[tuple[str, ...], Int[np.ndarray, " C"]]:
    """Names of the classes that predictions are in, and each cluster's class index.

    Args:
        recipe: the run's.
        clusters: each true class's cluster, a permutation, as evaluation matched them; None where there were no labels.
    """
    if clusters is not None:
        return datasets.classes(recipe).names, np.argsort(clusters)
    concepts = tuple(f"concept {i}" for i in range(recipe.classes))
    return (("background", *concepts[1:]) if recipe.background else concepts), np.arange(recipe.classes)


def matching(run: Run) -> Int[np.ndarray, " C"] | None:
    """Each true class's cluster, as the run's evaluation matched them; None where it had no labels."""
    data = storage.read_bytes_or_none(run.artifact("evaluation").file("scores.json"))
    assignment = None if data is None else json.loads(data)["assignment"]
    return None if assignment is None else np.array(assignment)


def _recipe(run: Run) -> Recipe:
    text = storage.read_bytes_or_none(run.file("recipe.yaml"))
    if text is None:
        raise UserError(f"{run.uri} is no run's folder, as it holds no recipe.yaml: give what --run named in training")
    return from_yaml(text.decode())


def _pixels(photo: Photo) -> Pixels:
    if isinstance(photo, Image.Image):
        return np.asarray(photo.convert("RGB"))
    if isinstance(photo, np.ndarray):
        if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8:
            raise UserError(f"an image must be an (H, W, 3) array of uint8, not {photo.shape} of {photo.dtype}")
        return photo
    try:
        return images.read_image(str(photo))
    except BadInput as error:
        raise UserError(f"{photo}: {error}; give a readable image") from None
