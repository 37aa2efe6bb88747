"""Export a model as two ONNX graphs: from pixels to patch tokens, and from patch tokens to class logits.

The encoder's graph takes images of one size, because it contains the resized position embeddings; the number of images
is free. It takes decoded pixels and normalises them itself. The decoder's graph returns classes, not clusters, so users
need no table of classes.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from transfgu.decoder import MaskDecoder
from transfgu.encoder import Encoder, normalise, patch_grid
from transfgu.errors import UserError

_OPSET = 20


class PixelsToPatches(nn.Module):
    """The encoder with its normalisation."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B hw d"]:
        """Return patch tokens after the final norm."""
        return self.encoder.patch_tokens(normalise(images, self.encoder.mean, self.encoder.std))


class PatchesToClasses(nn.Module):
    """The decoder with logits of classes; the logit of a class is that of its largest cluster.

    So the class with the largest logit is that of the largest cluster, as in `Segmenter.predict`.
    """

    def __init__(self, decoder: MaskDecoder, class_of: Int[np.ndarray, " clusters"]) -> None:
        super().__init__()
        self.decoder = decoder
        members = [np.flatnonzero(class_of == index) for index in range(int(class_of.max()) + 1)]
        most = max(map(len, members))
        self.clusters: Tensor  # (C, members); classes with fewer members repeat their first
        padded = np.stack([np.pad(found, (0, most - len(found)), mode="edge") for found in members])
        self.register_buffer("clusters", torch.from_numpy(padded))

    def forward(self, patches: Float[Tensor, "B hw d"]) -> Float[Tensor, "B hw C"]:
        """Return logits by class."""
        logits: Tensor = self.decoder(patches)[0]
        return logits[:, :, self.clusters].amax(dim=-1)


def export(
    encoder: Encoder,
    decoder: MaskDecoder,
    class_of: Int[np.ndarray, " clusters"],
    folder: Path,
    *,
    size: tuple[int, int],
    names: Sequence[str],
) -> tuple[Path, Path]:
    """Write `encoder.onnx` and `decoder.onnx`, which has the classes' names as JSON in its metadata, `classes`.

    `encoder.onnx` takes `images`, (B, 3, H, W) uint8, and returns `patches`, (B, hw, d) float32; `decoder.onnx` takes
    any number of `patches` and returns `logits`, (B, hw, C) float32, whose maximum over C is the class index of the
    patch.

    Args:
        encoder: the frozen encoder.
        decoder: the mask decoder, on the same device.
        class_of: class index of each cluster.
        folder: output folder; it is created.
        size: height and width of the images, pixels.
        names: names of the classes.

    Returns:
        The two files.

    Raises:
        UserError: onnx is not installed, or `size` is not a multiple of the encoder's patch.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch asks for both, in many lines
    except ImportError:
        raise UserError(
            "exporting requires the packages onnx and onnxscript: pip install 'transfgu[onnx]'", code="package-missing"
        ) from None
    height, width = patch_grid(size, encoder.patch_size)
    folder.mkdir(parents=True, exist_ok=True)
    device = next(encoder.parameters()).device
    graphs: list[tuple[str, nn.Module, Tensor, str, str, dict[int, str]]] = [
        (
            "encoder.onnx",
            PixelsToPatches(encoder),
            torch.zeros(2, 3, *size, dtype=torch.uint8, device=device),
            "images",
            "patches",
            {0: "B"},
        ),
        (
            "decoder.onnx",
            PatchesToClasses(decoder, class_of).to(device),
            torch.zeros(2, height * width, encoder.width, device=device),
            "patches",
            "logits",
            {0: "B", 1: "hw"},
        ),
    ]
    for name, module, example, taken, given, open_sides in graphs:
        torch.onnx.export(
            module.eval(),
            (example,),
            str(folder / name),
            input_names=[taken],
            output_names=[given],
            dynamic_shapes=({side: torch.export.Dim(word, min=1) for side, word in open_sides.items()},),
            opset_version=_OPSET,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    graph = onnx.load(folder / "decoder.onnx")
    onnx.helper.set_model_props(graph, {"classes": json.dumps(list(names))})
    onnx.save(graph, folder / "decoder.onnx")
    return folder / "encoder.onnx", folder / "decoder.onnx"
