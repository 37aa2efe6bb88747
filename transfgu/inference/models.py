"""Read models of any method from their files; a file says which method made it."""

from collections.abc import Sequence

import torch

from transfgu.errors import UserError
from transfgu.learner import Model
from transfgu.methods import TRANSFGU, method
from transfgu.recipe import Recipe
from transfgu.store import storage
from transfgu.store.weights import WeightFile, read_weights

METHOD = "method"
"""The method's name in the metadata of a model's file; TransFGU's say nothing."""
CLASSES = "classes"
"""The number of classes, background included, beside it."""


def load_models(recipe: Recipe, uris: Sequence[str], device: torch.device) -> list[Model]:
    """Read the models of a recipe, which share what is frozen, in evaluation mode.

    Raises:
        UserError: a file that is missing or damaged, of another method or number of classes, or of an encoder that
            can't be had.
    """
    files = [read_weights(uri) for uri in uris]
    for file, uri in zip(files, uris, strict=True):
        check_method(recipe, file, uri)
    models: list[Model] = method(recipe.method).load("model")(recipe, [file.tensors for file in files], device)
    return models


def check_method(recipe: Recipe, file: WeightFile, uri: str) -> None:
    """Refuse weights of another method than the recipe's, or of another number of classes.

    Raises:
        UserError: they are; the message names both.
    """
    found = file.metadata.get(METHOD, TRANSFGU)
    if found != recipe.method:
        raise UserError(
            f"{storage.shown(uri)} holds a model of method {found}, and the recipe's is {recipe.method}: set --method",
            code="model-of-another-method",
        )
    classes = file.metadata.get(CLASSES, str(recipe.classes))
    if recipe.method != TRANSFGU and classes != str(recipe.classes):
        raise UserError(
            f"{storage.shown(uri)} has {classes} classes, but the recipe {recipe.preset} has {recipe.classes}: "
            "choose the preset that it was trained for",
            code="model-of-other-classes",
        )
