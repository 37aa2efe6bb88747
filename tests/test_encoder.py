"""The encoder against attention written out in full, autograd one class at a time, and timm's own forward pass."""

import math
import pickle
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.mlp import SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from tests.refusals import refused
from transfgu import encoder as encoder_module
from transfgu.encoder import Encoder, combined_maps, normalise, patch_grid

PATCH = 8


def random_state(width: int, depth: int, native: int, mlp: int, seed: int) -> dict[str, Tensor]:
    """Weights of a transformer with DINO's names, large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def linear(out: int, fan: int) -> tuple[Tensor, Tensor]:
        return normal(out, fan, scale=fan**-0.5), normal(out, scale=0.1)

    state = {"cls_token": normal(1, 1, width), "pos_embed": normal(1, 1 + native**2, width, scale=0.5)}
    layers = {"patch_embed.proj": (normal(width, 3, PATCH, PATCH, scale=0.1), normal(width, scale=0.1))}
    for i in range(depth):
        layers |= {
            f"blocks.{i}.norm1": (1 + normal(width, scale=0.1), normal(width, scale=0.1)),
            f"blocks.{i}.attn.qkv": linear(3 * width, width),
            f"blocks.{i}.attn.proj": linear(width, width),
            f"blocks.{i}.norm2": (1 + normal(width, scale=0.1), normal(width, scale=0.1)),
            f"blocks.{i}.mlp.fc1": linear(mlp, width),
            f"blocks.{i}.mlp.fc2": linear(width, mlp),
        }
    layers["norm"] = (1 + normal(width, scale=0.1), normal(width, scale=0.1))
    for name, (weight, bias) in layers.items():
        state |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return state


def literal_forward(state: dict[str, Tensor], heads: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return all tokens after the final norm, and the whole last block's attention, as defined in DINO's paper."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]

    count, (h, w) = len(images), (images.shape[2] // PATCH, images.shape[3] // PATCH)
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([state["cls_token"].expand(count, -1, -1), x.flatten(2).transpose(1, 2)], 1)
    position, native = state["pos_embed"], math.isqrt(state["pos_embed"].shape[1])
    patches = position[:, 1:].reshape(1, native, native, -1).permute(0, 3, 1, 2)
    if (h, w) != (native, native):
        factor = ((h + 0.1) / native, (w + 0.1) / native)
        patches = F.interpolate(patches, scale_factor=factor, mode="bicubic")
    x = x + torch.cat([position[:, :1], patches.flatten(2).transpose(1, 2)], 1)
    depth = sum(name.endswith("norm1.weight") for name in state)
    for i in range(depth):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        if attention.requires_grad:
            attention.retain_grad()
        x = x + linear(f"blocks.{i}.attn.proj", (attention @ v).transpose(1, 2).flatten(2))
        x = x + linear(f"blocks.{i}.mlp.fc2", F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))))
    return norm("norm", x), attention


def literal_gradient(
    tokens: Tensor, attention: Tensor, concepts: Tensor, prefix: int, zero_grad: Callable[[], None]
) -> Tensor:
    """Gradient of 1 - cosine on the class token's attention, averaged over heads, by K backward passes; (B, K, hw)."""
    gradients: list[Tensor] = []
    for concept in concepts:
        zero_grad()
        attention.grad = None
        loss = (1 - F.cosine_similarity(tokens[:, 0], concept[None])).sum()
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        assert attention.grad is not None
        gradients.append(attention.grad.mean(1)[:, 0, prefix:].clone())
    return torch.stack(gradients, 1)


