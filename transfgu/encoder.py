"""Compute the encoder's tokens, saliency and concept maps from one attention row: the class token's, in the last block.

Saliency is that row. The map of a concept is the gradient of a cosine with respect to that row, and to nothing before
it. So with the keys and values of the last block, the gradients of all concepts are one batched vector-Jacobian product
through the projection and MLP of one token, and K maps cost little more than a forward pass. If only the class token is
needed, the last block computes that token alone. All other attention is fused and never stored.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import timm
import torch
from jaxtyping import Bool, Float, UInt8
from timm.layers.attention import Attention, AttentionRope
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models import eva, vision_transformer
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from transfgu.errors import UserError
from transfgu.store import storage
from transfgu.store.weights import PACKAGE, read_metadata, read_weights, unwrap
from transfgu.transfer import constant

PositionResize = Literal["dino", "timm"]
Channels = tuple[float, float, float]

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
MASS_KEPT = 0.8  # share of a positive gradient's sum in its kept, largest values (published)
SHIPPED = "vit_shapes"  # the encoder in this package


@dataclass(frozen=True)
class EncoderOutput:
    """Tokens after the final norm, and the last block's attention from the class token to each patch, by head.

    The attention sums to less than 1 over patches: the rest went to the class token and to registers.
    """

    cls: Float[Tensor, "B d"]
    patches: Float[Tensor, "B hw d"]
    cls_attention: Float[Tensor, "B heads hw"]
    grid: tuple[int, int]  # (h, w), patches


def normalise(
    images: UInt8[Tensor, "B 3 H W"], mean: Channels = IMAGENET_MEAN, std: Channels = IMAGENET_STD
) -> Float[Tensor, "B 3 H W"]:
    """Normalise pixels of 0 to 255 for an encoder: (pixel / 255 - mean) / std, per channel."""
    shift, scale = (constant(x, images.device, torch.float32).mul(255).view(3, 1, 1) for x in (mean, std))
    return (images - shift) / scale


def patch_grid(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return the (h, w) patches of an image of (H, W) pixels; raise UserError unless the patch divides its sides."""
    for side in size:
        if side % patch_size or side == 0:
            below = side // patch_size * patch_size
            good = " or ".join(str(good) for good in (below, below + patch_size) if good)
            raise UserError(
                f"image side {side} is not a multiple of the encoder's patch, {patch_size}: use {good} pixels",
                code="image-size",
            )
    return size[0] // patch_size, size[1] // patch_size


def scaled_size(size: tuple[int, int], scale: float | int, patch_size: int) -> tuple[int, int]:
    """Return `size` = (H, W) times `scale`, each side rounded to whole patches, at least one."""
    height, width = (max(1, round(scale * side / patch_size)) * patch_size for side in size)
    return height, width


