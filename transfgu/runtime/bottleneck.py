"""The operator that the others wait for is the one whose slots were busy for most of the time.

Ray Data measures how long each task of an operator took. An encoder's slots are its pool's actors, those of reading
and writing the CPUs that the pool leaves: seconds of tasks, divided by slots and by how long the whole took, is the
share that tells. As long as the encoder is the busiest, decoding does not starve it.
"""

import contextlib
import io

import ray
from ray.data import Dataset

from transfgu.recipe import Recipe
from transfgu.runtime.ray_internals import task_seconds

_POOLED = ("EncodeWindows", "MapConcepts", "Count")
"""Operators that run in a pool of encoder actors."""


def details(data: Dataset, recipe: Recipe) -> dict[str, str]:
    """For a stage's outcome: under `bottleneck`, what Ray Data's statistics say of an executed plan.

    Such as "MapBatches(EncodeWindows) busy 93 % of 12.1 s, MapBatches(ReadImages) 21 %", the busiest first; nothing
    where nothing was measured.
    """
    from transfgu.runtime import capacity  # it brings torch, which the tasks of this package's plans start without

    actors = capacity.pool_size(recipe.compute)
    cpus = ray.cluster_resources().get("CPU", 1) - actors * recipe.compute.cpus_per_actor
    seconds, worked = task_seconds(data)
    busy = {
        name: 100 * spent / (seconds * (actors if any(part in name for part in _POOLED) else max(1, cpus)))
        for name, spent in worked.items()
        if seconds
    }
    if not busy:
        return {}
    (name, share), *others = sorted(busy.items(), key=lambda item: -item[1])
    texts = [f"{name} busy {share:.0f} % of {seconds:.1f} s", *(f"{other} {less:.0f} %" for other, less in others)]
    return {"bottleneck": ", ".join(texts)}


def operators(data: Dataset) -> list[str]:
    """The physical operators of a plan, first to last, as Ray would carry them out."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        data.explain()
    physical = shown.getvalue().split("Physical Plan (Optimized)")[1]
    lines = [line.strip(" +-") for line in physical.splitlines() if "[" in line]
    kinds = {"TaskPoolMapOperator": "tasks", "ActorPoolMapOperator": "actors"}
    named = [line.removesuffix("]").partition("[") for line in reversed(lines)]
    return [
        f"{name.removeprefix('MapBatches(').removesuffix(')')} ({kinds[kind]})" if kind in kinds else name
        for kind, _, name in named
    ]