def literal_maps(attention: Tensor, gradient: Tensor) -> Tensor:
    """M = A / max(A) + relu(-g), one image and one class at a time; attention (B, hw), gradient and maps (B, K, hw)."""
    maps = torch.zeros_like(gradient)
    for i, k in np.ndindex(*gradient.shape[:2]):
        row = gradient[i, k].tolist()
        mass, kept = 0.0, [0.0] * len(row)
        whole = sum(-value for value in row if value < 0)
        for place in sorted(range(len(row)), key=row.__getitem__):  # largest first, until they make up 80 %
            if row[place] < 0 and mass < 0.8 * whole:
                kept[place] = -row[place]
                mass += kept[place]
        maps[i, k] = attention[i] / attention[i].max() + torch.tensor(kept)
        maps[i, k][gradient[i, k] > 0] = 0
    return maps


@st.composite
def random_vits(draw: st.DrawFn) -> tuple[dict[str, Tensor], int, Tensor, Tensor]:
    heads, of_head = draw(st.integers(1, 4)), draw(st.sampled_from([4, 8, 12]))
    width, depth, native = heads * of_head, draw(st.integers(1, 4)), draw(st.integers(2, 7))
    h, w = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    seed = draw(st.integers(0, 2**32))
    state = random_state(width, depth, native, mlp=draw(st.integers(width, 4 * width)), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    images = torch.randn(draw(st.integers(1, 3)), 3, h * PATCH, w * PATCH, generator=generator)
    return state, heads, images, torch.randn(draw(st.integers(1, 6)), width, generator=generator)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(random_vits())
def test_concept_maps_are_autograd_through_everything(vit: tuple[dict[str, Tensor], int, Tensor, Tensor]) -> None:
    state, heads, images, concepts = vit
    encoder = Encoder.from_state_dict(state, patch_size=PATCH, num_heads=heads)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}

    def zero_grad() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    tokens, attention = literal_forward(leaves, heads, images)
    gradient = literal_gradient(tokens, attention, concepts, 1, zero_grad)
    mean = attention.detach().mean(1)[:, 0, 1:]
    for scale in (1 / len(images), 30.0):  # as published; and so that the gradient dominates
        maps = encoder.concept_maps(images, concepts, gradient_scale=scale)
        torch.testing.assert_close(maps.flatten(2), literal_maps(mean, scale * gradient), rtol=1e-5, atol=1e-5)
    output = encoder(images)
    torch.testing.assert_close(output.cls, tokens[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.patches, tokens[:, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.cls_attention, attention[:, :, 0, 1:], rtol=1e-4, atol=1e-6)


# ---- other transformers, through timm's own forward pass ----

TINY: dict[str, Any] = {
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 0,
    "global_pool": "token",
    "dynamic_img_size": True,
}
ROTARY: dict[str, Any] = {**TINY, "patch_size": 16, "img_size": 64, "use_rot_pos_emb": True, "use_abs_pos_emb": False}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "timm": partial(VisionTransformer, img_size=64, patch_size=16, **TINY),
    "DINOv2": partial(
        VisionTransformer,
        img_size=70,
        patch_size=14,
        reg_tokens=4,
        no_embed_class=True,
        init_values=1e-5,
        **TINY,
    ),
    "DINOv2 giant": partial(
        VisionTransformer,
        img_size=70,
        patch_size=14,
        init_values=1e-5,
        mlp_layer=SwiGLUPacked,  # type: ignore[arg-type]  # a partial of a module
        act_layer=nn.SiLU,
        **TINY,
    ),
    "DINOv3": partial(
        Eva,
        num_reg_tokens=4,
        init_values=1e-5,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        **ROTARY,
    ),
    "biases apart": partial(Eva, qkv_bias=True, rope_type="dinov3", rope_rotate_half=True, **ROTARY),
    "EVA-02": partial(
        Eva,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        ref_feat_shape=(4, 4),
        **{**ROTARY, "use_abs_pos_emb": True},
    ),
    "rotation by head and depth": partial(
        Eva, rope_type="mixed", attn_type="rope", init_values=1e-5, no_embed_class=True, **ROTARY
    ),
    "grouped keys": partial(Eva, attn_type="rope", qkv_fused=False, num_kv_heads=2, qk_norm=True, **ROTARY),
}


def build(family: str) -> Any:
    torch.manual_seed(0)
    vit = FAMILIES[family]().eval()
    for parameter in vit.parameters():  # LayerScale and biases that matter, attention that is not uniform
        parameter.data += 0.2 * torch.randn_like(parameter)
    return vit


@pytest.mark.parametrize("family", FAMILIES)
def test_other_transformers_are_timms_and_autograds(family: str) -> None:
    vit = build(family)
    side = vit.patch_embed.patch_size[0]
    images, concepts = torch.randn(2, 3, 3 * side, 5 * side), torch.randn(4, 48)
    caught: list[Tensor] = []

    def catch(module: nn.Module, arguments: tuple[Any, ...], attention: Tensor) -> None:
        attention.retain_grad()
        caught.append(attention)

    vit.blocks[-1].attn.fused_attn = False
    handle = vit.blocks[-1].attn.attn_drop.register_forward_hook(catch)
    tokens, prefix = vit.forward_features(images), vit.num_prefix_tokens
    handle.remove()
    gradient = literal_gradient(tokens, caught[0], concepts, prefix, vit.zero_grad)
    expected = literal_maps(caught[0].detach().mean(1)[:, 0, prefix:], 5 * gradient)
    encoder = Encoder(vit)
    assert (encoder.patch_size, encoder.width, encoder.depth, encoder.num_heads) == (side, 48, 3, 4)
    output = encoder(images)
    assert output.grid == (3, 5)
    torch.testing.assert_close(output.cls, tokens[:, 0].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.patches, tokens[:, prefix:].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.cls_attention, caught[0][:, :, 0, prefix:].detach(), rtol=1e-4, atol=1e-6)
    maps = encoder.concept_maps(images, concepts, gradient_scale=5.0)
    torch.testing.assert_close(maps.flatten(2), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder.class_tokens(images), output.cls, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("registers", ["vit_small_patch14_reg4_dinov2.lvd142m", "vit_small_patch16_dinov3.lvd1689m"])
def test_sizes_of_the_tutorial_fit_encoders_with_registers(registers: str) -> None:
    """All sizes in its table are whole patches, and random views are half of the training size."""
    table = (Path(__file__).parents[1] / "docs" / "tutorial-images.md").read_text().splitlines()
    (row,) = [line for line in table if line.startswith("|") and f"`{registers}`" in line]
    _, patch, image, feature, window = (cell.strip() for cell in row.strip("|").split("|"))
    encoder = Encoder.from_pretrained(registers, "random")
    assert encoder.patch_size == int(patch)
    for size in (image, feature, window):
        height, width = map(int, size.split("x"))
        assert patch_grid((height, width), encoder.patch_size) == (height // int(patch), width // int(patch))
    assert int(image.split("x")[0]) % (2 * encoder.patch_size) == 0
    output = encoder(torch.zeros(1, 3, 2 * encoder.patch_size, 3 * encoder.patch_size))
    assert output.grid == (2, 3)
    assert output.patches.shape == (1, 6, encoder.width)


@pytest.mark.parametrize(
    ("name", "size", "grid", "rotary"),
    [
        ("vit_small_patch14_reg4_dinov2", (42, 56), (3, 4), False),
        ("vit_small_patch16_dinov3", (48, 64), (3, 4), True),
    ],
)
def test_timms_own_dinov2_and_dinov3(name: str, size: tuple[int, int], grid: tuple[int, int], rotary: bool) -> None:
    encoder = Encoder.from_pretrained(name, "random")
    assert (encoder.vit.num_prefix_tokens, encoder.position_resize) == (5, "timm")
    assert (getattr(encoder.vit, "rope", None) is not None) == rotary
    vit, prefix = encoder.vit, encoder.vit.num_prefix_tokens
    caught: list[Tensor] = []

    def catch(module: nn.Module, arguments: tuple[Any, ...], attention: Tensor) -> None:
        attention.requires_grad_().retain_grad()
        caught.append(attention)

    torch.manual_seed(0)
    images, concepts = torch.randn(1, 3, *size), torch.randn(3, encoder.width)
    vit.blocks[-1].attn.fused_attn = False
    handle = vit.blocks[-1].attn.attn_drop.register_forward_hook(catch)
    tokens = vit.forward_features(images)
    handle.remove()
    gradient = literal_gradient(tokens, caught[0], concepts, prefix, vit.zero_grad)
    scale = float(1 / gradient.abs().max())  # so that the gradient counts as much as the attention
    expected = literal_maps(caught[0].detach().mean(1)[:, 0, prefix:], scale * gradient)
    output = encoder(images)
    assert output.grid == grid
    torch.testing.assert_close(output.cls, tokens[:, 0].detach(), rtol=1e-4, atol=1e-4)
    maps = encoder.concept_maps(images, concepts, gradient_scale=scale)
    torch.testing.assert_close(maps.flatten(2), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"class_token": False, "global_pool": "avg"}, "encoder-unsupported"),
        ({"dynamic_img_size": False}, "encoder-unsupported"),
        ({"block_fn": timm.models.vision_transformer.ResPostBlock}, "encoder-unsupported ResPostBlocks"),
    ],
)
def test_transformers_that_cant_be_taken_apart(change: dict[str, Any], refusal: str) -> None:
    with refused(refusal):
        Encoder(VisionTransformer(**{"img_size": 64, "patch_size": 16, **TINY, **change}))


