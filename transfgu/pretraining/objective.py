"""Self-supervised pretraining of a small ViT whose class attention shows where objects are.

A concept map is the class attention of the *last* block and its gradient, so this attention must cover the objects that
the feature describes. A tiny ViT does not do this by itself: before the last block, its blocks mix the whole picture
into every patch, and into the class token. Two measures prevent that.

*Mosaics.* Several pictures are tiled into one, the last block's class attention is restricted to one tile, and the
feature must match the picture of that tile alone. So patch tokens must stay local.

*Forgetting.* For half of the views the class token is reset to its initial value before the last block, so its feature
must come from that block's attention alone.

The objective over all views is InfoNCE (van den Oord et al. 2018, as in SimCLR, Chen et al. 2020), which learns from
the first step. Later DINO's cross-entropy with a momentum teacher is added (Caron et al. 2021), which groups instances
into clusters; its targets are balanced by Sinkhorn-Knopp's iterations (SwAV, Caron et al. 2020).

Legend: B images, V views, M mosaics of T tiles, N patches, n = 1 + N tokens, d width, e bottleneck, P prototypes.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from transfgu.encoder import IMAGENET_MEAN, IMAGENET_STD
from transfgu.pretraining.recipe import PretrainingRecipe
from transfgu.workers import sum_over_workers, worker_count

Vit = Any
"""A VisionTransformer with a class token and learned positions, which timm's types declare as optional."""


# ---- the encoder


def new_encoder(recipe: PretrainingRecipe) -> VisionTransformer:
    """Return a ViT of timm without a classifier; its parameters have DINO's names."""
    return VisionTransformer(
        img_size=recipe.global_size,
        patch_size=recipe.patch_size,
        embed_dim=recipe.width,
        depth=recipe.depth,
        num_heads=recipe.heads,
        num_classes=0,
        dynamic_img_size=True,
    )


