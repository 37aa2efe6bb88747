"""Compute dropout for attention on CPUs, one image at a time so that its attention stays in the cache.

On CPUs PyTorch's fused attention has no dropout, and its replacement passes eight times over the matrices of the whole
batch, and draws each value separately, which takes longer than the decoder's matrix products. Here one image is
finished before the next starts, and random words are split into sixteen-bit numbers, one per position: two fifths of
the time, forward and backward together.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

_LEVELS = 1 << 16  # number of possible dropout probabilities
_NUMBERS_A_WORD = 4


class Dropout(nn.Dropout):
    """PyTorch's dropout, except for its random numbers on CPUs: see :func:`dropped_attention`."""

    def forward(self, input: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Set some values to zero and scale the others to compensate."""
        if not self.training or self.p == 0 or input.device.type != "cpu":
            return super().forward(input)
        draws = _Draws(self.p)
        return input * (draws.kept(input.shape) * draws.gain)


class DropoutAttention(Attention):
    """timm's attention, with its parameters; on a CPU its dropout is that of :func:`dropped_attention`."""

    def forward(
        self, x: Float[Tensor, "B n d"], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Float[Tensor, "B n d"]:
        """Return tokens after attention; with a mask, computed by timm."""
        dropping = self.training and self.attn_drop.p > 0
        if not dropping or x.device.type != "cpu" or attn_mask is not None or is_causal:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        mixed = dropped_attention(q, k, v, self.attn_drop.p)
        dropped: Tensor = self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))
        return dropped


def dropped_attention(
    q: Float[Tensor, "B heads n c"], k: Float[Tensor, "B heads n c"], v: Float[Tensor, "B heads n c"], dropout: float
) -> Float[Tensor, "B heads n c"]:
    """Return `softmax(q k / sqrt(c)) v`, with dropout of attention weights and scaling to compensate.

    Args:
        q: queries.
        k: keys.
        v: values.
        dropout: the probability, in [0, 1); it is rounded to a multiple of 2^-16. Draws follow torch's generator.
    """
    mixed: Tensor = _DroppedAttention.apply(q, k, v, dropout)
    return mixed


class _DroppedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        draws, scale = _Draws(dropout), 1 / math.sqrt(q.shape[-1])
        mixed = torch.empty_like(q, memory_format=torch.contiguous_format)
        weights, dropped = [], []
        for i in range(len(q)):
            weights.append(torch.softmax(torch.bmm(q[i] * scale, k[i].mT), dim=-1))
            dropped.append(torch.where(draws.kept(weights[i].shape), weights[i], 0))
            torch.bmm(dropped[i], v[i] * draws.gain, out=mixed[i])
        ctx.save_for_backward(q, k, v, mixed, *weights, *dropped)
        ctx.scale, ctx.gain = scale, draws.gain  # type: ignore[attr-defined]
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, mixed, *both = ctx.saved_tensors  # type: ignore[attr-defined]
        weights, dropped = both[: len(q)], both[len(q) :]
        scale, gain = ctx.scale, ctx.gain  # type: ignore[attr-defined]
        to_q, to_k, to_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        # The term of softmax's backward pass, sum_j dP_ij P_ij, equals sum_c dO_ic O_ic.
        means = (gradient * mixed).sum(-1, keepdim=True)
        for i in range(len(q)):
            raised = gradient[i] * gain
            torch.bmm(dropped[i].mT, raised, out=to_v[i])
            to_scores = torch.bmm(raised, v[i].mT).mul_(dropped[i]).addcmul_(weights[i], means[i], value=-1)
            torch.bmm(to_scores, k[i] * scale, out=to_q[i])
            torch.bmm(to_scores.mT, q[i] * scale, out=to_k[i])
        return to_q, to_k, to_v, None


class _Draws:
    """Random masks, from a generator seeded by torch's own."""

    def __init__(self, dropout: float) -> None:
        self._words = np.random.SFC64(int(torch.randint(1 << 62, ())))
        self._threshold = round(dropout * _LEVELS)
        self.gain = _LEVELS / (_LEVELS - self._threshold)

    def kept(self, shape: torch.Size) -> Bool[Tensor, "..."]:
        """Return True where a sixteen-bit number is not below the threshold."""
        count = shape.numel()
        numbers = self._words.random_raw(math.ceil(count / _NUMBERS_A_WORD)).view(np.uint16)[:count]
        return torch.from_numpy(numbers >= self._threshold).view(shape)