# ---- what one asks of it ----


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.from_state_dict(random_state(24, 2, 4, mlp=48, seed=3), patch_size=PATCH, num_heads=3)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 5 * PATCH, 6 * PATCH, generator=torch.Generator().manual_seed(5))


def test_each_question_is_answered_as_by_the_whole(encoder: Encoder, images: Tensor) -> None:
    output = encoder(images)
    torch.testing.assert_close(encoder.class_tokens(images), output.cls)
    torch.testing.assert_close(encoder.patch_tokens(images), output.patches)
    attention = output.cls_attention.mean(1).reshape(3, 5, 6)
    torch.testing.assert_close(encoder.attention_map(images), attention)
    mean = attention.mean((1, 2), keepdim=True)
    assert torch.equal(encoder.saliency(images), attention > mean)
    assert torch.equal(encoder.saliency(images, times_mean=1.5), attention > 1.5 * mean)


def test_an_images_answers_do_not_depend_on_its_batch(encoder: Encoder, images: Tensor) -> None:
    concepts = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    together = encoder.concept_maps(images, concepts, gradient_scale=8.0)
    for i in range(3):
        alone = encoder.concept_maps(images[i : i + 1], concepts, gradient_scale=8.0)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-6)
    one_concept = encoder.concept_maps(images, concepts[2:3], gradient_scale=8.0)
    torch.testing.assert_close(together[:, 2], one_concept[:, 0], rtol=1e-4, atol=1e-6)


