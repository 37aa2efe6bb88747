"""Predict with a trained model without Ray: a frozen encoder, a small decoder and a table of classes.

The table maps clusters to classes; in a run with labels it is the Hungarian matching. A shared model is a folder like
that of a run, with the weights of encoder and decoder and without paths of data.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from jaxtyping import Float, Float32, Int, Integer, UInt8
from PIL import Image
from torch import Tensor

from transfgu import datasets, formats
from transfgu.datasets import images, rasters
from transfgu.datasets.class_lists import index_type
from transfgu.decoder import MaskDecoder, winners
from transfgu.encoder import scaled_size
from transfgu.errors import BadInput, UserError
from transfgu.inference.averaging import averaged_logits
from transfgu.inference.mask_model import MaskModel
from transfgu.inference.models import CLASSES, METHOD, load_models
from transfgu.inference.tiles import Rows, Tiling, strips
from transfgu.inference.tokens import PatchTokens
from transfgu.learner import Model
from transfgu.methods import TRANSFGU
from transfgu.recipe import Recipe
from transfgu.sharing import model_card, onnx_export
from transfgu.sharing import names as names_of
from transfgu.sharing.names import named
from transfgu.store import storage
from transfgu.store.artifacts import BESIDE, MODEL, SCORES, Run

Pixels = UInt8[np.ndarray, "H W 3"]
Classes = Integer[np.ndarray, "H W"]
Probabilities = Float32[np.ndarray, "C H W"]
Photo = images.Picture

_AT_ONCE = 16  # images per batch of the encoder
_ENCODER = "encoder.safetensors"


class Segmenter(ModelHubMixin):
    """Maps images to class indices. Created by `load`; runs on the device to which it was loaded.

    `save_pretrained`, `from_pretrained` and `push_to_hub` come from huggingface_hub: they write and read this model's
    folder, on a disk or on the Hub.

    Examples:
        The run of `make demo`, on a scene that it was not trained on:

        >>> from pathlib import Path
        >>> from transfgu import Segmenter
        >>> from transfgu.datasets.shapes import scene
        >>> segmenter = Segmenter.load(Path.home() / "transfgu" / "shapes")
        >>> image, label = scene(seed=7, split="val", index=0)
        >>> segmenter.predict(image).shape  # class indices, (H, W)
        (128, 128)
        >>> segmenter.predict(image, probabilities=True).shape  # (C, H, W)
        (10, 128, 128)
        >>> segmenter.classes[:3]
        ('target', 'quilt', 'pennant')
    """

    recipe: Recipe
    """Recipe of the run."""
    scores: Mapping[str, Any] | None
    """Scores of the run, from its `evaluation/scores.json`; None if it was not evaluated."""
    classes: tuple[str, ...]
    """A name for each index that `predict` returns; names given by the user (`transfgu name`) come first.

    If the run had labels, clusters were matched to classes one to one (Hungarian matching, as in evaluation), and these
    are the classes' names. Without labels the name contains the index, ``concept 7``, and is ``background`` for 0 if
    the recipe has one.
    """
    colours: tuple[tuple[int, int, int], ...]
    """A colour for each index: red, green, blue, 0 to 255."""
    class_of: Int[np.ndarray, " clusters"]
    """Class index of each cluster; clusters with the same name have the same index."""
    names: Mapping[int, str]
    """Names given by the user, by index of the unnamed class (`transfgu.sharing.names`)."""

    _hub_mixin_config = {}  # noqa: RUF012 - the mixin's own; what it would gather is in recipe.yaml

    def __init__(
        self,
        model: Model,
        *,
        recipe: Recipe,
        scores: Mapping[str, Any] | None,
        names: Mapping[int, str] | None = None,
    ) -> None:
        """Set up a model with its classes.

        Args:
            model: of any method, on its device and in evaluation mode.
            recipe: recipe of the run: the images' size, the classes.
            scores: see `scores`.
            names: see `names`; None: none.
        """
        self.model = model
        self.recipe = recipe
        self.scores = scores
        self.size = recipe.dataset.image_size
        self.names = names or {}
        unnamed, class_of = class_table(recipe, assignment_of(scores))
        table = named(unnamed, datasets.classes(recipe).colours, self.names)
        self.classes, self.colours, self.class_of = table.names, table.colours, table.index_of[class_of]

    @staticmethod
    def load(uri: str | Path, *, device: str = "", named: bool = True) -> "Segmenter":
        """Load the model of a run.

        Args:
            uri: the run's folder, a path or URI, with `recipe.yaml` and `model.safetensors`.
            device: torch's name of the device; by default a GPU if there is one.
            named: use the names and merges that the user gave to the run's classes.

        Raises:
            UserError: the folder has no trained run, its weights are not a safetensors file (files that could run code
                are never loaded), or they are not those of its recipe's decoder.
        """
        run = Run(str(uri))
        recipe = run.recipe()
        model = recipe.decoder.weights or run.file(MODEL)
        if not storage.exists(model):
            raise UserError(
                f"{run.uri} has no model yet: finish its training with the same command", code="model-missing"
            )
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        (loaded,) = load_models(recipe, [model], where)
        if isinstance(loaded, MaskModel):
            decoder, width = loaded.decoder, loaded.encode.encoder.width
            if (decoder.classes, decoder.proj_dec.in_features) != (recipe.classes, width):
                raise UserError(
                    f"{model} has {decoder.classes} classes and tokens of width "
                    f"{decoder.proj_dec.in_features}, but its recipe has {recipe.classes} and width {width}: it "
                    "belongs to another run",
                    code="model-mismatch",
                )
        names = names_of.read(run) if named else {}
        return Segmenter(loaded, recipe=recipe, scores=run.scores(), names=names)

    @property
    def _mask_model(self) -> MaskModel:
        """Return TransFGU's model.

        Raises:
            UserError: the model is of another method.
        """
        if not isinstance(self.model, MaskModel):
            raise UserError(
                f"a model of method {self.recipe.method} has no separate encoder and mask decoder: use predict",
                code="model-of-another-method",
            )
        return self.model

    @property
    def encode(self) -> PatchTokens:
        """The frozen encoder of a TransFGU model."""
        return self._mask_model.encode

    @property
    def decoder(self) -> MaskDecoder:
        """The mask decoder of a TransFGU model."""
        return self._mask_model.decoder

    @overload
    def predict(  # type: ignore[overload-overlap]  # a path is no list of paths
        self,
        image: Photo,
        *,
        probabilities: Literal[False] = False,
        tile: int | None = None,
        overlap: int = 64,
        orient: bool = True,
    ) -> Classes: ...
    @overload
    def predict(
        self,
        image: Sequence[Photo],
        *,
        probabilities: Literal[False] = False,
        tile: int | None = None,
        overlap: int = 64,
        orient: bool = True,
    ) -> list[Classes]: ...
    @overload
    def predict(  # type: ignore[overload-overlap]
        self,
        image: Photo,
        *,
        probabilities: Literal[True],
        tile: int | None = None,
        overlap: int = 64,
        orient: bool = True,
    ) -> Probabilities: ...
    @overload
    def predict(
        self,
        image: Sequence[Photo],
        *,
        probabilities: Literal[True],
        tile: int | None = None,
        overlap: int = 64,
        orient: bool = True,
    ) -> list[Probabilities]: ...
    def predict(
        self,
        image: Photo | Sequence[Photo],
        *,
        probabilities: bool = False,
        tile: int | None = None,
        overlap: int = 64,
        orient: bool = True,
    ) -> Classes | Probabilities | list[Classes] | list[Probabilities]:
        """Predict the class of each pixel, or the probability of each class.

        As in evaluation, the image is resized to the recipe's size, the logits are averaged over its
        `evaluation.scales` and `evaluation.flip`, and resized bilinearly to the image's own size. With `tile`, this is
        done for overlapping tiles of the image, whose logits are blended: small things in a large image are found, and
        an image file of any size can be predicted (above the recipe's `dataset.max_pixels` by the extra `geo`).
        Without it, an image of more pixels than that is refused.

        Args:
            image: a PIL image, an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8 or uint16, a file's bytes, a
                path or URI; or a list of these.
            probabilities: return the classes' probabilities, which take 4 C bytes per pixel, instead of the index of
                the largest. The probability of a merged class is the sum over its clusters.
            tile: height of a tile in pixels of the image; None: no tiles. An image that fits in one tile is not
                divided.
            overlap: minimum number of pixels that neighbouring tiles share.
            orient: apply the orientation in EXIF data, so that the mask matches the image in a viewer; False: use
                stored pixels.

        Returns:
            (H, W) indices into `classes`, or (C, H, W) float32 that sum to 1 at each pixel; for a list, one such array
                per image. Indices are uint8 (uint16 for more than 256 classes) if tiles were used.

        Raises:
            UserError: an image that can't be read, or a tile that is not larger than the overlap.
        """
        single = isinstance(image, Image.Image | np.ndarray | bytes | str | Path)
        photos: Sequence[Photo] = [image] if single else image  # type: ignore[assignment, list-item]
        if tile is None:
            found = list(self._predict_all(photos, probabilities, orient))
        else:
            tiling = Tiling(tile=tile, overlap=overlap)
            found = [self._predict_tiled(photo, tiling, probabilities, orient) for photo in photos]
        return found[0] if single else found

    def _predict_tiled(
        self, photo: Photo, tiling: Tiling, probabilities: bool, orient: bool
    ) -> Classes | Probabilities:
        most = self.recipe.dataset.max_pixels
        try:
            rows = (
                rasters.rows_of(str(photo), orient=orient, max_pixels=most)
                if isinstance(photo, str | Path)
                else rasters.ArrayRows(_pixels(photo, orient, most))
            )
            shape = (len(self.classes), rows.height, rows.width) if probabilities else (rows.height, rows.width)
            whole = np.empty(shape, np.float32 if probabilities else index_type(len(self.classes)))
            done = 0
            for strip in self.strips(rows, tiling, probabilities=probabilities):
                whole[..., done : done + strip.shape[-2], :] = strip
                done += strip.shape[-2]
            return whole
        except BadInput as error:
            raise _unreadable(photo, error) from None

    def strips(
        self,
        rows: Rows,
        tiling: Tiling,
        *,
        probabilities: bool = False,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[np.ndarray]:
        """Yield the results of `predict` with tiles as strips of rows, for results that don't fit in memory.

        Args:
            rows: the image (`transfgu.datasets.rasters`).
            tiling: the tiles.
            probabilities: yield (C, rows, W) probabilities instead of (rows, W) indices.
            report: called after each batch of tiles, with the number of tiles done and that of all tiles.
        """
        height, width = tiling.size(self.size)
        if rows.height <= height and rows.width <= width:
            whole = rows.read(0, rows.height)
            yield from self._predict_all([whole], probabilities, orient=False)
            return
        class_of = torch.from_numpy(self.class_of)
        kind = index_type(len(self.classes))

        def reduce(logits: Float[Tensor, "clusters rows columns"]) -> np.ndarray:
            if not probabilities:
                indices: np.ndarray = self.class_of.astype(kind)[logits.argmax(dim=0).cpu().numpy()]
                return indices
            summed = logits.new_zeros((len(self.classes), *logits.shape[1:]))
            shares: np.ndarray = summed.index_add_(0, class_of.to(logits.device), logits.softmax(dim=0)).cpu().numpy()
            return shares

        yield from strips(rows, self.size, tiling, self._cells(), self.logits, reduce, report=report)

    def _cells(self) -> tuple[int, int]:
        """Return the cells of a tile, vertical and horizontal; their borders are borders of patches at every scale."""
        patch = self.model.patch_size
        sizes = [scaled_size(self.size, scale, patch) for scale in self.recipe.evaluation.scales]
        down, across = (math.gcd(*sides) // patch for sides in zip(*sizes, strict=True))
        return down, across

    def _predict_all(
        self, photos: Sequence[Photo], probabilities: bool, orient: bool
    ) -> Iterator[Classes | Probabilities]:
        for start in range(0, len(photos), _AT_ONCE):
            most = self.recipe.dataset.max_pixels
            pixels = [_pixels(photo, orient, most) for photo in photos[start : start + _AT_ONCE]]
            resized = np.stack([images.resize(image, self.size, "bilinear") for image in pixels])  # (B, 3, h, w)
            sizes = [(image.shape[0], image.shape[1]) for image in pixels]
            yield from self._probabilities(resized, sizes) if probabilities else self.predict_resized(resized, sizes)

    def predict_resized(
        self, resized: UInt8[np.ndarray, "n 3 h w"], sizes: Sequence[tuple[int, int]]
    ) -> Iterator[Classes]:
        """Yield the results of `predict` for images that already have the recipe's size.

        Args:
            resized: the images.
            sizes: height and width of each one's mask, pixels.
        """
        for logits, size in self._logits_of(resized, sizes):
            yield self.class_of[winners(logits, size).cpu().numpy()]

    def _probabilities(
        self, resized: UInt8[np.ndarray, "n 3 h w"], sizes: Sequence[tuple[int, int]]
    ) -> Iterator[Probabilities]:
        class_of = torch.from_numpy(self.class_of)
        for logits, size in self._logits_of(resized, sizes):
            whole = F.interpolate(logits[None].float(), size, mode="bilinear")[0].softmax(dim=0)
            summed = whole.new_zeros((len(self.classes), *size))
            yield summed.index_add_(0, class_of.to(logits.device), whole).cpu().numpy()

    def _logits_of(
        self, resized: UInt8[np.ndarray, "n 3 h w"], sizes: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[Float[Tensor, "clusters h w"], tuple[int, int]]]:
        for start in range(0, len(resized), _AT_ONCE):
            # Arrays from Ray's object store are read-only, of which torch warns; these are copied.
            batch = torch.from_numpy(np.require(resized[start : start + _AT_ONCE], requirements="W"))
            yield from zip(self.logits(batch), sizes[start : start + _AT_ONCE], strict=True)

    def logits(self, batch: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B clusters h w"]:
        """Return logits of every patch, with clusters in the decoder's order; images must have the recipe's size.

        They are averaged over the recipe's `evaluation.scales` and `evaluation.flip`, as in evaluation, and have the
        patches of the largest scale.
        """
        return averaged_logits([self.model], batch, self.recipe.evaluation)[0]

    def export_onnx(self, folder: str | Path, *, size: tuple[int, int] | None = None) -> tuple[Path, Path]:
        """Write `encoder.onnx` and `decoder.onnx` into a local folder; see `transfgu.sharing.onnx_export`.

        Raises:
            UserError: the package onnx is not installed, or `size` is not a multiple of the encoder's patch.
        """
        return onnx_export.export(
            self.encode.encoder, self.decoder, self.class_of, Path(folder), size=size or self.size, names=self.classes
        )

    # Methods for huggingface_hub's mixin.

    def _save_pretrained(self, save_directory: Path) -> None:
        encode: PatchTokens | None = getattr(self.model, "encode", None)
        shared = self.recipe.with_fields(
            {
                "data": "",
                "labels": "not shared" if self.recipe.labels else "",  # names depend on whether there were labels
                "encoder.weights": BESIDE + _ENCODER if encode else "pretrained",
                "decoder.weights": "",
                # Initial weights are not needed to load it.
                **{f"{component}.weights": "random" for component in ("picie", "maskcontrast")},
                "maskcontrast.object_masks": "",
            }
        )
        (save_directory / "recipe.yaml").write_text(shared.to_yaml())
        described = {formats.WEIGHTS_KEY: str(formats.FORMAT)}
        if encode:
            encoder = encode.encoder
            sides = {"patch_size": str(encoder.patch_size), "num_heads": str(encoder.num_heads)}
            tensors = {name: tensor.contiguous() for name, tensor in encoder.vit.state_dict().items()}
            safetensors.torch.save_file(tensors, save_directory / _ENCODER, {**described, **sides})
        if self.recipe.method != TRANSFGU:
            described |= {METHOD: self.recipe.method, CLASSES: str(self.recipe.classes)}
        weights = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        safetensors.torch.save_file(weights, save_directory / MODEL, described)
        if self.names:
            (save_directory / names_of.FILE).write_text(names_of.to_yaml(self.names))
        if self.scores is not None:
            (save_directory / SCORES).parent.mkdir(exist_ok=True)
            (save_directory / SCORES).write_text(json.dumps(formats.stamp(self.scores), indent=1))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: Any,
    ) -> "Segmenter":
        if Path(model_id).is_dir():
            return cls.load(model_id, **model_kwargs)
        folder = snapshot_download(
            model_id,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return cls.load(folder, **model_kwargs)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the model card, filled in from the run."""
        return model_card.write_card(self.recipe, self.classes, self.scores, named=bool(self.names))


def class_table(
    recipe: Recipe, clusters: Int[np.ndarray, " C"] | None
) -> tuple[tuple[str, ...], Int[np.ndarray, " C"]]:
    """Return the names of the classes of predictions, and each cluster's class index.

    Args:
        recipe: recipe of the run.
        clusters: cluster of each true class, a permutation from evaluation; None without labels.
    """
    if clusters is not None:
        return datasets.classes(recipe).names, np.argsort(clusters)
    concepts = tuple(f"concept {i}" for i in range(recipe.classes))
    return (("background", *concepts[1:]) if recipe.background else concepts), np.arange(recipe.classes)


def assignment_of(scores: Mapping[str, Any] | None) -> Int[np.ndarray, " C"] | None:
    """Return the cluster of each true class from the run's evaluation; None without labels."""
    assignment = None if scores is None else scores["assignment"]
    return None if assignment is None else np.array(assignment)


def _pixels(photo: Photo, orient: bool, max_pixels: int) -> Pixels:
    try:
        return images.pixels_of(photo, orient=orient, max_pixels=max_pixels)
    except BadInput as error:
        raise _unreadable(photo, error) from None


def _unreadable(photo: Photo, error: BadInput) -> UserError:
    name = storage.shown(str(photo)) if isinstance(photo, str | Path) else f"the {type(photo).__name__}"
    return UserError(f"{name}: {error}; give a readable image", code="image-unreadable")
