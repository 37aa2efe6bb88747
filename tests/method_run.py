"""Recipes of the methods of comparison that a whole run of takes seconds."""

from pathlib import Path
from typing import Any

from tests.baselines.learning import FIELDS
from tests.folder_run import SIDE, small
from transfgu.methods import METHODS
from transfgu.recipe import Recipe, preset

RANDOM: dict[str, Any] = {
    "picie.backbone": "test_resnet", "picie.weights": "random",
    "maskcontrast.backbone": "test_resnet", "maskcontrast.weights": "random",
}  # fmt: skip

_KEPT = (
    *("data", "labels", "encoder.name", "encoder.weights", "concepts.things", "concepts.stuff"),
    *("windows.groups", "windows.size", "dataset.feature_size"),
)


def sizes_of(method: str) -> dict[str, Any]:
    """Small images, and one epoch of batches of four where the method takes optimiser steps."""
    sizes = {f"dataset.{name}_size": (SIDE, SIDE) for name in ("image", "feature", "training")}
    steps = {"training.batch_size": 4, "epochs": 1} if METHODS[method].optimised else {}
    return {**sizes, "windows.size": (32, 32), **steps}


def recipe_of(method: str, folder: Path, **fields: Any) -> Recipe:
    """A method's recipe for the photographs of a folder (`tests.folder_run`)."""
    base = small(folder).flat()
    kept = {name: base[name] for name in _KEPT}
    return preset("folder", method).with_fields({**kept, **RANDOM, **sizes_of(method), **FIELDS[method], **fields})