def test_maps_ignore_the_length_of_concepts(encoder: Encoder, images: Tensor) -> None:
    concepts = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(encoder.concept_maps(images, 9 * concepts), encoder.concept_maps(images, concepts))


def test_maps_by_hand() -> None:
    attention = torch.tensor([[0.1, 0.2, 0.4, 0.1, 0.2]])
    gain = torch.tensor([[[1.0, 2.0, 3.0, 4.0, -1.0], [0.0, 0.0, -2.0, 0.0, -1.0]]])
    # Of 10, the smallest, 1, is in the 20 % left out; 2 is not. Where nothing is gained, attention alone is left.
    expected = torch.tensor([[[0.25, 2.5, 4.0, 4.25, 0.0], [0.25, 0.5, 0.0, 0.25, 0.0]]])
    torch.testing.assert_close(combined_maps(attention, gain), expected)


def test_half_precision_belongs_to_the_caller(encoder: Encoder, images: Tensor) -> None:
    concepts = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))
    exact = encoder.concept_maps(images, concepts)
    with torch.autocast("cpu", torch.bfloat16):
        maps, output, tokens = encoder.concept_maps(images, concepts), encoder(images), encoder.class_tokens(images)
    assert maps.dtype == output.cls_attention.dtype == torch.float32
    assert not torch.equal(maps, exact)  # it was used
    # Where the sign of a gradient is in doubt a map may be 0 or A; elsewhere bfloat16 costs a few thousandths.
    assert ((maps - exact).abs() < 0.05).float().mean() > 0.9
    torch.testing.assert_close(tokens, output.cls, rtol=0.1, atol=0.1)


