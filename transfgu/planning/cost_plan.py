"""Estimate the time and cost of a data set from measurements per image, for the dry run and the plan.

Every stage needs time of devices, time of cores for decoding, bytes over the network, and bytes and requests of the
storage. More machines add devices, cores and network links, but there is only one storage. A stage takes as long as the
slowest of these resources, so with more devices the bottleneck moves from the devices to the cores or the storage.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transfgu.errors import UserError
from transfgu.methods import TRANSFGU
from transfgu.planning.measurements import Ingest, Measurements, aligned
from transfgu.recipe import Recipe
from transfgu.training.order import Order

STREAMED_REQUESTS = 5.0
"""Requests per training image without a cache: image HEAD and GET; part HEAD, footer and maps."""

_A_MACHINE = 8  # devices per machine
_PART = 32  # images per part of features and pseudo labels


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Costs of one image, in seconds and bytes, and where they were measured."""

    where: str
    """Device and date."""
    features: float
    """Device seconds per training image."""
    kmeans: float
    """Seconds per window and iteration."""
    maps: float
    """Device seconds per training image."""
    training: float
    """Device seconds per image that a step sees."""
    scoring: float
    """Device seconds per scored image."""
    windows: float
    """Kept windows per image."""
    window_bytes: float
    """Bytes of features per image."""
    map_bytes: float
    """Bytes of maps per image."""
    file_bytes: float = 0.0
    """Size of an image's file, in bytes."""
    decoding: Mapping[str, float]
    """Core seconds per image, under `features`, `pseudo-labels` and `training`; maps are part of the last."""
    ingest: Ingest | None = None
    """Measurements of training that reads a node's cache; None: images are read and decoded in every epoch."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """The machines of an estimate, and their prices."""

    gpus: int
    """Number of devices, each as fast as the measured one."""
    cpus_per_gpu: float = 8.0
    """Cores that decode per device, each as fast as the measured ones."""
    store: float = 1.0
    """Throughput of the storage for all machines together, GB/s."""
    network: float = 3.0
    """Network throughput of a machine with eight devices, GB/s."""
    gpu_hour: float = 0.8
    """Price of a device with its cores, dollars per hour."""
    get: float = 0.0004
    """Price of 1,000 reading requests, dollars."""
    put: float = 0.005
    """Price of 1,000 writing requests, dollars."""
    gigabyte: float = 0.0
    """Price of reading a gigabyte from the storage, dollars; within one region of AWS it is free."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or min(self.cpus_per_gpu, self.store, self.network) <= 0:
            raise UserError("--gpus, --cpus_per_gpu, --store and --network must be positive", code="flag-range")
        if min(self.gpu_hour, self.get, self.put, self.gigabyte) < 0:
            raise UserError("prices must not be negative", code="flag-range")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a stage needs in total."""

    stage: str
    device: float = 0.0
    """Seconds on one device."""
    decode: float = 0.0
    """Seconds on one core."""
    network: float = 0.0
    """Bytes between machines."""
    read: float = 0.0
    """Bytes read from the storage."""
    written: float = 0.0
    """Bytes written to the storage."""
    gets: float = 0.0
    """Reading requests."""
    puts: float = 0.0
    """Writing requests."""

    def seconds(self, site: Site) -> dict[str, float]:
        """Return the seconds that each resource would take alone."""
        machines = math.ceil(site.gpus / _A_MACHINE)
        return {
            "GPU": self.device / site.gpus,
            "decode": self.decode / (site.gpus * site.cpus_per_gpu),
            "network": self.network / (machines * site.network * 1e9),
            "store": (self.read + self.written) / (site.store * 1e9),
        }

    def bottleneck(self, site: Site) -> tuple[str, float]:
        """Return the slowest resource and its seconds, which are the stage's, as all work in parallel."""
        return max(self.seconds(site).items(), key=lambda x: x[1])

    def dollars(self, site: Site) -> dict[str, float]:
        """Return the price of machines, requests and bytes."""
        return {
            "machines": self.bottleneck(site)[1] / 3600 * site.gpus * site.gpu_hour,
            "requests": (self.gets * site.get + self.puts * site.put) / 1000,
            "bytes": self.read / 1e9 * site.gigabyte,
        }


def measured_rates(recipe: Recipe, found: Measurements, ingest: Ingest | None = None) -> Rates:
    """Return the rates from measurements of the benchmark, and of the ingest if it was measured.

    Raises:
        UserError: a stage that was not measured, measurements of another encoder, or a recipe of another method.
    """
    if recipe.method != TRANSFGU:
        raise UserError(
            f"only TransFGU can be planned, and the method of the recipe is {recipe.method}: leave out --method",
            code="plan-of-another-method",
        )
    if found.encoder != recipe.encoder.name:
        raise UserError(
            f"the measurements are of encoder {found.encoder}, but the recipe's is {recipe.encoder.name}: "
            f"run transfgu benchmark all --preset {recipe.preset} --encoder.name {recipe.encoder.name}",
            code="measurements-mismatch",
        )
    windows, maps = found.timing("features"), found.timing("pseudo-labels")
    kmeans, training = found.timing("concepts, one worker"), found.timing("training")
    scoring = found.timing("evaluation")
    reading = maps.details["reading [s an image and core]"]
    return Rates(
        where=f"{found.device} ({found.precision}, measured {found.date})",
        features=windows.seconds / windows.items,
        kmeans=kmeans.seconds / kmeans.items,
        maps=maps.seconds / maps.items,
        training=training.seconds / training.items,
        scoring=scoring.seconds / scoring.items,
        windows=windows.details["windows an image"],
        window_bytes=windows.details["bytes an image"],
        map_bytes=maps.details["bytes an image"],
        file_bytes=found.costs["file bytes"],
        decoding={
            "features": found.costs["features decoding"],
            "pseudo-labels": found.costs["pseudo-labels decoding"],
            "training": found.costs["training decoding"] + reading,
        },
        ingest=ingest,
    )


