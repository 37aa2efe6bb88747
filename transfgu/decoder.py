"""Decode masks: class embeddings and patch tokens attend to each other, and their cosines are the mask logits.

The decoder holds one learned embedding per class. It joins them to an image's patch tokens, lets two
transformer blocks mix the sequence, and reads each class's mask off as the cosine between its embedding and
every patch, normalised over classes. It is Segmenter's decoder (Strudel et al. 2021), as TransFGU uses it.
"""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from transfgu.dropout import Dropout, DropoutAttention
from transfgu.errors import UserError

HELD_LOGITS = 1 << 24
"""Maximum number of logits in memory at an image's own size: 64 MiB, however large the image."""


class MaskDecoder(nn.Module):
    """Maps patch tokens to class masks.

    Parameters have the published implementation's names, so its weights load directly.

    Args:
        width: d, channels inside the decoder.
        classes: C, number of classes, including the background if there is one.
        num_heads: attention heads; must divide ``width``.
        depth: transformer blocks; with 0 class embeddings do not depend on the image.
        dropout: probability of dropout in attention, projection and MLP during training.
        patch_width: channels of the incoming patch tokens; ``width`` unless given.

    Raises:
        ValueError: ``num_heads`` does not divide ``width``, or there are fewer than two classes.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        num_heads: int,
        depth: int = 2,
        dropout: float = 0.1,
        patch_width: int | None = None,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"a decoder of width {width} cannot have {num_heads} heads: choose a divisor")
        if classes < 2:
            raise ValueError(f"a decoder needs at least two classes, not {classes}")
        self.width = width
        self.classes = classes
        self.blocks = nn.ModuleList(_block(width, num_heads, dropout) for _ in range(depth))
        self.cls_emb = nn.Parameter(torch.empty(1, classes, width))
        self.proj_dec = nn.Linear(patch_width or width, width)
        self.proj_patch = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.proj_classes = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.decoder_norm = nn.LayerNorm(width)
        self.mask_norm = nn.LayerNorm(classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The published code gives orthogonal_ a (1, C, d) tensor, which it flattens to a single row: the embeddings
        # are nearly orthogonal, and of unit length together. Here they are orthogonal, at the same scale.
        nn.init.orthogonal_(self.cls_emb[0], gain=classes**-0.5)

    @staticmethod
    def from_state_dict(state_dict: Mapping[str, Tensor], *, num_heads: int) -> "MaskDecoder":
        """Return a decoder with these weights, in evaluation mode; its sizes are read from the tensors.

        Args:
            state_dict: ours or a published one, bare or inside a whole model's (``module.``, ``decoder.``).
            num_heads: not recorded in any tensor; 6 in the published weights.

        Raises:
            UserError: the tensors are not those of a mask decoder.
        """
        prefixes = [name.removesuffix("cls_emb") for name in state_dict if name.endswith("cls_emb")]
        students = [prefix for prefix in prefixes if "teacher" not in prefix]
        if len(students) != 1:
            raise UserError(
                f"these weights have {len(students)} mask decoders (tensors cls_emb): give one",
                code="decoder-missing",
            )
        weights = {
            name.removeprefix(students[0]): tensor
            for name, tensor in state_dict.items()
            if name.startswith(students[0])
        }
        if "proj_dec.weight" not in weights:
            raise UserError(
                "these weights are not a mask decoder's: proj_dec.weight is missing", code="decoder-missing"
            )
        _, classes, width = weights["cls_emb"].shape
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        decoder = MaskDecoder(
            width, classes, num_heads=num_heads, depth=depth, patch_width=weights["proj_dec.weight"].shape[1]
        )
        try:
            decoder.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"these weights are not a mask decoder's: {error}", code="weights-misfit") from error
        return decoder.eval()

    def forward(
        self, patches: Float[Tensor, "B hw patch_width"]
    ) -> tuple[Float[Tensor, "B hw C"], Float[Tensor, "B C d"]]:
        """Return logits of every patch, and the class embeddings after they have seen the image, of unit length.

        Under autocast the blocks' and projections' matrix products are of lower precision; norms, cosines and both
        results are float32.
        """
        tokens = torch.cat((self.proj_dec(patches), self.cls_emb.expand(patches.shape[0], -1, -1)), dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.decoder_norm(tokens)  # (B, hw + C, d)
        patches, classes = tokens.split((patches.shape[1], self.classes), dim=1)
        patches = F.normalize(_widened(patches @ self.proj_patch), dim=-1)
        class_embeddings = F.normalize(_widened(classes @ self.proj_classes), dim=-1)
        device = patches.device.type
        # bfloat16 has two to three digits: cosines of that precision would make similar classes equal.
        mixed = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if mixed else nullcontext():
            return self.mask_norm(patches @ class_embeddings.mT), class_embeddings


def _widened(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _block(width: int, num_heads: int, dropout: float) -> Block:
    """Return a transformer block of timm with our dropout in all its places."""
    block = Block(width, num_heads, attn_drop=dropout, norm_layer=nn.LayerNorm, attn_layer=DropoutAttention)
    block.attn.proj_drop, block.mlp.drop1, block.mlp.drop2 = (Dropout(dropout) for _ in range(3))
    return block


def winners(
    logits: Float[Tensor, "clusters h w"], size: tuple[int, int], *, held_logits: int = HELD_LOGITS
) -> Int[Tensor, "H W"]:
    """Return the cluster with the largest logit at each pixel; of equal logits, the first.

    Args:
        logits: of each cluster and patch.
        size: (H, W) to which logits are resized bilinearly.
        held_logits: resized logits that are held at a time. Clusters are resized in groups, so that a large
            photograph takes no more memory than a small one.
    """
    at_once = max(1, held_logits // (size[0] * size[1]))
    best = torch.full(size, -torch.inf, device=logits.device)
    winner: Tensor = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for start in range(0, len(logits), at_once):
        group = F.interpolate(logits[None, start : start + at_once].float(), size, mode="bilinear")[0]
        value, index = group.max(dim=0)
        better = value > best
        winner = torch.where(better, index + start, winner)
        best = torch.where(better, value, best)
    return winner


def all_winners(logits: Float[Tensor, "B clusters h w"], size: tuple[int, int]) -> Int[Tensor, "B H W"]:
    """Return :func:`winners` of each image, on the device that holds the logits."""
    return torch.stack([winners(image, size) for image in logits])