def test_it_works_where_no_gradient_may_be_kept(encoder: Encoder, images: Tensor) -> None:
    concepts = torch.randn(2, 24)
    exact = encoder.concept_maps(images, concepts)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.concept_maps(images, concepts), exact)
    assert not encoder(images).patches.requires_grad


def test_pixels_are_normalised_by_channel() -> None:
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([-0.5 / 0.25, 0.5 / 0.5, (0.2 - 0.4) / 0.1]).view(1, 3, 1, 1)
    torch.testing.assert_close(normalise(images, (0.5, 0.5, 0.4), (0.25, 0.5, 0.1)), expected)


def test_sides_that_the_patch_does_not_divide(encoder: Encoder) -> None:
    assert patch_grid((320, 640), 8) == (40, 80)
    with refused("image-size 325 8 320 328"):
        patch_grid((320, 325), 8)
    with refused("image-size 5 14"):
        patch_grid((5, 28), 14)
    with refused("image-size 20"):
        encoder(torch.zeros(1, 3, 16, 20))


# ---- weights ----


def test_state_dicts_that_are_no_such_transformer() -> None:
    state = random_state(24, 2, 4, mlp=48, seed=0)
    cases: list[tuple[dict[str, Tensor], int, int, str]] = [
        (state, PATCH, 5, "heads-mismatch 5 24"),
        (state, 16, 3, "weights-misfit patch_embed.proj.weight 8 16"),
        ({k: v for k, v in state.items() if k != "pos_embed"}, PATCH, 3, "weights-misfit pos_embed"),
        ({k: v for k, v in state.items() if k != "norm.bias"}, PATCH, 3, "weights-misfit norm.bias"),
        (state | {"extra": torch.zeros(2)}, PATCH, 3, "weights-misfit extra"),
        ({}, PATCH, 3, "weights-misfit"),
    ]
    for tensors, patch, heads, refusal in cases:
        with refused(refusal):
            Encoder.from_state_dict(tensors, patch_size=patch, num_heads=heads)


@pytest.mark.parametrize("resize", ["dino", "timm"])
def test_the_other_resizing_of_positions(images: Tensor, resize: Any) -> None:
    state = random_state(24, 2, 4, mlp=48, seed=0)
    encoder = Encoder.from_state_dict(state, patch_size=PATCH, num_heads=3, position_resize=resize)
    timms = encoder.vit.forward_features(images)[:, 0]
    assert torch.allclose(encoder(images).cls, timms, atol=1e-5) == (resize == "timm")
    native = torch.randn(1, 3, 4 * PATCH, 4 * PATCH)
    torch.testing.assert_close(encoder(native).cls, encoder.vit.forward_features(native)[:, 0])


def test_registers_and_layer_scale_are_read_off_the_tensors() -> None:
    vit = VisionTransformer(img_size=32, patch_size=8, reg_tokens=2, init_values=0.3, qkv_bias=False, **TINY)
    images = torch.randn(1, 3, 32, 32)
    encoder = Encoder.from_state_dict(vit.state_dict(), patch_size=8, num_heads=4, position_resize="timm")
    torch.testing.assert_close(encoder(images).cls, vit.eval().forward_features(images)[:, 0].detach())


