"""Weights with other names, and files in place of weights; each error names its cause."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.refusals import refused
from transfgu import formats
from transfgu.encoder import Encoder
from transfgu.errors import UserError
from transfgu.store.weights import read_metadata, read_weights, unwrap

TINY = "test_vit.r160_in1k"  # of timm: patch 16, width 64, 2 heads


def state() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = Encoder.from_pretrained(TINY, "random").vit.state_dict()
    return tensors


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def save(path: Path, tensors: dict[str, Tensor], **metadata: str) -> str:
    safetensors.torch.save_file(tensors, path, metadata)
    return str(path)


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "module.", "backbone.", "_orig_mod.", "module._orig_mod.backbone.", "_orig_mod.module.", "net.model."),
        *("model.", "encoder.", "student_backbone.vit.", "base_encoder.", "encoder_q.", "vit."),
    ],
)
def test_names_before_the_names(prefix: str) -> None:
    found = {name: torch.full((2,), float(i)) for i, name in enumerate(("patch_embed.proj.weight", "cls_token"))}
    heads = {f"{prefix}head.weight": torch.zeros(2), "predictor.0.weight": torch.zeros(2)}
    tensors = unwrap("x", under(prefix, found) | (heads if prefix else {}))
    assert tensors.keys() == found.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("prefixes", "wanted"),
    [
        (("student_backbone.", "teacher_backbone."), 1),
        (("base_encoder.", "momentum_encoder."), 0),
        (("encoder_k.", "encoder_q."), 1),
        (("model.", "model_ema."), 0),
    ],
)
@pytest.mark.parametrize("anchor", ["patch_embed.proj.weight", "layer1.0.conv1.weight"])
def test_of_two_networks_the_one_that_is_meant(prefixes: tuple[str, ...], wanted: int, anchor: str) -> None:
    tensors = {prefix + anchor: torch.full((2,), float(i)) for i, prefix in enumerate(prefixes)}
    assert unwrap("x", tensors)[anchor].tolist() == [wanted, wanted]


def test_two_networks_of_which_none_is_meant() -> None:
    with refused("weights-ambiguous left. right."):
        unwrap("x", under("left.", state()) | under("right.", state()))


def test_a_file_of_ours_keeps_its_names(tmp_path: Path) -> None:
    """Like PiCIE's: a ResNet inside a larger network."""
    tensors = {"centroids": torch.ones(2, 3), "features.backbone.layer1.0.conv1.weight": torch.ones(1, 1, 3, 3)}
    ours = save(tmp_path / "ours.safetensors", tensors, **{formats.WEIGHTS_KEY: str(formats.FORMAT)})
    assert read_weights(ours).tensors.keys() == tensors.keys()
    assert read_weights(save(tmp_path / "theirs.safetensors", tensors)).tensors.keys() == {"layer1.0.conv1.weight"}


def test_metadata_are_read_without_the_tensors(tmp_path: Path) -> None:
    whole = Path(save(tmp_path / "whole.safetensors", {"a": torch.ones(1000)}, patch_size="8"))
    assert read_metadata(str(whole)) == {"patch_size": "8"}
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-4000])  # all of the tensor
    assert read_metadata(str(cut)) == {"patch_size": "8"}
    for damage in (b"", b"\xff" * 20, whole.read_bytes()[:20], b"\x02\0\0\0\0\0\0\0[]"):
        cut.write_bytes(damage)
        assert read_metadata(str(cut)) == {}
    assert read_metadata(str(tmp_path / "missing.safetensors")) == {}


def test_a_decoder_keeps_its_names() -> None:
    tensors = {"decoder.cls_emb": torch.zeros(1, 2, 3), "encoder.patch_embed.proj.weight": torch.zeros(2)}
    assert unwrap("x", tensors) == tensors


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 85\n"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (POINTER, "git-lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "page"),
        (json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}).encode(), "index"),
        (b"nothing of the kind", ""),
        (b"\xff" * 64, ""),
        (b"PK\x03\x04" + bytes(60), ""),
        (b"\x10\0\0\0\0\0\0\0" + b'{"a":' + b" " * 11, ""),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_what_lies_in_place_of_weights(tmp_path: Path, data: bytes, said: str, suffix: str) -> None:
    (tmp_path / f"w{suffix}").write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_weights(str(tmp_path / f"w{suffix}"))
    assert caught.value.code in ("weights-damaged", "weights-unsafe")
    assert all(word in str(caught.value) for word in said.split())


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3)}
    path = save(tmp_path / "w.safetensors", tensors)
    (tmp_path / "pytorch_model.bin").write_bytes(Path(path).read_bytes())
    assert torch.equal(read_weights(str(tmp_path / "pytorch_model.bin")).tensors["a"], tensors["a"])


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"norm.weight": torch.full((64,), float("nan"))}, "weights-not-finite w.safetensors norm.weight"),
        ({"norm.weight": torch.full((64,), float("inf"))}, "weights-not-finite w.safetensors norm.weight"),
        ({"norm.weight": torch.ones(64, dtype=torch.int32)}, "weights-misfit w.safetensors norm.weight int32"),
        ({"pos_embed": torch.zeros(1, 196, 64)}, "weights-misfit w.safetensors"),
        ({"pos_embed": torch.zeros(1, 99, 64)}, "weights-misfit w.safetensors"),
        ({"pos_embed": torch.zeros(101, 64)}, "weights-misfit w.safetensors pos_embed"),
        ({"reg_token": torch.zeros(1, 4, 64)}, "weights-misfit w.safetensors reg_token"),
        ({"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}, "weights-misfit w.safetensors"),
        ({"cls_token": torch.zeros(64)}, "weights-misfit w.safetensors cls_token"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: dict[str, Tensor], refusal: str) -> None:
    path = save(tmp_path / "w.safetensors", state() | change)
    with refused(refusal):
        Encoder.from_pretrained(TINY, path)


def test_a_file_that_says_other_heads_than_its_name(tmp_path: Path) -> None:
    path = save(tmp_path / "w.safetensors", state(), num_heads="4", patch_size="16")
    with refused("weights-misfit w.safetensors num_heads"):
        Encoder.from_pretrained(TINY, path)
    own = save(tmp_path / "own.safetensors", state(), num_heads="2", patch_size="16")
    assert Encoder.from_pretrained(TINY, own).num_heads == 2


@pytest.mark.parametrize("shape", [(5,), (1, 0, 64), (3, 5, 2, 1)])
@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "reg_token"])
def test_state_dicts_of_odd_shapes(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError) as caught:
        Encoder.from_state_dict(state() | {name: torch.zeros(shape)}, patch_size=16, num_heads=2)
    assert caught.value.code in ("weights-misfit", "heads-mismatch")
