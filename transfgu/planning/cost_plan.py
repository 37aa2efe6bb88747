"""What a full data set will take follows from what one image took, once it is said what the machines share.

Every stage needs four things of each image: a device's time, a core's time to decode it, bytes from the network and
bytes from the store. Devices and their cores grow in number, so do the machines' links; the store stays one. A stage
takes as long as the one that is slowest, and as devices are added that turns from the devices to the store.
"""

import math
from dataclasses import dataclass

from transfgu.errors import UserError
from transfgu.methods import TRANSFGU
from transfgu.planning.measurements import Measurements, aligned
from transfgu.recipe import Recipe

_A_MACHINE = 8  # devices


@dataclass(frozen=True, kw_only=True)
class Site:
    """The machines that the plan is for."""

    gpus: int
    """Devices like the measured one."""
    cpus_per_gpu: float = 8.0
    """Cores like the measured ones that decode for each device."""
    store: float = 1.0
    """What the storage delivers to all machines together, GB/s."""
    network: float = 3.0
    """What a machine of eight devices receives, GB/s."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or min(self.cpus_per_gpu, self.store, self.network) <= 0:
            raise UserError("--gpus, --cpus_per_gpu, --store and --network must be positive", code="flag-range")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a stage needs in all."""

    stage: str
    device: float
    """Seconds of one device."""
    decode: float
    """Seconds of one core."""
    network: float
    """Bytes."""
    read: float
    """Bytes from the store."""
    written: float
    """Bytes to the store."""

    def seconds(self, site: Site) -> dict[str, float]:
        """How long each of the four would take by itself."""
        machines = math.ceil(site.gpus / _A_MACHINE)
        return {
            "GPU": self.device / site.gpus,
            "decode": self.decode / (site.gpus * site.cpus_per_gpu),
            "network": self.network / (machines * site.network * 1e9),
            "store": (self.read + self.written) / (site.store * 1e9),
        }

    def bottleneck(self, site: Site) -> tuple[str, float]:
        """What takes longest, and its seconds: the stage's, since the others happen meanwhile."""
        return max(self.seconds(site).items(), key=lambda x: x[1])


def costs(recipe: Recipe, found: Measurements, images: int, validation: int) -> list[Cost]:
    """What each stage of a recipe needs for `images` training and `validation` labelled images.

    Raises:
        UserError: a stage that was not measured, or measurements of another encoder.
    """
    if recipe.method != TRANSFGU:
        raise UserError(
            f"a plan is made of TransFGU's stages, and the recipe's method is {recipe.method}: leave out --method",
            code="plan-of-another-method",
        )
    if found.encoder != recipe.encoder.name:
        raise UserError(
            f"the measurements are of encoder {found.encoder}, and the recipe's is {recipe.encoder.name}: "
            f"measure it by transfgu benchmark all --preset {recipe.preset} --encoder.name {recipe.encoder.name}",
            code="measurements-mismatch",
        )
    file = found.costs["file bytes"]
    windows, maps = found.timing("features"), found.timing("pseudo-labels")
    kmeans, training, scoring = (
        found.timing("concepts, one worker"),
        found.timing("training"),
        found.timing("evaluation"),
    )
    of_windows = windows.details["windows an image"] * images
    of_features, of_maps = (t.details["bytes an image"] * images for t in (windows, maps))
    seen = images * recipe.training.epochs * recipe.training.passes
    scored = validation * recipe.training.epochs // recipe.training.evaluate_every
    pixels = {n: 3.0 * s[0] * s[1] for n, s in _sizes(recipe).items()}
    cost = found.costs
    return [
        Cost(
            stage="features",
            device=windows.seconds / windows.items * images,
            decode=cost["features decoding"] * images,
            network=pixels["features"] * images,
            read=file * images,
            written=of_features,
        ),
        Cost(
            stage="concepts",
            device=kmeans.seconds / kmeans.items * of_windows * recipe.concepts.iterations,
            decode=0.0,
            network=0.0,
            read=of_features,
            written=0.0,
        ),
        Cost(
            stage="pseudo-labels",
            device=maps.seconds / maps.items * images,
            decode=cost["pseudo-labels decoding"] * images,
            network=pixels["pseudo-labels"] * images,
            read=file * images,
            written=of_maps,
        ),
        Cost(
            stage="training",
            device=training.seconds / training.items * seen,
            decode=(cost["training decoding"] + maps.details["reading [s an image and core]"]) * seen,
            network=pixels["training"] * seen + of_maps / images * seen,
            read=(file + of_maps / images) * seen,
            written=0.0,
        ),
        Cost(
            stage="evaluation, every epoch's",
            device=scoring.seconds / scoring.items * scored,
            decode=cost["pseudo-labels decoding"] * scored,
            network=pixels["pseudo-labels"] * scored,
            read=file * scored,
            written=0.0,
        ),
    ]


def _sizes(recipe: Recipe) -> dict[str, tuple[int, int]]:
    how = recipe.dataset
    return {"features": how.feature_size, "pseudo-labels": how.image_size, "training": how.training_size}


def shown(recipe: Recipe, found: Measurements, site: Site, images: int, validation: int) -> str:
    """The plan for people: each stage's hours, bytes and bottleneck, and how these move with the number of devices."""
    stages = costs(recipe, found, images, validation)
    head = ["stage", "hours", "read", "written", "GPU", "decode", "network", "store", "bottleneck"]
    rows = [head]
    for cost in stages:
        name, seconds = cost.bottleneck(site)
        rows.append(
            [
                cost.stage,
                _hours(seconds),
                f"{cost.read / 1e9:.1f} GB",
                f"{cost.written / 1e9:.1f} GB",
                *(_hours(s) for s in cost.seconds(site).values()),
                name,
            ]
        )
    lines = [
        f"{recipe.preset}: {images} images, {site.gpus} x {found.device} ({found.precision}, measured {found.date}), "
        f"{site.cpus_per_gpu:g} cores each, store {site.store:g} GB/s, network {site.network:g} GB/s a machine",
        *aligned(rows),
        "assumed: GPUs divide a stage's time by their number. Training takes longer than that, as a step's fixed costs "
        "stay",
        "when its batch is divided; so does K-Means where it ran on cores, unless each GPU comes with the "
        f"{found.cores} measured.",
        "",
        "hours in all, and the bottleneck of the longest stage:",
    ]
    counts = sorted({2**i for i in range(max(4, math.ceil(math.log2(site.gpus)) + 2))} | {site.gpus})
    moves = [["GPUs", "hours", "longest stage, bottleneck"]]
    for count in counts:
        there = Site(gpus=count, cpus_per_gpu=site.cpus_per_gpu, store=site.store, network=site.network)
        found_there = [(cost.stage, *cost.bottleneck(there)) for cost in stages]
        stage, name, _ = max(found_there, key=lambda x: x[2])
        moves.append([str(count), _hours(sum(x[2] for x in found_there)), f"{stage}, {name}"])
    return "\n".join([*lines, *aligned(moves)])


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h"