def test_random_weights_are_the_same_at_every_call() -> None:
    torch.manual_seed(7)
    first = Encoder.from_pretrained("vit_tiny_patch16_224", "random")
    drawn = torch.rand(3)
    torch.manual_seed(8)
    second = Encoder.from_pretrained("vit_tiny_patch16_224", "random")
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)  # and leave the caller's generator alone
    assert (first.mean, first.std, first.position_resize) == ((0.5,) * 3, (0.5,) * 3, "timm")


def test_dinos_models_resize_as_dino() -> None:
    encoder = Encoder.from_pretrained("vit_small_patch8_224.dino", "random")
    assert encoder.position_resize == "dino"
    assert (encoder.patch_size, encoder.width, encoder.num_heads, encoder.depth) == (8, 384, 6, 12)
    assert encoder.mean == (0.485, 0.456, 0.406)


def save(path: Path, content: Any, **metadata: str) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path, metadata)
    else:
        torch.save(content, path)
    return str(path)


def assert_same_weights(encoder: Encoder, state: dict[str, Tensor]) -> None:
    loaded = encoder.vit.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_files_of_weights(tmp_path: Path) -> None:
    name = "test_vit.r160_in1k"  # timm's small one: 160 pixels, patch 16
    state = Encoder.from_pretrained(name, "random").vit.state_dict()
    state = {key: tensor + 1 for key, tensor in state.items()}
    plain = Encoder.from_pretrained(name, save(tmp_path / "plain.safetensors", state))
    assert_same_weights(plain, state)
    assert plain.position_resize == "timm"
    wrapped = {
        "student": {f"module.backbone.{key}": torch.zeros(1) for key in state},
        "teacher": {f"backbone.{key}": tensor for key, tensor in state.items()} | {"head.mlp.weight": torch.zeros(2)},
        "epoch": 3,
    }
    dinos = Encoder.from_pretrained(name, save(tmp_path / "dino.pth", wrapped))
    assert_same_weights(dinos, state)
    assert dinos.position_resize == "timm"  # as the name says, however the file wraps its weights
    other_grid = state | {"pos_embed": torch.randn(1, 1 + 4 * 4, state["pos_embed"].shape[2])}
    assert_same_weights(Encoder.from_pretrained(name, save(tmp_path / "grid.pth", {"model": other_grid})), other_grid)


@pytest.mark.parametrize("name", ["vit_small_patch8_224.dino", "vit_tiny_patch16_224"])
def test_features_are_the_same_in_whatever_file_the_weights_lie(name: str, tmp_path: Path) -> None:
    state = Encoder.from_pretrained(name, "random").vit.state_dict()
    files: dict[str, Any] = {
        "dino.pth": state,  # as dino_deitsmall8_pretrain.pth
        "timm.pth": {"state_dict": state},
        "timm.safetensors": state,
        "full.pth": {
            "student": {f"module.backbone.{key}": torch.zeros(1) for key in state},
            "teacher": {f"backbone.{key}": tensor for key, tensor in state.items()},
            "args": Namespace(arch="vit_small"),
        },
        "wrapped.pth": {"teacher": {f"backbone.{key}": tensor for key, tensor in state.items()}},
        "distributed.pth": {"model": {f"module.{key}": tensor for key, tensor in state.items()}},
    }
    if name.endswith(".dino"):  # large: the forms that its checkpoints have
        files = {file: files[file] for file in ("dino.pth", "wrapped.pth")}
    images = torch.randn(1, 3, 48, 80, generator=torch.Generator().manual_seed(0))  # not the model's own size
    expected = Encoder.from_pretrained(name, "random")(images)
    for file, content in files.items():
        found = Encoder.from_pretrained(name, save(tmp_path / file, content))(images)
        assert torch.equal(found.cls, expected.cls), file
        assert torch.equal(found.patches, expected.patches), file
        assert torch.equal(found.cls_attention, expected.cls_attention), file
        (tmp_path / file).unlink()


