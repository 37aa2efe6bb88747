"""Read weights as tensors only, from safetensors or by torch's restricted unpickler, so that no code runs.

Checkpoints of self-supervised training hold a backbone (in DINO, the teacher's) with heads, optimisers and arguments.
The backbone's tensors are returned under their plain names.
"""

import argparse
import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from transfgu import formats
from transfgu.errors import UserError
from transfgu.store import storage

PACKAGE = "package:"
_WRAPPERS = ("teacher", "student", "state_dict", "model")
_PREFIXES = ("module.", "backbone.")
_HEADS = ("head.", "fc.", "dino_head.", "ibot_head.")


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """Tensors by plain name, and the text metadata of the file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_weights(uri: str) -> WeightFile:
    """Read a `.safetensors` file, or a `.pth` of tensors, from a path or URI, or `package:NAME` for a shipped one.

    Raises UserError where there is no such file, where it holds anything but tensors and plain values, and where a
    later version wrote it in a format of its own.
    """
    data = _read(uri)
    metadata: dict[str, str] = {}
    if uri.endswith(".safetensors"):
        try:
            content: object = safetensors.torch.load(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        except (safetensors.SafetensorError, ValueError) as error:
            raise UserError(
                f"weights {storage.shown(uri)} aren't a safetensors file ({error}): fetch them again",
                code="weights-damaged",
            ) from None
    else:
        content = _unpickle(uri, data)
    formats.check(metadata.get(formats.WEIGHTS_KEY), f"weights {storage.shown(uri)}")
    return WeightFile(tensors=unwrap(storage.shown(uri), content), metadata=metadata)


def unwrap(name: str, content: object) -> dict[str, Tensor]:
    """Return the network's tensors in a checkpoint, under their plain names.

    Taken out of DINO's `teacher`, `student`, `state_dict` or `model`, without `module.` and `backbone.` before their
    names, heads left out. `name` is what the UserError calls a content that holds none.
    """
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {
        key: value
        for key, value in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    for prefix in _PREFIXES:
        if any(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    tensors = {key: value for key, value in tensors.items() if not key.startswith(_HEADS)}
    if not tensors:
        raise UserError(
            f"{name} holds no network's weights: give a state dict, such as DINO's or timm's", code="weights-misfit"
        )
    return tensors


def _read(uri: str) -> bytes:
    if uri.startswith(PACKAGE):
        file = resources.files("transfgu") / "weights" / uri.removeprefix(PACKAGE)
        if not file.is_file():
            raise UserError(
                f"weights {uri} aren't part of this installation: install transfgu again", code="weights-missing"
            )
        return file.read_bytes()
    return storage.read_bytes(uri)


def _unpickle(uri: str, data: bytes) -> object:
    try:
        # DINO's full checkpoints keep their command line as a Namespace, a plain record.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"weights {storage.shown(uri)} aren't plain tensors, and loading anything else could run code: "
            "save the state dict alone, best as .safetensors",
            code="weights-unsafe",
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"weights {storage.shown(uri)} can't be read ({reason}): fetch them again", code="weights-damaged"
        ) from None