def tokens_before_last_block(encoder: Vit, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B n d"]:
    """Return the input of the last block, class token first: n = 1 + N."""
    patches = encoder.patch_embed(images)  # (B, h, w, d)
    _, height, width, _ = patches.shape
    position = encoder.pos_embed
    native = encoder.patch_embed.grid_size
    if (height, width) != native:
        grid = position[:, 1:].transpose(1, 2).reshape(1, -1, *native)
        grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
        position = torch.cat([position[:, :1], grid.flatten(2).transpose(1, 2)], 1)
    tokens = torch.cat([encoder.cls_token.expand(len(images), -1, -1), patches.flatten(1, 2)], 1) + position
    for block in encoder.blocks[:-1]:
        tokens = block(tokens)
    entering: Tensor = tokens
    return entering


def class_features(
    encoder: Vit,
    images: Float[Tensor, "B 3 H W"],
    *,
    forgotten: Bool[Tensor, " B"] | None = None,
    bias: Float[Tensor, "B T n"] | None = None,
) -> Float[Tensor, "B T d"]:
    """Return the class token after the final norm; only its row of the last block is computed.

    Args:
        encoder: a plain vision transformer.
        images: normalised.
        forgotten: True where the class token is reset to its initial value before the last block.
        bias: added to the logits of the last block's class attention, in T variants; None: T = 1.
    """
    tokens = tokens_before_last_block(encoder, images)
    if forgotten is not None:
        initial = encoder.cls_token + encoder.pos_embed[:, :1]
        first = torch.where(forgotten[:, None, None], initial, tokens[:, :1])
        tokens = torch.cat([first, tokens[:, 1:]], 1)
    block = encoder.blocks[-1]
    heads = block.attn.num_heads
    batch, length, width = tokens.shape
    qkv = block.attn.qkv(block.norm1(tokens)).reshape(batch, length, 3, heads, width // heads)
    query, key, value = qkv[:, :1, 0], qkv[:, :, 1], qkv[:, :, 2]  # (B, 1 or n, heads, dh)
    logits = torch.einsum("bqhe,bnhe->bhqn", query, key) * (width // heads) ** -0.5
    if bias is not None:
        logits = logits + bias[:, None]  # (B, heads, T, n)
    seen = torch.einsum("bhtn,bnhe->bthe", logits.softmax(-1), value).flatten(2)  # (B, T, d)
    features = tokens[:, :1] + block.attn.proj(seen)
    classes: Tensor = encoder.norm(features + block.mlp(block.norm2(features)))
    return classes


# ---- mosaics


def mosaic(
    views: Float[Tensor, "B 3 s s"], side: int, patch_size: int, offset: tuple[int, int] = (0, 0)
) -> tuple[Float[Tensor, "M 3 S S"], Bool[Tensor, "T N"]]:
    """Tile views into squares of `side` x `side`, and roll them by whole patches, with wrap-around.

    Args:
        views: B is a multiple of side^2; tiles are taken in order.
        side: tiles along a side.
        patch_size: px.
        offset: rows and columns to roll by, patches.

    Returns:
        M = B / side^2 mosaics, and which tokens belong to which tile.
    """
    batch, channels, size, _ = views.shape
    rows = views.reshape(batch // side**2, side, side, channels, size, size).permute(0, 3, 1, 4, 2, 5)
    mosaics = rows.reshape(-1, channels, side * size, side * size)
    place = torch.arange(side * size // patch_size, device=views.device) // (size // patch_size)
    tile = place[:, None] * side + place
    mosaics = torch.roll(mosaics, (offset[0] * patch_size, offset[1] * patch_size), (2, 3))
    tile = torch.roll(tile, offset, (0, 1)).flatten()
    return mosaics, tile == torch.arange(side**2, device=views.device)[:, None]


def attention_bias(
    inside: Bool[Tensor, "T N"], mosaics: int, generator: torch.Generator | None = None
) -> Float[Tensor, "M T n"]:
    """Return the bias that restricts class attention to tiles: minus infinity outside half of them, less for others.

    The soft half (1 to 4 nats, more with more tiles, so that a tile's share of the attention stays about the same)
    trains the attention itself: it must distinguish the keys of other tiles.

    The class token's own logit is unchanged: n = 1 + N.
    """
    tiles, _ = inside.shape
    device = inside.device
    soft = 1 + 3 * torch.rand(mosaics, tiles, 1, generator=generator) + math.log(max(tiles - 1, 3) / 3)
    hard = torch.rand(mosaics, tiles, 1, generator=generator) < 0.5
    penalty = torch.where(hard, torch.inf, soft).to(device)
    outside = torch.where(inside, torch.zeros((), device=device), -penalty)  # (M, T, N)
    return F.pad(outside, (1, 0))


# ---- views


def draw_views(
    images: Float[Tensor, "B 3 H W"],
    size: int,
    area: tuple[float, float],
    recipe: PretrainingRecipe,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B 3 s s"]:
    """Draw one view of each image: a crop, resized, perhaps mirrored, with changed colours, normalised.

    Args:
        images: in [0, 1].
        size: side, px.
        area: smallest and largest share of the image in the crop.
        recipe: recipe with the ranges of colour changes (`hue` to `contrast`).
        generator: source of random numbers; None: torch's own.
    """
    batch, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(batch, generator=generator)).to(device)

    side, stretch = uniform(*area).sqrt(), uniform(-0.2, 0.2).exp()
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    mirrored = torch.where(uniform(0.0, 1.0) < 0.5, -1.0, 1.0)
    affine = torch.zeros(batch, 2, 3, device=device)
    affine[:, 0, 0], affine[:, 0, 2] = width * mirrored, uniform(-1.0, 1.0) * (1 - width)
    affine[:, 1, 1], affine[:, 1, 2] = height, uniform(-1.0, 1.0) * (1 - height)
    grid = F.affine_grid(affine, [batch, 3, size, size], align_corners=False)
    views = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    most = math.radians(recipe.hue)
    turn = torch.where(uniform(0.0, 1.0) < recipe.hue_share, uniform(-most, most), 0.0)
    saturation = torch.where(uniform(0.0, 1.0) < 1 - recipe.grey_share, uniform(*recipe.saturation), 0.0)
    views = torch.einsum("bij,bjhw->bihw", colour_matrix(turn, saturation), views)
    views = views * uniform(*recipe.brightness)[:, None, None, None]
    mean = views.mean((1, 2, 3), keepdim=True)
    views = ((views - mean) * uniform(*recipe.contrast)[:, None, None, None] + mean).clamp(0, 1)
    return normalise(views)


def normalise(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Normalise [0, 1] to the encoder's input: ImageNet's mean becomes 0, its deviation 1."""
    mean = images.new_tensor(IMAGENET_MEAN)[:, None, None]
    return (images - mean) / images.new_tensor(IMAGENET_STD)[:, None, None]


def colour_matrix(turn: Float[Tensor, " B"], saturation: Float[Tensor, " B"]) -> Float[Tensor, "B 3 3"]:
    """Return matrices on RGB that rotate hues (radians) and scale saturation, in NTSC's luminance and chrominances."""
    to_yiq = turn.new_tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos, sin = saturation * turn.cos(), saturation * turn.sin()
    middle = torch.zeros(len(turn), 3, 3, device=turn.device)
    middle[:, 0, 0] = 1
    middle[:, 1, 1], middle[:, 1, 2] = cos, -sin
    middle[:, 2, 1], middle[:, 2, 2] = sin, cos
    matrix: Tensor = torch.linalg.inv(to_yiq) @ middle @ to_yiq
    return matrix


# ---- the objective


class Head(nn.Module):
    """Maps class features to the vectors that the losses compare: unit vectors, and cosines with the prototypes."""

    def __init__(self, recipe: PretrainingRecipe) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(recipe.width, recipe.hidden),
            nn.GELU(),
            nn.Linear(recipe.hidden, recipe.hidden),
            nn.GELU(),
            nn.Linear(recipe.hidden, recipe.bottleneck),
        )
        self.prototypes = nn.Parameter(torch.randn(recipe.prototypes, recipe.bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Float[Tensor, "B d"]) -> tuple[Float[Tensor, "B e"], Float[Tensor, "B P"]]:
        """Return unit vectors, and their cosines with the prototypes."""
        unit = F.normalize(self.mlp(features), dim=-1)
        return unit, unit @ F.normalize(self.prototypes, dim=-1).T


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views of one step: two global and several local ones of each image, normalised."""

    globals_: tuple[Float[Tensor, "B 3 s s"], Float[Tensor, "B 3 s s"]]
    locals_: tuple[Float[Tensor, "B 3 t t"], ...]

    @classmethod
    def draw(
        cls,
        images: Float[Tensor, "B 3 H W"],
        recipe: PretrainingRecipe,
        generator: torch.Generator | None = None,
    ) -> "Views":
        """Draw views of `images`, in [0, 1]."""
        size, area = recipe.global_size, recipe.global_area
        first, second = (draw_views(images, size, area, recipe, generator) for _ in range(2))
        size, area = recipe.local_size, recipe.local_area
        local = tuple(draw_views(images, size, area, recipe, generator) for _ in range(recipe.local_views))
        return cls(globals_=(first, second), locals_=local)


class Student(nn.Module):
    """The encoder and its head; it receives the last global and the last local view in mosaics."""

    def __init__(self, recipe: PretrainingRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.encoder = new_encoder(recipe)
        self.head = Head(recipe)

    def forward(
        self, views: Views, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "V B e"], Float[Tensor, "V B P"]]:
        """Return unit vectors and cosines of all views, the two global ones first."""
        whole, tiled = views.globals_
        features = [self._alone(whole, generator), self._tiled(tiled, self.recipe.global_mosaic, generator)]
        if views.locals_:
            *alone, tiled = views.locals_
            if alone:
                features.append(self._alone(torch.cat(alone), generator))
            features.append(self._tiled(tiled, self.recipe.local_mosaic, generator))
        batch = len(whole)
        unit, cosines = self.head(torch.cat(features))
        return unit.unflatten(0, (-1, batch)), cosines.unflatten(0, (-1, batch))

    def _alone(self, views: Tensor, generator: torch.Generator | None) -> Tensor:
        return class_features(self.encoder, views, forgotten=self._forgotten(views, generator))[:, 0]

    def _tiled(self, views: Tensor, side: int, generator: torch.Generator | None) -> Tensor:
        patch_size = self.recipe.patch_size
        down, right = torch.randint(side * views.shape[-1] // patch_size, (2,), generator=generator).tolist()
        mosaics, inside = mosaic(views, side, patch_size, (down, right))
        bias = attention_bias(inside, len(mosaics), generator)
        features = class_features(self.encoder, mosaics, forgotten=self._forgotten(mosaics, generator), bias=bias)
        return features.flatten(0, 1)

    def _forgotten(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        return (torch.rand(len(images), generator=generator) < self.recipe.forget).to(images.device)


class Teacher(nn.Module):
    """A moving average of the student; it receives whole global views, and its outputs are the targets."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.average = copy.deepcopy(student).requires_grad_(False)

    @torch.no_grad()
    def forward(self, views: Views) -> Float[Tensor, "2 B P"]:
        """Return the cosines of the two global views with the prototypes."""
        features = class_features(self.average.encoder, torch.cat(views.globals_))[:, 0]
        cosines: Tensor = self.average.head(features)[1]
        return torch.stack(cosines.chunk(2))

    @torch.no_grad()
    def follow(self, student: Student, momentum: float) -> None:
        """Update the average to momentum average + (1 - momentum) student."""
        for mine, theirs in zip(self.average.parameters(), student.parameters(), strict=True):
            mine.lerp_(theirs.detach(), 1 - momentum)


def gather_from_workers(mine: Float[Tensor, "V B e"]) -> Float[Tensor, "V all e"]:
    """Return the slices of all workers in order; gradients flow to this worker's slice only."""
    if worker_count() == 1:
        return mine
    parts = [torch.empty_like(mine) for _ in range(worker_count())]
    dist.all_gather(parts, mine.detach().contiguous())
    parts[dist.get_rank()] = mine
    return torch.cat(parts, 1)


def sinkhorn(logits: Float[Tensor, "B P"], temperature: float, iterations: int) -> Float[Tensor, "B P"]:
    """Return soft assignments of samples to prototypes, in which all prototypes have equal shares.

    Args:
        logits: this worker's rows of the global batch; all rows are balanced together.
        temperature: divides the logits.
        iterations: number of normalisations of columns, then rows.

    Returns:
        Rows that sum to 1; columns sum, over all workers, to samples / P, more precisely with more iterations.
    """
    shares = (logits.double() / temperature).softmax(1)
    for _ in range(iterations):
        shares = shares / sum_over_workers(shares.sum(0, keepdim=True)).clamp(min=1e-12)
        shares = shares / shares.sum(1, keepdim=True)
    return shares.to(logits.dtype)


def contrast(unit: Float[Tensor, "V B e"], temperature: float) -> Float[Tensor, ""]:
    """Return InfoNCE between each global view and every later view, in both directions.

    Each image of the batch is its own class: its two views must be closer to each other than to those of other images.
    """
    views, batch, _ = unit.shape
    own = torch.arange(batch, device=unit.device)
    losses = []
    for first in range(2):
        for second in range(first + 1, views):
            logits = unit[second] @ unit[first].T / temperature
            losses.append((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)
    return torch.stack(losses).mean()


def clustering(
    cosines: Float[Tensor, "V B P"], targets: Float[Tensor, "2 B P"], temperature: float
) -> Float[Tensor, ""]:
    """Return DINO's cross-entropy of each student view with the teacher's targets for the *other* global view(s).

    Args:
        cosines: the student's; its first two views are the teacher's.
        targets: rows that sum to 1.
        temperature: divides the cosines.
    """
    log_shares = F.log_softmax(cosines / temperature, -1)
    losses = [
        -(targets[first] * log_shares[second]).sum(-1).mean()
        for first in range(2)
        for second in range(len(cosines))
        if first != second
    ]
    return torch.stack(losses).mean()


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """The values that change from step to step."""

    learning_rate: float
    weight_decay: float
    teacher_momentum: float
    clustering_weight: float  # 0 to 1
    train_prototypes: bool

    @classmethod
    def at(cls, step: int, recipe: PretrainingRecipe) -> "StepSchedule":
        """Return the values of a step, counted from 0."""
        progress = step / recipe.steps
        falling = 0.5 * (1 + math.cos(math.pi * progress))
        low, high = recipe.weight_decay
        ramp = (progress - recipe.clustering_starts) / max(recipe.clustering_full - recipe.clustering_starts, 1e-9)
        return cls(
            learning_rate=recipe.learning_rate
            * recipe.batch_size
            / 64
            * min(1.0, step / recipe.warmup)
            * (0.98 * falling + 0.02),
            weight_decay=low + (high - low) * progress,
            teacher_momentum=1 - (1 - recipe.teacher_momentum) * falling,
            clustering_weight=min(1.0, max(0.0, ramp)),
            train_prototypes=ramp > 0,
        )


@dataclass(frozen=True, kw_only=True)
class PretrainingLoss:
    """Losses of the worker's slice; `total` is minimised."""

    total: Float[Tensor, ""]
    contrast: Float[Tensor, ""]
    clustering: Float[Tensor, ""]


def pretraining_loss(
    unit: Float[Tensor, "V B e"],
    cosines: Float[Tensor, "V B P"],
    teacher_cosines: Float[Tensor, "2 B P"],
    weight: float,
    recipe: PretrainingRecipe,
) -> PretrainingLoss:
    """Return InfoNCE, whose weight falls from 1 to `contrast_kept`, plus DINO's cross-entropy with rising weight.

    With several workers each calls it with its slice of the global batch; the *average* of the gradients over workers,
    as computed by DistributedDataParallel, is the gradient of the global batch's loss.

    Args:
        unit: the student's unit vectors.
        cosines: the student's, with its prototypes.
        teacher_cosines: the teacher's, with its own.
        weight: weight of DINO's cross-entropy, 0 to 1, see `StepSchedule.clustering_weight`.
        recipe: temperatures, and `contrast_kept`.
    """
    balanced = sinkhorn(teacher_cosines.flatten(0, 1), recipe.teacher_temperature, recipe.sinkhorn_iterations)
    targets = balanced.view_as(teacher_cosines)
    instance = contrast(gather_from_workers(unit), recipe.contrast_temperature)
    cluster = clustering(cosines, targets, recipe.student_temperature)
    # A worker has only its part of InfoNCE's gradient, but gradients are averaged: multiply by the number of workers.
    scaled = instance * worker_count()
    share = 1 - weight * (1 - recipe.contrast_kept)
    total = share * (scaled - (scaled - instance).detach()) + weight * cluster
    return PretrainingLoss(total=total, contrast=instance.detach(), clustering=cluster.detach())


def new_optimizer(student: Student) -> torch.optim.AdamW:
    """Return AdamW; group 0 has weight decay, group 1 (biases, norms, class token, positions) does not."""
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        exempt = parameter.ndim < 2 or name.endswith(("pos_embed", "cls_token"))
        (others if exempt else decaying).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0)


def apply_schedule(optimizer: torch.optim.Optimizer, now: StepSchedule) -> None:
    """Set this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = now.learning_rate
    optimizer.param_groups[0]["weight_decay"] = now.weight_decay


def encoder_state(teacher: Teacher) -> dict[str, Tensor]:
    """Return the weights that are kept: the teacher's encoder, with DINO's names."""
    return {name: value.contiguous().cpu() for name, value in teacher.average.encoder.state_dict().items()}


def nearest_neighbour_accuracy(
    features: Float[Tensor, "n d"], classes: Int[Tensor, " n"], neighbours: int = 10
) -> float:
    """Return how often the most frequent class among an image's neighbours is its own, a usual test of features.

    Args:
        features: the second half searches its neighbours in the first half.
        classes: classes of the images.
        neighbours: number of neighbours that vote.
    """
    unit, half = F.normalize(features, dim=-1), len(features) // 2
    nearest = (unit[half:] @ unit[:half].T).topk(neighbours, 1).indices
    votes = classes[:half][nearest].mode(1).values
    return (votes == classes[half:]).float().mean().item()
