"""Train a method's learner without the trainer: small images in memory, one worker or one of several."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam

from transfgu.datasets import shapes
from transfgu.datasets.packed_maps import pack_maps
from transfgu.learner import Batch, Learner, Setting
from transfgu.methods import METHODS
from transfgu.recipe import Recipe, preset
from transfgu.training.order import Order

SIDE, IMAGES = 32, 6

# The residual network that timm tests with has a thirtieth of ResNet-18's weights.
SMALL = {"picie.backbone": "test_resnet", "picie.width": 8, "picie.init_batches": 1}
FIELDS: dict[str, dict[str, Any]] = {
    "iic": {"iic.widths": (4, 4, 8, 8, 8, 8), "iic.half_side": 2, "lr": 1e-3},
    "picie": {**SMALL, "picie.auxiliary": 12},
    "picie-no-aux": SMALL,
    "maskcontrast": {"maskcontrast.backbone": "test_resnet", "maskcontrast.width": 8, "maskcontrast.queue": 7},
    "token-kmeans": {},
    "linear-head": {"lr": 1e-2},
}


def recipe_of(method: str, **fields: Any) -> Recipe:
    """Return a recipe of a method that trains quickly: batches of four of six images."""
    own = FIELDS.get(method, {})
    sizes = {"image_size": (SIDE, SIDE), "training_size": (SIDE, SIDE)}
    counts = {"training.batch_size": 4, "epochs": 2} if method != "token-kmeans" else {}
    return preset("shapes", method).with_fields({**sizes, "things": 2, "stuff": 2, **counts, **own, **fields})


def setting(recipe: Recipe, rank: int = 0, world: int = 1) -> Setting:
    order = order_of(recipe)
    return Setting(recipe=recipe, device=torch.device("cpu"), rank=rank, world=world, images=IMAGES, steps=order.steps)


def order_of(recipe: Recipe) -> Order:
    return Order(images=IMAGES, passes=1, batch_size=recipe.training.batch_size, seed=recipe.seed)


def inputs(recipe: Recipe, learner: Learner) -> tuple[Tensor, Tensor]:
    """Return scenes, or the frozen part's results for them, and a plane of object masks: discs of several sizes.

    If the method trains on concept maps, each concept's map is a disc of another image.
    """
    images = torch.from_numpy(
        np.stack([shapes.scene(1, "train", i, SIDE)[0].transpose(2, 0, 1) for i in range(IMAGES)])
    )
    y, x = np.mgrid[:8, :8]
    discs = np.stack([(y - 3) ** 2 + (x - i) ** 2 < 4 + 2 * i for i in range(IMAGES)])
    planes = torch.from_numpy(discs[:, None].astype(np.int16))
    if "concepts" in recipe.stages:
        rolled = [np.roll(discs, shift, axis=0) for shift in range(recipe.concepts.count)]
        planes = pack_maps(torch.from_numpy(np.stack(rolled, 1) + 0.1).float())
    return (learner.model.frozen(images) if learner.whole else images), planes


def run_epoch(recipe: Recipe, learner: Learner, epoch: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Run one epoch as the trainer does; returns its row of the history without scores."""
    images, planes = inputs(recipe, learner)
    order = order_of(recipe)
    torch.manual_seed(int(np.random.SeedSequence([recipe.seed, epoch, rank]).generate_state(1)[0]))

    def batches() -> Iterator[Batch]:
        for slots in order.share(epoch, rank, world):
            places = torch.from_numpy(slots)
            yield Batch(slots, images[places], planes[places])

    learner.begin(epoch, batches)
    results = [learner.step(batch, epoch, index)() for index, batch in enumerate(batches())]
    row = {name: float(np.mean([r[name] for r in results])) for name in results[0]}
    return {**row, **learner.end(epoch, batches, scored=True)}


def make(recipe: Recipe, rank: int = 0, world: int = 1) -> Learner:
    learner: Learner = METHODS[recipe.method].load("learner")(setting(recipe, rank, world))
    if isinstance(learner.optimiser, Adam):
        # Adam divides a gradient by its size: one that is nothing but rounding would move a weight as any other.
        learner.optimiser.param_groups[0]["eps"] = 1e-3
    for module in (*learner.network.modules(), *(learner.teacher.modules() if learner.teacher else ())):
        if isinstance(module, nn.Dropout):  # each worker draws its own
            module.p = 0.0
    return learner


def trained(recipe: Recipe, rank: int = 0, world: int = 1) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Run all epochs of a learner; returns its weights and its rows."""
    learner = make(recipe, rank, world)
    rows = [run_epoch(recipe, learner, epoch, rank, world) for epoch in range(recipe.training.epochs)]
    return {name: tensor.detach().clone() for name, tensor in learner.network.state_dict().items()}, rows


def scaled(recipe: Recipe, epochs: int) -> Recipe:
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, epochs=epochs))