class Encoder(nn.Module):
    """A frozen, self-supervised vision transformer: class token, patch tokens, the class token's attention, and maps.

    It wraps timm's `VisionTransformer` or `Eva` (rotary positions), as DINO, DINOv2 and DINOv3 have them. Images are
    (B, 3, H, W), normalised by `mean` and `std`, of any sides that `patch_size` divides. `patch_size`, `width`,
    `num_heads` and `depth` are the transformer's; `native_side` is that of its own position embeddings, in pixels.

    Examples:
        The small encoder of this package (patch 8, width 96, 3 heads) on one image of 64 x 128 pixels:

        >>> import torch
        >>> from transfgu.encoder import Encoder, normalise
        >>> encoder = Encoder.from_pretrained("vit_shapes")
        >>> images = normalise(torch.zeros(1, 3, 64, 128, dtype=torch.uint8))
        >>> output = encoder(images)
        >>> output.grid, tuple(output.cls.shape), tuple(output.patches.shape), tuple(output.cls_attention.shape)
        ((8, 16), (1, 96), (1, 128, 96), (1, 3, 128))
        >>> concepts = torch.eye(5, encoder.width)  # as K-Means finds them: one class token each
        >>> tuple(encoder.concept_maps(images, concepts).shape)
        (1, 5, 8, 16)
    """

    def __init__(
        self,
        vit: VisionTransformer | Eva,
        *,
        position_resize: PositionResize = "timm",
        mean: Channels = IMAGENET_MEAN,
        std: Channels = IMAGENET_STD,
    ) -> None:
        """Wrap a timm transformer; raise UserError if its last block is not supported, or it has no class token."""
        super().__init__()
        _check_supported(vit)
        if position_resize not in get_args(PositionResize):
            raise UserError(
                f"position_resize is {position_resize!r}: use one of {get_args(PositionResize)}",
                code="argument-invalid",
            )
        self.vit: Any = vit  # timm's blocks differ in their attributes; _check_supported has seen these
        self.position_resize = position_resize
        self.mean = mean
        self.std = std
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.native_side: int = vit.patch_embed.img_size[0]
        self.width: int = vit.embed_dim
        self.depth = len(vit.blocks)
        self.num_heads: int = self._attn.num_heads
        self.requires_grad_(False).eval()

    @staticmethod
    def from_state_dict(
        state_dict: Mapping[str, Tensor],
        *,
        patch_size: int,
        num_heads: int,
        position_resize: PositionResize = "dino",
    ) -> "Encoder":
        """Return an encoder with these weights; width, depth, native grid, MLP and biases are read from their shapes.

        Names are DINO's, which are timm's. LayerNorm's eps is 1e-6. Raises UserError if the tensors are not those of a
        plain vision transformer with this patch and number of heads.
        """
        tensors = unwrap("the state dict", state_dict)
        tensors.pop("mask_token", None)
        vit = _vit_of_shapes(tensors, patch_size, num_heads)
        _load(vit, tensors, "the state dict")
        return Encoder(vit, position_resize=position_resize)

    @staticmethod
    def from_pretrained(name: str, weights: str = "pretrained") -> "Encoder":
        """Return the encoder `name`: a timm name, or `vit_shapes`, the small one in this package.

        `weights`: "pretrained" (timm's from the hub; the packaged file), "random" (the same at every call), or a path
        or URI of a `.pth` or `.safetensors` file. A safetensors file whose metadata have `patch_size` and `num_heads`,
        as written by our own pretraining, describes its encoder: `name` may then be any name that timm does not have.
        Position embeddings are resized as in DINO for names that end in `.dino`, otherwise as in timm.

        Raises UserError for an unknown name and for weights that are missing, have other shapes, or are not plain
        tensors.
        """
        if not timm.is_model(name):
            return _self_described(name, weights)
        if weights == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                vit = _create(name)
        elif weights == "pretrained":
            vit = _create(name, pretrained=True)
        else:
            return _from_file(name, weights)
        return _of_timm(vit)

    def untrained(self) -> "Encoder":
        """Return an encoder of the same shape with random weights, the same at every call.

        Raises:
            UserError: its transformer is not a plain one, so its shape can't be read from its tensors.
        """
        if not isinstance(self.vit, VisionTransformer):
            raise UserError(
                f"an untrained {type(self.vit).__name__} is made from its timm name: use Encoder.from_pretrained",
                code="encoder-unsupported",
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vit = _vit_of_shapes(self.vit.state_dict(), self.patch_size, self.num_heads)
        return Encoder(vit, position_resize=self.position_resize, mean=self.mean, std=self.std)

    # Outputs, from least to most work.

    def attention_map(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w"]:
        """Return the class token's attention to each patch in the last block, averaged over heads.

        Nothing else of that block is computed.
        """
        _, normed, rope, grid = self._enter_last_block(images)
        row = self._class_row(_heads(self._attn, 0, normed[:, :1], None), _heads(self._attn, 1, normed, rope))
        return self._patch_columns(row).mean(1).reshape(-1, *grid)

    def saliency(self, images: Float[Tensor, "B 3 H W"], *, times_mean: float | int = 1) -> Bool[Tensor, "B h w"]:
        """Return which patches are salient: attention above `times_mean` times the image's mean (1 in the paper)."""
        attention = self.attention_map(images)
        return attention > times_mean * attention.mean((1, 2), keepdim=True)

    def class_tokens(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B d"]:
        """Return the class token after the final norm; the last block computes that token alone."""
        x, normed, rope, _ = self._enter_last_block(images)
        mixed = F.scaled_dot_product_attention(
            _heads(self._attn, 0, normed[:, :1], None),
            _heads(self._attn, 1, normed, rope),
            _heads(self._attn, 2, normed, None),
        )
        return self._leave(x[:, :1], normed[:, :1], mixed)[:, 0]

    def patch_tokens(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B hw d"]:
        """Return the patch tokens after the final norm."""
        tokens, _, _, _ = self._all_tokens(images)
        return tokens[:, self.vit.num_prefix_tokens :]

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> EncoderOutput:
        """Return class token, patch tokens and the class token's attention (see `EncoderOutput`).

        Raises UserError unless the sides of the images are multiples of the patch.
        """
        tokens, query, key, grid = self._all_tokens(images)
        attention = self._patch_columns(self._class_row(query[:, :, :1], key))
        return EncoderOutput(tokens[:, 0], tokens[:, self.vit.num_prefix_tokens :], attention, grid)

    @torch.no_grad()
    def concept_maps(
        self,
        images: Float[Tensor, "B 3 H W"],
        concepts: Float[Tensor, "K d"],
        *,
        gradient_scale: float | int = 1,
    ) -> Float[Tensor, "B K h w"]:
        """Return a map of each concept in each image: M_k = A / max(A) + relu(-g_k), and 0 where g_k > 0.

        A is the class token's attention averaged over heads; g_k the gradient of 1 - cos(class token, concept k) on
        that attention, averaged over heads and times `gradient_scale` (the published code has 1 / its batch size
        there); relu(-g_k) keeps the largest values that make up 80 % of its sum. An image's maps do not depend on the
        rest of the batch. Float32 from the last block's attention on, also under autocast.

        Raises UserError where the patch does not divide a side of the images. Source: TransFGU (Yin et al. 2022).
        """
        x, normed, rope, grid = self._enter_last_block(images)
        query, key = _heads(self._attn, 0, normed[:, :1], None), _heads(self._attn, 1, normed, rope)
        value = _heads(self._attn, 2, normed, None).float()
        with torch.autocast(images.device.type, enabled=False):
            row = self._class_row(query, key)

            def class_direction(mixed: Tensor) -> Tensor:
                return F.normalize(self._leave(x[:, :1].float(), normed[:, :1].float(), mixed)[:, 0], dim=-1)

            targets = F.normalize(concepts.float(), dim=-1)
            pull_back = torch.func.vjp(class_direction, row @ value)[1]
            (pulled,) = torch.func.vmap(pull_back)(targets[:, None].expand(-1, len(x), -1))  # (K, B, heads, 1, dh)
            # Attention to patch n mixes in value n, so its gradient is the pulled-back cotangent times that value.
            patch_value = value[:, :, self.vit.num_prefix_tokens :]
            gain = torch.einsum("kbhie,bhne->bkn", pulled, patch_value) / self.num_heads
            maps = combined_maps(self._patch_columns(row).mean(1), gain * gradient_scale)
        return maps.reshape(*maps.shape[:2], *grid)

    # Parts of the transformer.

    @property
    def _attn(self) -> Any:
        return self.vit.blocks[-1].attn

    def _enter_last_block(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B n d"], Float[Tensor, "B n d"], Tensor | None, tuple[int, int]]:
        """Return all tokens before the last block, and after its first norm; its rotary embedding if any; the grid."""
        grid = patch_grid((images.shape[-2], images.shape[-1]), self.patch_size)
        x = self.vit.norm_pre(self._embed(images, grid))
        ropes = self._ropes(grid)
        for block, rope in zip(self.vit.blocks[:-1], ropes, strict=False):  # the embedding of the last block remains
            x = block(x) if rope is None else block(x, rope=rope)
        return x, self.vit.blocks[-1].norm1(x), ropes[-1], grid

    def _embed(self, images: Float[Tensor, "B 3 H W"], grid: tuple[int, int]) -> Float[Tensor, "B n d"]:
        vit = self.vit
        patches = vit.patch_embed.norm(vit.patch_embed.proj(images).flatten(2).transpose(1, 2))
        prefix = torch.cat([token for token in (vit.cls_token, vit.reg_token) if token is not None], 1)
        prefix = prefix.expand(images.shape[0], -1, -1)  # not len(), because this side is variable in an export
        if vit.pos_embed is None:
            return torch.cat([prefix, patches], 1)
        placeless = 0 if vit.no_embed_class else vit.num_prefix_tokens
        position = _resize_positions(vit.pos_embed, vit.patch_embed.grid_size, grid, placeless, self.position_resize)
        if vit.no_embed_class:
            return torch.cat([prefix, patches + position], 1)
        return torch.cat([prefix, patches], 1) + position

    def _ropes(self, grid: tuple[int, int]) -> Sequence[Tensor | None]:
        """Return each block's rotary embedding of the patches, (hw, 2 dh) or by head; None for other positions."""
        rope = getattr(self.vit, "rope", None)
        if rope is None:
            return [None] * self.depth
        embedding = rope.get_embed(shape=grid)
        return list(embedding) if self.vit.rope_mixed else [embedding] * self.depth

    def _all_tokens(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B n d"], Float[Tensor, "B heads n dh"], Float[Tensor, "B heads n dh"], tuple[int, int]]:
        """Return all tokens after the final norm, the last block's queries and keys, and the grid."""
        x, normed, rope, grid = self._enter_last_block(images)
        query, key = _heads(self._attn, 0, normed, rope), _heads(self._attn, 1, normed, rope)
        mixed = F.scaled_dot_product_attention(query, key, _heads(self._attn, 2, normed, None))
        return self._leave(x, normed, mixed), query, key, grid

    def _class_row(
        self, query: Float[Tensor, "B heads 1 dh"], key: Float[Tensor, "B heads n dh"]
    ) -> Float[Tensor, "B heads 1 n"]:
        """Return the attention of the class token to all tokens, in float32."""
        with torch.autocast(query.device.type, enabled=False):
            scale: float = self._attn.scale
            return ((query.float() * scale) @ key.float().transpose(2, 3)).softmax(-1)

    def _patch_columns(self, row: Float[Tensor, "B heads 1 n"]) -> Float[Tensor, "B heads hw"]:
        return row[:, :, 0, self.vit.num_prefix_tokens :]

    def _leave(
        self,
        x: Float[Tensor, "B n d"],
        normed: Float[Tensor, "B n d"],
        mixed: Float[Tensor, "B heads n dh"],
    ) -> Float[Tensor, "B n d"]:
        """Apply the rest of the last block, after its attention has mixed values, and the final norm, to any tokens.

        `x` is the block's input, `normed` the same after norm1.
        """
        block, attn = self.vit.blocks[-1], self._attn
        y = attn.norm(mixed.transpose(1, 2).flatten(2))  # (B, heads, n, dh) -> (B, n, heads dh)
        if attn.gate is not None:
            y = y * attn.gate(normed).sigmoid()
        x = x + _scaled(block, 1, attn.proj(y))
        x = x + _scaled(block, 2, block.mlp(block.norm2(x)))
        tokens: Tensor = self.vit.norm(x)
        return tokens


def _check_supported(vit: Any) -> None:
    if not isinstance(vit, VisionTransformer | Eva) or not isinstance(vit.patch_embed, PatchEmbed):
        reason = "not a plain vision transformer"
    elif vit.cls_token is None or vit.num_prefix_tokens != 1 + (0 if vit.reg_token is None else vit.reg_token.shape[1]):
        reason = "without a class token of its own"
    elif type(vit.blocks[-1]) not in (Block, EvaBlock):
        reason = f"made of {type(vit.blocks[-1]).__name__}s"
    elif type(vit.blocks[-1].attn) not in (Attention, EvaAttention, AttentionRope):
        reason = f"made of {type(vit.blocks[-1].attn).__name__}"
    elif not vit.dynamic_img_size:
        reason = "built for one image size (timm: dynamic_img_size=True)"
    else:
        return
    raise UserError(
        f"this {type(vit).__name__} can't be the encoder, it is {reason}: use one like DINO's ViT",
        code="encoder-unsupported",
    )


def _heads(attn: Any, part: int, normed: Float[Tensor, "B n d"], rope: Tensor | None) -> Float[Tensor, "B heads n dh"]:
    """Return queries (part 0), keys (1) or values (2) of tokens, by head; `rope` rotates all except prefix tokens."""
    if attn.qkv is None:
        y = (attn.q_proj, attn.k_proj, attn.v_proj)[part](normed)
    else:
        y = F.linear(normed, attn.qkv.weight.chunk(3)[part], _bias(attn, part))
    y = y.reshape(*y.shape[:2], -1, attn.head_dim).transpose(1, 2)  # (B, n, heads dh) -> (B, heads, n, dh)
    y = (attn.q_norm, attn.k_norm, nn.Identity())[part](y)
    if rope is not None:
        first = attn.num_prefix_tokens
        turned = apply_rot_embed_cat(y[:, :, first:], rope, half=attn.rotate_half)
        y = torch.cat([y[:, :, :first], turned.to(y.dtype)], 2)
    groups = attn.num_heads // y.shape[1]  # query heads that share a head of keys and values
    heads: Tensor = y.repeat_interleave(groups, 1) if groups > 1 else y
    return heads


def _bias(attn: Any, part: int) -> Tensor | None:
    if attn.qkv.bias is not None:
        bias: Tensor = attn.qkv.bias
        return bias.chunk(3)[part]
    return getattr(attn, ("q_bias", "k_bias", "v_bias")[part], None)


def _scaled(block: Any, part: int, y: Float[Tensor, "B n d"]) -> Float[Tensor, "B n d"]:
    """Return LayerScale of a block's attention (1) or MLP (2), by either of timm's two names for it."""
    if isinstance(block, Block):
        scaled: Tensor = (block.ls1, block.ls2)[part - 1](y)
        return scaled
    gamma = (block.gamma_1, block.gamma_2)[part - 1]
    return y if gamma is None else gamma * y


def combined_maps(attention: Float[Tensor, "B hw"], gain: Float[Tensor, "B K hw"]) -> Float[Tensor, "B K hw"]:
    """Return concept maps from the attention and the gain, which is minus the gradient."""
    positive = gain.clamp(min=0)
    values, order = positive.sort(-1)
    share = (values / values.sum(-1, keepdim=True)).cumsum(-1)
    kept = torch.zeros_like(share, dtype=torch.bool).scatter_(-1, order, share > 1 - MASS_KEPT)
    maps = (attention / attention.amax(-1, keepdim=True))[:, None] + positive * kept
    return maps.masked_fill_(gain < 0, 0)


def _resize_positions(
    position: Float[Tensor, "1 native d"],
    native: tuple[int, int],
    grid: tuple[int, int],
    prefix: int,
    how: PositionResize,
) -> Float[Tensor, "1 n d"]:
    """Return position embeddings: those of `prefix` tokens unchanged, those of a `native` grid resized to `grid`."""
    if grid == native:
        return position
    if how == "timm":
        resized: Tensor = resample_abs_pos_embed(position, list(grid), list(native), num_prefix_tokens=prefix)
        return resized
    patches = position[:, prefix:].float().transpose(1, 2).reshape(1, -1, *native)  # (1, n, d) -> (1, d, h, w)
    # The tenth is DINO's guard against rounding down to one patch too few. It shifts every sample, so it must stay.
    factor = [(side + 0.1) / side_native for side, side_native in zip(grid, native, strict=True)]
    patches = F.interpolate(patches, scale_factor=factor, mode="bicubic")
    return torch.cat([position[:, :prefix], patches.flatten(2).transpose(1, 2).to(position.dtype)], 1)


# Construction.


def _create(name: str, *, pretrained: bool = False) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="token", dynamic_img_size=True)
    except (RuntimeError, OSError, TypeError, ValueError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        if pretrained:
            remedy = f"{fetch_command(name)} give --encoder.weights another path or URI, or random"
        else:
            remedy = "use a timm vision transformer, such as vit_small_patch8_224.dino"
        raise UserError(f"encoder {name} is not available ({reason}): {remedy}", code="encoder-unavailable") from error


def fetch_command(name: str) -> str:
    """Return how to download a model's weights on a machine with network access; empty if timm has no source."""
    try:
        known = timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # a model without such weights
        return ""
    if not known or not known.hf_hub_id:
        return ""
    fetch = f"hf download {known.hf_hub_id} model.safetensors --local-dir weights"
    return f"where there is network access, run {fetch} and give --encoder.weights weights/model.safetensors, or"


def _of_timm(vit: Any) -> Encoder:
    _check_supported(vit)
    known = vit.pretrained_cfg
    # The name decides, not the format of the file: the same weights give the same encoder.
    how: PositionResize = "dino" if known.get("tag") == "dino" else "timm"
    return Encoder(vit, position_resize=how, mean=tuple(known["mean"]), std=tuple(known["std"]))


def _from_file(name: str, uri: str) -> Encoder:
    file = read_weights(uri)
    vit = _create(name)
    _check_supported(vit)
    what = f"weights {storage.shown(uri)} for encoder {name}"
    patch_size, heads = vit.patch_embed.patch_size[0], vit.blocks[-1].attn.num_heads
    for said, own in (("patch_size", patch_size), ("num_heads", heads)):
        if file.metadata.get(said, str(own)) != str(own):
            raise UserError(
                f"{what} don't fit: they say {said}={file.metadata[said]}, but it has {own}; give --encoder.name a "
                "name that timm does not have, and the file describes its encoder",
                code="weights-misfit",
            )
    patch = file.tensors.get("patch_embed.proj.weight")
    if patch is not None and patch.ndim == 4 and patch.shape != vit.patch_embed.proj.weight.shape:
        raise _misfit(what, "patch_embed.proj.weight", patch, vit.patch_embed.proj.weight)
    position = file.tensors.get("pos_embed")
    if position is not None and (position.ndim != 3 or position.shape[0] != 1):
        raise _misfit(what, "pos_embed", position, vit.pos_embed)
    if position is not None and vit.pos_embed is not None:
        # Keep the file's own grid: it is resized once, for each image, and not a second time while loading.
        side = math.isqrt(position.shape[1])
        if side**2 + (0 if vit.no_embed_class else vit.num_prefix_tokens) == position.shape[1]:
            vit.set_input_size(img_size=(side * vit.patch_embed.patch_size[0],) * 2)
    module = eva if isinstance(vit, Eva) else vision_transformer
    try:
        tensors = module.checkpoint_filter_fn(file.tensors, vit)
    except Exception as error:  # timm resizes tensors of other shapes, and fails for some
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{what} don't fit: {reason}; check the encoder's name, patch size and heads", code="weights-misfit"
        ) from None
    _load(vit, tensors, what)
    return _of_timm(vit)


def is_self_described(weights: str) -> bool:
    """Return True if `weights` is a safetensors file with patch and heads in its metadata, as from our pretraining.

    It is False for a missing or damaged file, which is reported when its weights are read.
    """
    return weights.endswith(".safetensors") and {"patch_size", "num_heads"} <= read_metadata(weights).keys()


def _self_described(name: str, weights: str) -> Encoder:
    shipped = weights in ("pretrained", "random")
    if shipped and name != SHIPPED:
        raise _unknown(name)
    uri = f"{PACKAGE}{SHIPPED}.safetensors" if shipped else weights
    file = read_weights(uri)
    try:
        patch_size, num_heads = int(file.metadata["patch_size"]), int(file.metadata["num_heads"])
    except (KeyError, ValueError):
        if name != SHIPPED:
            raise _unknown(name) from None
        raise UserError(
            f"weights {storage.shown(uri)} don't say their patch_size and num_heads: give --encoder.name a timm name",
            code="weights-undescribed",
        ) from None
    encoder = Encoder.from_state_dict(file.tensors, patch_size=patch_size, num_heads=num_heads)
    return encoder.untrained() if weights == "random" else encoder


def _unknown(name: str) -> UserError:
    names = [SHIPPED, *timm.list_models(module="vision_transformer", pretrained=True)]
    near = difflib.get_close_matches(name, names, 3) or [SHIPPED, "vit_small_patch8_224.dino"]
    return UserError(
        f"no encoder is called {name}: try {', '.join(near)}, or another vision transformer of timm's",
        code="encoder-unknown",
    )


def _vit_of_shapes(tensors: Mapping[str, Tensor], patch_size: int, num_heads: int) -> VisionTransformer:
    """Return an untrained transformer into which these tensors fit."""
    try:
        width = tensors["patch_embed.proj.weight"].shape[0]
        positions = tensors["pos_embed"].shape[1]
        hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
        registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
        if positions - 1 - registers < 1:
            raise IndexError
    except IndexError:
        raise UserError(
            "the state dict's pos_embed, reg_token, patch_embed.proj.weight or blocks.0.mlp.fc1.weight has another "
            "shape than a vision transformer's: give DINO's or timm's",
            code="weights-misfit",
        ) from None
    except KeyError as error:
        raise UserError(
            f"the state dict has no {error.args[0]}, so it isn't a vision transformer's: give DINO's or timm's",
            code="weights-misfit",
        ) from None
    if width % num_heads:
        raise UserError(f"{num_heads} heads don't divide a width of {width}: check num_heads", code="heads-mismatch")
    no_embed_class = math.isqrt(positions) ** 2 == positions
    side = math.isqrt(positions if no_embed_class else positions - 1 - registers)
    return VisionTransformer(
        img_size=side * patch_size,
        patch_size=patch_size,
        num_classes=0,
        global_pool="token",
        embed_dim=width,
        depth=1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")),
        num_heads=num_heads,
        mlp_ratio=(hidden + 0.5) / width,  # timm truncates the product
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        proj_bias="blocks.0.attn.proj.bias" in tensors,
        init_values=1.0 if "blocks.0.ls1.gamma" in tensors else None,
        reg_tokens=registers,
        no_embed_class=no_embed_class,
        dynamic_img_size=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )


def _load(vit: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load every tensor by name; raise a UserError that names the first one that does not fit."""
    wanted = vit.state_dict()
    for name in wanted.keys() | tensors.keys():
        if name not in tensors or name not in wanted or tensors[name].shape != wanted[name].shape:
            raise _misfit(what, name, tensors.get(name), wanted.get(name))
        if wanted[name].is_floating_point() and not tensors[name].is_floating_point():
            raise UserError(
                f"{what} hold {name} as {tensors[name].dtype}: save floating-point numbers", code="weights-misfit"
            )
    vit.load_state_dict(tensors)


def _misfit(what: str, name: str, given: Tensor | None, wanted: Tensor | None) -> UserError:
    if given is None:
        reason = f"{name} is missing"
    elif wanted is None:
        reason = f"{name} has no place"
    else:
        reason = f"{name} is {tuple(given.shape)}, not {tuple(wanted.shape)}"
    return UserError(
        f"{what} don't fit: {reason}; check the encoder's name, patch size and heads", code="weights-misfit"
    )
