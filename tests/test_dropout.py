import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.attention import Attention
from torch import Tensor

from transfgu.dropout import Dropout, DropoutAttention, dropped_attention


def made(seed: int, images: int, heads: int, tokens: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = images, heads, tokens, width
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def drawn(q: Tensor, k: Tensor, dropout: float, seed: int) -> Tensor:
    """Return the attention weights of this seed after dropout, from values that identify the tokens."""
    one_by_one = torch.eye(q.shape[2], dtype=q.dtype).expand(q.shape)
    torch.manual_seed(seed)
    return dropped_attention(q, k, one_by_one, dropout)


@settings(max_examples=10)
@given(
    st.integers(0, 2**31), st.integers(1, 2), st.integers(1, 2), st.integers(1, 5), st.integers(1, 3), st.floats(0, 0.9)
)
def test_gradients_are_those_of_finite_differences(
    seed: int, images: int, heads: int, tokens: int, width: int, dropout: float
) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return dropped_attention(q, k, v, dropout)

    assert torch.autograd.gradcheck(attend, made(seed, images, heads, tokens, width))


def test_weights_are_dropped_at_the_rate_and_the_others_make_up_for_it() -> None:
    # Equal keys: every weight is 1/64, and 1/64 / 0.75 where it is kept.
    q = torch.randn(4, 6, 64, 64)
    weights = drawn(q, torch.zeros_like(q), 0.25, 0)
    assert set(np.unique(weights.numpy() * 64)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((weights == 0).float().mean() - 0.25) < 0.005  # of 98,304 draws; the deviation is 0.0014
    # No two images, heads or rows share their draws.
    rows = (weights == 0).flatten(0, 2).numpy()
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_values_are_mixed_by_the_dropped_weights() -> None:
    q, k, v = made(1, 2, 3, 8, 8)
    torch.manual_seed(5)
    found = dropped_attention(q, k, v, 0.4)
    kept = drawn(q, k, 0.4, 5) != 0
    wanted = torch.softmax(q @ k.mT / 8**0.5, -1) * kept / (1 - round(0.4 * 65536) / 65536) @ v
    torch.testing.assert_close(found, wanted)


def test_it_is_timms_attention_but_for_the_draws() -> None:
    ours, theirs = DropoutAttention(24, num_heads=3, attn_drop=0.3), Attention(24, num_heads=3, attn_drop=0.3)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours.eval()(tokens), theirs.eval()(tokens), rtol=0, atol=0)
    ours.train()
    mean = torch.stack([ours(tokens) for _ in range(1000)]).mean(0)
    torch.testing.assert_close(mean, theirs(tokens), rtol=0, atol=0.04)


def test_draws_follow_the_generator() -> None:
    q, k, v = made(2, 2, 2, 8, 4)
    torch.manual_seed(1)
    first, second = dropped_attention(q, k, v, 0.5), dropped_attention(q, k, v, 0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(dropped_attention(q, k, v, 0.5), first, rtol=0, atol=0)
    assert not torch.equal(first, second)


def test_plain_dropout_drops_and_makes_up_in_training_alone() -> None:
    ones = torch.ones(40, 1000, requires_grad=True)
    drop = Dropout(0.2)
    found = drop(ones)
    assert set(np.unique(found.detach())) == {np.float32(0), np.float32(65536 / (65536 - 13107))}
    assert abs((found == 0).float().mean() - 0.2) < 0.01  # the deviation is 0.002
    (gradient,) = torch.autograd.grad(found.sum(), ones)
    torch.testing.assert_close(gradient, found, rtol=0, atol=0)
    assert drop.eval()(ones) is ones
