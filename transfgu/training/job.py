"""The arguments of a training, as every worker receives them."""

from dataclasses import dataclass
from typing import Any

from transfgu.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker is told."""

    recipe: Recipe
    images: str
    """URI of the table of training images by position: `image`, `part`, `row`."""
    validation: str
    """URI of the table of labelled validation images (`image`, `label`); empty where there are none."""
    checkpoints: str
    """URI of the folder that Ray Train puts them in."""
    board: Any
    """Handle of the driver's `board.ProgressBoard`."""
    pictures: str = ""
    """URI of a folder for a picture of each epoch; empty: none is wanted."""
    unlabelled: str = ""
    """URI of a table of images (`image`) that predictions are compared on without labels; empty: none."""
    beside: int = 1
    """Trainings, this one included, that share a machine's cores."""
    asks: bool = False
    """Whether the driver says after each epoch if training goes on."""
