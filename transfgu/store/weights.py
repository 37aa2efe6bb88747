"""Read weights as tensors only, from safetensors or by torch's restricted unpickler, so that no code runs.

Checkpoints of self-supervised training hold a backbone (in DINO, the teacher's) with heads, optimisers and arguments.
The backbone's tensors are returned under their plain names.
"""

import argparse
import io
import json
import pickle
import warnings
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
_PREFIXES = ("module.", "_orig_mod.", "backbone.")
_ANCHORS = ("patch_embed.proj.weight", "layer1.0.conv1.weight")  # first tensors of a vision transformer and of a ResNet
_DECODER = "cls_emb"
# The network that is used from a checkpoint of self-supervised training, as in the original programs.
_WANTED = ("teacher", "base_encoder", "encoder_q", "encoder.")
_UNWANTED = ("student", "momentum", "encoder_k", "ema")
_LEARNED = ("weight", "bias", "pos_embed", "cls_token", "reg_token", _DECODER)  # ends of names of learned tensors
_HEADER_BYTES = 100_000_000  # the limit of safetensors itself
_HEADS = ("head.", "fc.", "dino_head.", "ibot_head.")


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """Tensors by plain name, and the text metadata of the file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_weights(uri: str) -> WeightFile:
    """Read a safetensors file, or a `.pth` of tensors, from a path or URI, or `package:NAME` for a packaged one.

    Raises:
        UserError: there is no such file; it has anything except tensors and plain values; numbers that are not finite,
            or whole numbers as weights; or a later version wrote it in its own format.
    """
    data = _read(uri)
    metadata: dict[str, str] = {}
    _check_kind(uri, data)
    if uri.endswith(".safetensors") or data[8:9] == b"{":
        try:
            loaded = safetensors.torch.load(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        except Exception as error:  # errors of safetensors, and of torch for impossible sizes
            raise UserError(
                f"weights {storage.shown(uri)} aren't a safetensors file ({error}): download them again",
                code="weights-damaged",
            ) from None
        formats.check(metadata.get(formats.WEIGHTS_KEY), f"weights {storage.shown(uri)}")
        # A file of ours already has plain names, also of networks inside others (PiCIE's ResNet).
        tensors = loaded if formats.WEIGHTS_KEY in metadata else unwrap(storage.shown(uri), loaded)
    else:
        tensors = unwrap(storage.shown(uri), _unpickle(uri, data))
    _check_numbers(uri, tensors)
    return WeightFile(tensors=tensors, metadata=metadata)


def read_metadata(uri: str) -> dict[str, str]:
    """Read the text metadata of a `.safetensors` file from its header only: the tensors may be large, and remote.

    Returns:
        The metadata; empty if the file is missing or damaged, which :func:`read_weights` reports.
    """
    length = int.from_bytes(storage.read_range(uri, 0, 8) or b"", "little")
    if not 0 < length <= _HEADER_BYTES:
        return {}
    try:
        header = json.loads(storage.read_range(uri, 8, length) or b"")
    except ValueError:
        return {}
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def unwrap(name: str, content: object) -> dict[str, Tensor]:
    """Return the network's tensors in a checkpoint, with their plain names.

    They are taken from DINO's `teacher`, `student`, `state_dict` or `model`, without `module.`, `_orig_mod.`,
    `backbone.` or any other prefix of a vision transformer or a ResNet (`net.model.`, lightly's
    `student_backbone.vit.`, MoCo's `base_encoder.`), and without heads. If there are several networks, it is the
    teacher, or MoCo's base encoder.

    Args:
        name: name of the content in error messages.
        content: content of a checkpoint.

    Raises:
        UserError: it has no tensors, or two networks without a preferred one.
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
    while prefix := next((p for p in _PREFIXES if any(key.startswith(p) for key in tensors)), ""):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if prefix := _prefix(name, tensors):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    tensors = {key: value for key, value in tensors.items() if not key.startswith(_HEADS)}
    if not tensors:
        raise UserError(
            f"{name} has no weights of a network: give a state dict, such as DINO's or timm's", code="weights-misfit"
        )
    return tensors


def _prefix(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the prefix of the names of the network to use."""
    if any(key.endswith(_DECODER) for key in tensors):
        return ""
    for anchor in _ANCHORS:
        prefixes = sorted(key.removesuffix(anchor) for key in tensors if key.endswith(anchor))
        ranks = [
            next((i for i, word in enumerate(_WANTED) if word in prefix), len(_WANTED))
            + len(_WANTED) * any(word in prefix for word in _UNWANTED)
            for prefix in prefixes
        ]
        best = [prefix for prefix, rank in zip(prefixes, ranks, strict=True) if rank == min(ranks)]
        if "" in prefixes:
            return ""
        if len(best) > 1:
            raise UserError(
                f"{name} holds several networks ({', '.join(best)}): save the state dict of one of them",
                code="weights-ambiguous",
            )
        if best:
            return best[0]
    return ""


def _check_kind(uri: str, data: bytes) -> None:
    """Describe a file that is not weights because a download failed."""
    start, remedy = data[:512].lstrip().lower(), ""
    if not data:
        found, remedy = "are empty", "download them again"
    elif start.startswith(b"version https://git-lfs"):
        found, remedy = "are a git-lfs pointer, not the file itself", "run git lfs pull"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml")):
        found, remedy = "are a web page, not a file", "give the address of the file itself, and sign in where it asks"
    elif start.startswith(b"{") and b'"weight_map"' in data:
        found, remedy = "are an index of several files", "join the files in one state dict"
    if remedy:
        raise UserError(f"weights {storage.shown(uri)} {found}: {remedy}", code="weights-damaged")


def _check_numbers(uri: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            if name.endswith(_LEARNED):
                raise UserError(
                    f"weights {storage.shown(uri)} hold {name} as {str(tensor.dtype).removeprefix('torch.')}: save "
                    "floating-point numbers, not quantised ones",
                    code="weights-misfit",
                )
        elif not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"weights {storage.shown(uri)} have numbers in {name} that are not finite: use an earlier checkpoint",
                code="weights-not-finite",
            )


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
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # damaged files have any
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"weights {storage.shown(uri)} aren't plain tensors, and loading anything else could run code: "
            "save only the state dict, preferably as .safetensors",
            code="weights-unsafe",
        ) from None
    except Exception as error:  # torch and pickle raise various errors for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"weights {storage.shown(uri)} can't be read ({reason}): download them again", code="weights-damaged"
        ) from None