def test_a_file_that_describes_its_encoder(tmp_path: Path) -> None:
    state = random_state(24, 2, 4, mlp=48, seed=2)
    uri = save(tmp_path / "own.safetensors", state, patch_size="8", num_heads="3")
    for name in ("vit_shapes", "my_own"):
        encoder = Encoder.from_pretrained(name, uri)
        assert_same_weights(encoder, state)
        assert (encoder.patch_size, encoder.num_heads, encoder.position_resize) == (8, 3, "dino")


def test_the_encoder_of_this_package() -> None:
    taught, untaught = Encoder.from_pretrained("vit_shapes"), Encoder.from_pretrained("vit_shapes", "random")
    assert taught.patch_size == untaught.patch_size == 8
    weights, others = taught.vit.state_dict(), untaught.vit.state_dict()
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in others.items()}
    assert not torch.equal(weights["cls_token"], others["cls_token"])
    assert taught.class_tokens(torch.zeros(1, 3, 128, 128)).shape == (1, taught.width)


class Payload:
    """Content of a hostile file: loading it by pickle calls a function."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_no_code_in_weights_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for write in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))):
        write({"pos_embed": torch.zeros(1), "x": Payload(mark)}, tmp_path / "hostile.pth")
        before = (tmp_path / "hostile.pth").read_bytes()
        with refused("weights-unsafe"):
            Encoder.from_pretrained("vit_tiny_patch16_224", str(tmp_path / "hostile.pth"))
        assert (tmp_path / "hostile.pth").read_bytes() == before
    assert not mark.exists()


def test_weights_that_cannot_be_had_come_with_the_line_that_fetches_them() -> None:
    fetch = "hf download timm/vit_small_patch8_224.dino model.safetensors --local-dir weights"
    assert fetch in encoder_module.fetch_command("vit_small_patch8_224.dino")
    assert encoder_module.fetch_command("vit_small_patch8_224.none") == ""


def test_mistakes_with_names_and_weights(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    (tmp_path / "broken.pth").write_bytes(b"")
    small = save(tmp_path / "small.pth", random_state(24, 2, 4, mlp=48, seed=0))
    silent = save(tmp_path / "silent.safetensors", random_state(24, 2, 4, mlp=48, seed=0))
    tiny = "vit_tiny_patch16_224"
    cases = [
        ("vit_smal_patch16_224", "random", "encoder-unknown vit_smal_patch16_224 vit_small_patch16_224"),
        ("vit_small_patch8_224.dine", "random", "encoder-unavailable vit_small_patch8_224.dine"),
        ("resnet50", "random", "encoder-unavailable resnet50"),
        (tiny, str(tmp_path / "file-missing none.pth"), "file-missing none.pth"),
        (tiny, str(tmp_path / "broken.safetensors"), "weights-damaged broken.safetensors"),
        (tiny, str(tmp_path / "broken.pth"), "weights-damaged broken.pth"),
        (tiny, small, "weights-misfit small.pth vit_tiny_patch16_224 patch_embed.proj.weight"),
        ("vit_shapes", silent, "weights-undescribed silent.safetensors"),
        ("my_own", silent, "encoder-unknown my_own"),
    ]
    for name, weights, refusal in cases:
        with refused(refusal):
            Encoder.from_pretrained(name, weights)


def test_an_untrained_encoder_has_the_shape_of_the_trained_one() -> None:
    trained = Encoder.from_state_dict(random_state(24, 2, 4, mlp=48, seed=3), patch_size=PATCH, num_heads=3)
    first, again = trained.untrained(), trained.untrained()
    shapes = {name: tensor.shape for name, tensor in trained.vit.state_dict().items()}
    assert {name: tensor.shape for name, tensor in first.vit.state_dict().items()} == shapes
    images = torch.rand(1, 3, 4 * PATCH, 4 * PATCH)
    torch.testing.assert_close(first.patch_tokens(images), again.patch_tokens(images))
    assert not torch.allclose(first.patch_tokens(images), trained.patch_tokens(images), atol=0.1)
    rotary = Encoder.from_pretrained("vit_small_patch16_dinov3", "random")
    with refused("encoder-unsupported Eva"):
        rotary.untrained()
