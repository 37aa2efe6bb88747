"""The mask decoder: symmetries of its arithmetic, its initial weights, and reading other programs' weights."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.refusals import refused
from transfgu.decoder import MaskDecoder

WIDTH, CLASSES, HEADS = 24, 5, 3


def make_decoder(seed: int = 0, classes: int = CLASSES, width: int = WIDTH, heads: int = HEADS) -> MaskDecoder:
    torch.manual_seed(seed)
    return MaskDecoder(width, classes, num_heads=heads).eval()


def patches(seed: int = 1, images: int = 2, width: int = WIDTH) -> Tensor:
    return torch.randn(images, 6, width, generator=torch.Generator().manual_seed(seed))


def test_shapes_and_unit_length() -> None:
    logits, embeddings = make_decoder()(patches())
    assert logits.shape == (2, 6, CLASSES)
    assert embeddings.shape == (2, CLASSES, WIDTH)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(2, CLASSES))


def test_logits_are_cosines_normalised_over_classes() -> None:
    """With a new LayerNorm over classes, each patch's logits have mean 0 and, except for its eps, variance 1."""
    logits, _ = make_decoder()(patches())
    torch.testing.assert_close(logits.mean(dim=-1), torch.zeros(2, 6), atol=1e-5, rtol=0)
    assert torch.all(logits.var(dim=-1, unbiased=False) <= 1)
    # Logits do not change with the length of what is compared, which is what makes them cosines.
    longer = make_decoder()
    with torch.no_grad():
        longer.proj_patch.mul_(7)
        longer.proj_classes.mul_(0.1)
    torch.testing.assert_close(longer(patches())[0], logits, rtol=1e-4, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 100),
    classes=st.integers(2, 7),
    shape=st.sampled_from([(16, 2), (24, 3), (30, 5)]),
    images=st.integers(1, 3),
)
def test_equivariance(seed: int, classes: int, shape: tuple[int, int], images: int) -> None:
    """Without position embeddings, the decoder follows any order of patches, of classes and of images."""
    width, heads = shape
    decoder = make_decoder(seed, classes, width, heads)
    tokens = patches(seed, images, width)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(6, generator=generator)
    relabelling = torch.randperm(classes, generator=generator)
    with torch.no_grad():
        logits, embeddings = decoder(tokens)
        torch.testing.assert_close(decoder(tokens[:, order])[0], logits[:, order], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(decoder(tokens[-1:])[0], logits[-1:], rtol=1e-4, atol=1e-4)
        decoder.cls_emb.copy_(decoder.cls_emb[:, relabelling])
        relabelled_logits, relabelled_embeddings = decoder(tokens)
    torch.testing.assert_close(relabelled_logits, logits[..., relabelling], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(relabelled_embeddings, embeddings[:, relabelling], rtol=1e-4, atol=1e-4)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    decoder = MaskDecoder(192, 10, num_heads=3)
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            # The mean deviation of a truncated normal of 0.02, cut at 2: 100 deviations away.
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert torch.all(module.weight == 1), name
            assert not module.bias.any(), name
            assert module.eps == 1e-5, name
    assert decoder.proj_patch.std().item() == pytest.approx(192**-0.5, rel=0.05)
    assert decoder.proj_classes.std().item() == pytest.approx(192**-0.5, rel=0.05)
    embedding = decoder.cls_emb.detach()[0]
    torch.testing.assert_close(embedding @ embedding.T, torch.eye(10) / 10, atol=1e-6, rtol=0)


def test_qkv_has_no_bias_and_the_projection_has() -> None:
    names = {name for name, _ in make_decoder().named_parameters()}
    assert "blocks.0.attn.qkv.bias" not in names
    assert {"blocks.0.attn.proj.bias", "blocks.1.mlp.fc2.bias", "proj_dec.bias"} <= names


def test_dropout_acts_in_training_alone() -> None:
    decoder = make_decoder()
    tokens = patches()
    assert torch.equal(decoder(tokens)[0], decoder(tokens)[0])
    decoder.train()
    assert not torch.equal(decoder(tokens)[0], decoder(tokens)[0])
    none = MaskDecoder(WIDTH, CLASSES, num_heads=HEADS, dropout=0.0).train()
    assert torch.equal(none(tokens)[0], none(tokens)[0])


@pytest.mark.parametrize("prefix", ["", "module.", "decoder.", "module.decoder.", "mask_transformer."])
def test_from_state_dict_with_any_prefix(prefix: str) -> None:
    decoder = make_decoder()
    state = {prefix + name: tensor for name, tensor in decoder.state_dict().items()}
    if prefix.endswith("decoder."):  # a whole model's checkpoint: encoder and teacher lie beside the student
        state["encoder.cls_token"] = torch.zeros(1, 1, WIDTH)
        for name, tensor in make_decoder(seed=9).state_dict().items():
            state[prefix.replace("decoder", "decoder_teacher") + name] = tensor
    read = MaskDecoder.from_state_dict(state, num_heads=HEADS)
    assert not read.training
    assert torch.equal(read(patches())[0], decoder(patches())[0])


def test_from_state_dict_reads_every_size() -> None:
    torch.manual_seed(0)
    decoder = MaskDecoder(32, 9, num_heads=4, depth=3, patch_width=20).eval()
    read = MaskDecoder.from_state_dict(decoder.state_dict(), num_heads=4)
    assert (read.width, read.classes, len(read.blocks)) == (32, 9, 3)
    tokens = torch.randn(1, 5, 20)
    assert torch.equal(read(tokens)[0], decoder(tokens)[0])


def test_without_blocks_masks_are_cosines_of_projections() -> None:
    """Each patch separately: cosines with embeddings that are the same in each image, normalised over classes."""
    torch.manual_seed(0)
    decoder = MaskDecoder(8, 3, num_heads=2, depth=0).eval()
    tokens = torch.randn(2, 4, 8)
    logits, embeddings = decoder(tokens)
    seen = F.layer_norm(decoder.proj_dec(tokens), (8,)) @ decoder.proj_patch
    classes = F.layer_norm(decoder.cls_emb, (8,)) @ decoder.proj_classes
    cosines = F.cosine_similarity(seen[:, :, None], classes[:, None], dim=-1)
    torch.testing.assert_close(logits, F.layer_norm(cosines, (3,)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(embeddings[0], embeddings[1])
    read = MaskDecoder.from_state_dict(decoder.state_dict(), num_heads=2)
    assert torch.equal(read(tokens)[0], logits)


def test_what_is_no_decoder_is_refused_in_one_line() -> None:
    state = make_decoder().state_dict()
    with refused("decoder-missing 0"):
        MaskDecoder.from_state_dict({"blocks.0.norm1.weight": torch.ones(3)}, num_heads=HEADS)
    with refused("decoder-missing proj_dec.weight"):
        MaskDecoder.from_state_dict({"cls_emb": state["cls_emb"]}, num_heads=HEADS)
    del state["blocks.1.mlp.fc2.bias"]
    with refused("weights-misfit blocks.1.mlp.fc2.bias"):
        MaskDecoder.from_state_dict(state, num_heads=HEADS)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="choose a divisor"):
        MaskDecoder(24, 5, num_heads=5)
    with pytest.raises(ValueError, match="at least two classes"):
        MaskDecoder(24, 1, num_heads=3)
