"""Read models of any method from their files, which name the method."""

from collections.abc import Sequence

import torch

from transfgu.errors import UserError
from transfgu.learner import Model
from transfgu.methods import TRANSFGU, method
from transfgu.recipe import Recipe
from transfgu.store import storage
from transfgu.store.weights import WeightFile, read_weights

METHOD = "method"
"""Key of the method's name in the metadata of a model's file; TransFGU's models have none."""
CLASSES = "classes"
"""Key of the number of classes, including the background."""


def load_models(recipe: Recipe, uris: Sequence[str], device: torch.device) -> list[Model]:
    """Read the models of a recipe, which share the frozen part, in evaluation mode.

    Raises:
        UserError: a file that is missing or damaged, of another method or number of classes, or an encoder that is not
            available.
    """
    files = [read_weights(uri) for uri in uris]
    for file, uri in zip(files, uris, strict=True):
        check_method(recipe, file, uri)
    models: list[Model] = method(recipe.method).load("model")(recipe, [file.tensors for file in files], device)
    return models


def check_method(recipe: Recipe, file: WeightFile, uri: str) -> None:
    """Refuse weights of another method than the recipe's, or of another number of classes.

    Raises:
        UserError: such weights; the message gives both.
    """
    found = file.metadata.get(METHOD, TRANSFGU)
    if found != recipe.method:
        raise UserError(
            f"{storage.shown(uri)} holds a model of method {found}, but the recipe's is {recipe.method}: set --method",
            code="model-of-another-method",
        )
    classes = file.metadata.get(CLASSES, str(recipe.classes))
    if recipe.method != TRANSFGU and classes != str(recipe.classes):
        raise UserError(
            f"{storage.shown(uri)} has {classes} classes, but the recipe {recipe.preset} has {recipe.classes}: "
            "choose the preset of its training",
            code="model-of-other-classes",
        )
