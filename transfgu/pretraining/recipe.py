"""Define the settings of a pretraining."""

import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transfgu.fields import MISSING, FieldInfo, check, field, field_infos
from transfgu.recipe import MAX_PIXELS, check_pixels


@dataclass(frozen=True, kw_only=True)
class PretrainingRecipe:
    """All settings of `transfgu.pretraining.objective`, without the images."""

    seed: int = field(0, "seed of drawn images, initial weights, order and views")
    patch_size: int = field(8, "patch of the ViT", "pixels")
    width: int = field(96, "channels of the ViT", "channels")
    depth: int = field(4, "blocks of the ViT", "blocks")
    heads: int = field(3, "attention heads of the ViT", "heads")
    global_size: int = field(48, "side of the large views, and of the ViT's own images", "pixels")
    local_size: int = field(24, "side of the small views", "pixels")
    local_views: int = field(4, "number of small views of an image; the last of them is used in mosaics", "views")
    global_area: tuple[float, float] = field((0.25, 1.0), "range of the share of the image in large views", "0 to 1")
    local_area: tuple[float, float] = field((0.08, 0.35), "range of the share of the image in small views", "0 to 1")
    hue: float = field(180.0, "maximum rotation of a view's hues, in both directions", "degrees", before=180.0)
    hue_share: float = field(0.8, "share of views with rotated hues", "0 to 1", before=0.8)
    saturation: tuple[float, float] = field((0.2, 1.4), "range of the factor of a view's saturation", before=(0.2, 1.4))
    grey_share: float = field(0.15, "share of views without colour", "0 to 1", before=0.15)
    brightness: tuple[float, float] = field((0.6, 1.4), "range of the factor of a view's brightness", before=(0.6, 1.4))
    contrast: tuple[float, float] = field((0.6, 1.4), "range of the factor of a view's contrast", before=(0.6, 1.4))
    global_mosaic: int = field(2, "tiles along a side of a mosaic of large views", "tiles")
    local_mosaic: int = field(4, "tiles along a side of a mosaic of small views", "tiles")
    forget: float = field(0.5, "share of views whose class token is reset before the last block", "0 to 1")
    prototypes: int = field(32, "prototypes of DINO's cross-entropy, its number of clusters", "prototypes")
    hidden: int = field(256, "width of the projection head", "channels")
    bottleneck: int = field(64, "width of the vectors that the losses compare", "channels")
    contrast_temperature: float = field(0.15, "temperature of InfoNCE")
    student_temperature: float = field(0.1, "temperature of the student's shares of prototypes")
    teacher_temperature: float = field(0.05, "temperature of the teacher's shares of prototypes")
    sinkhorn_iterations: int = field(3, "Sinkhorn-Knopp iterations that balance the teacher's shares", "iterations")
    clustering_starts: float = field(0.1, "share of the steps before DINO's cross-entropy starts", "0 to 1")
    clustering_full: float = field(
        0.25, "share of the steps after which DINO's cross-entropy has its full weight", "0 to 1"
    )
    contrast_kept: float = field(0.5, "weight of InfoNCE after that", "0 to 1")
    orient: bool = field(True, "apply the orientation in an image's EXIF data, as viewers do", before=False)
    max_pixels: int = field(
        MAX_PIXELS, "maximum size of an image; a larger one is left out", "pixels", before=MAX_PIXELS
    )
    steps: int = field(2400, "optimiser steps", "steps")
    batch_size: int = field(64, "global batch size, divided among the workers", "images")
    learning_rate: float = field(1e-3, "AdamW's learning rate at a batch of 64")
    warmup: int = field(100, "steps over which the learning rate rises", "steps")
    weight_decay: tuple[float, float] = field((0.04, 0.2), "weight decay at the first and at the last step")
    teacher_momentum: float = field(
        0.99, "momentum of the teacher's average at the first step; 1 at the last", "0 to 1"
    )
    clip: float = field(3.0, "maximum norm of the gradients")

    def __post_init__(self) -> None:
        positive = (
            *("patch_size", "width", "depth", "heads", "global_size", "local_size", "global_mosaic", "local_mosaic"),
            *("prototypes", "hidden", "bottleneck", "contrast_temperature", "student_temperature"),
            *("teacher_temperature", "steps", "batch_size", "learning_rate", "warmup", "clip"),
        )
        for name in positive:
            check(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for name in ("local_views", "sinkhorn_iterations"):
            check(getattr(self, name) >= 0, f"{name} must not be negative, not {getattr(self, name)}")
        shares = ("forget", "clustering_starts", "clustering_full", "contrast_kept", "teacher_momentum")
        for name in (*shares, "hue_share", "grey_share"):
            check(0 <= getattr(self, name) <= 1, f"{name} must lie in 0..1, not {getattr(self, name)}")
        for name in ("global_area", "local_area"):
            low, high = getattr(self, name)
            check(0 < low <= high <= 1, f"{name} must be two rising shares in (0, 1], not {low},{high}")
        check(0 <= self.hue <= 180, f"hue must lie in 0..180 degrees, not {self.hue}")
        for name in ("saturation", "brightness", "contrast"):
            low, high = getattr(self, name)
            check(0 <= low <= high, f"{name} must be two rising factors, not {low},{high}")
        for name in ("global_size", "local_size"):
            check(
                getattr(self, name) % self.patch_size == 0,
                f"{name} {getattr(self, name)} is not a multiple of patch_size {self.patch_size}",
                code="image-size",
            )
        check_pixels("max_pixels", self.max_pixels)
        check(
            self.width % self.heads == 0,
            f"width {self.width} is not a multiple of heads {self.heads}",
            code="heads-mismatch",
        )
        check(
            self.batch_size % self.local_mosaic**2 == 0 and self.batch_size % self.global_mosaic**2 == 0,
            f"batch_size {self.batch_size} does not fill mosaics of {self.local_mosaic**2} tiles",
            code="batch-size",
        )


PRETRAINING_FIELDS: dict[str, FieldInfo] = field_infos(PretrainingRecipe)
"""Every field of the pretraining's recipe by name."""

VIEWS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "drawn": {},
        "photographs": {
            "hue": 36.0, "saturation": (0.6, 1.4), "grey_share": 0.2, "brightness": (0.3, 1.5), "contrast": (0.4, 1.6),
        },
    }
)  # fmt: skip
"""Colour changes of views by kind of images: drawn things may have any hue, photographs may not (the sky is blue).

Hues of photographs are rotated as in DINO (0.1 of the circle), and brightness varies down to dusk.
"""


def compared_fields(recipe: PretrainingRecipe) -> dict[str, Any]:
    """Return the fields that identify a pretraining; newer ones only if they differ from earlier runs."""
    return {
        name: value
        for name, value in asdict(recipe).items()
        if PRETRAINING_FIELDS[name].before is MISSING or value != PRETRAINING_FIELDS[name].before
    }