def costs(recipe: Recipe, rates: Rates, images: int, validation: int) -> list[Cost]:
    """Return what each stage of a recipe needs for `images` training and `validation` labelled images."""
    how = recipe.dataset
    order = Order.of(recipe, max(1, images))
    seen = order.steps * order.batch * recipe.training.epochs if images else 0
    scored = validation * (recipe.training.epochs // recipe.training.evaluate_every)
    pixels = {name: 3.0 * s[0] * s[1] for name, s in (("features", how.feature_size), ("maps", how.image_size))}
    looks = len(recipe.evaluation.scales) * (1 + recipe.evaluation.flip)
    decode, file, parts = rates.decoding, rates.file_bytes, float(math.ceil(images / _PART))
    return [
        Cost(
            stage="features",
            device=rates.features * images,
            decode=decode["features"] * images,
            network=pixels["features"] * images,
            read=file * images,
            written=rates.window_bytes * images,
            gets=float(images),
            puts=parts,
        ),
        Cost(
            stage="concepts",
            device=rates.kmeans * rates.windows * images * recipe.concepts.iterations,
            read=rates.window_bytes * images,
            gets=parts,
        ),
        Cost(
            stage="pseudo-labels",
            device=rates.maps * images,
            decode=decode["pseudo-labels"] * images,
            network=pixels["maps"] * images,
            read=file * images,
            written=rates.map_bytes * images,
            gets=float(images),
            puts=parts,
        ),
        _training(recipe, rates, images, seen),
        Cost(
            stage="scores between epochs",
            device=rates.scoring * scored,
            decode=decode["pseudo-labels"] * scored,
            network=pixels["maps"] * scored,
            read=file * scored,
            gets=2.0 * scored,
        ),
        Cost(
            stage="evaluation",
            device=rates.scoring * validation * looks,
            decode=decode["pseudo-labels"] * validation,
            network=pixels["maps"] * validation,
            read=file * validation,
            gets=2.0 * validation,
        ),
    ]


def _training(recipe: Recipe, rates: Rates, images: int, seen: int) -> Cost:
    device, ingest = rates.training * seen, rates.ingest
    whole = rates.file_bytes + rates.map_bytes
    if ingest is None:
        height, width = recipe.dataset.training_size
        return Cost(
            stage="training",
            device=device,
            decode=rates.decoding["training"] * seen,
            network=(3.0 * height * width + rates.map_bytes) * seen,
            read=whole * seen,
            gets=STREAMED_REQUESTS * seen,
        )
    # The first pass fills the caches of the nodes; later passes read them.
    return Cost(
        stage="training",
        device=device,
        decode=rates.decoding["training"] * images + seen / ingest.samples_per_second_per_core,
        read=whole * images + ingest.bytes_per_sample * max(0, seen - images),
        gets=ingest.first_epoch_requests_per_sample * images + ingest.requests_per_sample * max(0, seen - images),
    )


def total(stages: Sequence[Cost], site: Site) -> tuple[float, float]:
    """Return seconds and dollars of all stages in sequence."""
    return (
        sum(cost.bottleneck(site)[1] for cost in stages),
        sum(sum(cost.dollars(site).values()) for cost in stages),
    )


def shown(recipe: Recipe, rates: Rates, site: Site, images: int, validation: int) -> str:
    """Return the plan as text: hours, dollars, bytes, requests and bottleneck by stage, then by number of devices."""
    stages = costs(recipe, rates, images, validation)
    head = (
        "stage",
        "hours",
        "dollars",
        "read",
        "written",
        "requests",
        "GPU",
        "decode",
        "network",
        "store",
        "bottleneck",
    )
    rows = [[*head]]
    for cost in stages:
        name, seconds = cost.bottleneck(site)
        rows.append(
            [
                cost.stage,
                _hours(seconds),
                f"${sum(cost.dollars(site).values()):,.2f}",
                f"{cost.read / 1e9:,.1f} GB",
                f"{cost.written / 1e9:,.1f} GB",
                f"{(cost.gets + cost.puts) / 1e6:,.2f} million",
                *(_hours(s) for s in cost.seconds(site).values()),
                name,
            ]
        )
    prices = {name: sum(cost.dollars(site)[name] for cost in stages) for name in ("machines", "requests", "bytes")}
    ingest = rates.ingest.where if rates.ingest else "not measured: every image is read and decoded in every epoch"
    lines = [
        f"{recipe.preset}: {images} images, {site.gpus} x {rates.where}",
        f"{site.cpus_per_gpu:g} cores each, store {site.store:g} GB/s, network {site.network:g} GB/s per machine, "
        f"${site.gpu_hour:g} per GPU and hour",
        f"training's ingest: {ingest}",
        *aligned(rows),
        "in all: " + ", ".join(f"${amount:,.2f} for {name}" for name, amount in prices.items()),
        "assumed: the time of a stage is divided by the number of GPUs. Training takes longer, because the fixed costs "
        "of a step stay when its batch is divided; so does K-Means if it was measured on a CPU.",
        "",
        "by the number of GPUs:",
    ]
    moves = [["GPUs", "hours", "dollars", "longest stage, bottleneck"]]
    for count in sorted({1, 8, 64, site.gpus}):
        there = replace(site, gpus=count)
        stage, name, _ = max(((c.stage, *c.bottleneck(there)) for c in stages), key=lambda x: x[2])
        seconds, dollars = total(stages, there)
        moves.append([str(count), _hours(seconds), f"${dollars:,.2f}", f"{stage}, {name}"])
    return "\n".join([*lines, *aligned(moves)])


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h"
