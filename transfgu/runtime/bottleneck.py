"""Find the bottleneck of an executed plan: the operator whose slots were busy for the largest share of the time.

Ray Data measures the seconds of each task. The slots of an encoder are the actors of its pool; those of reading and
writing are the CPUs that the pool leaves. The share is the seconds of all tasks, divided by the slots and by the
duration of the plan. While the encoder is the busiest operator, decoding keeps up with it.
"""

import ray
from ray.data import Dataset

from transfgu.recipe import Recipe
from transfgu.runtime.ray_internals import task_seconds

_POOLED = ("EncodeWindows", "MapConcepts", "Count")
"""Operators that run in a pool of encoder actors."""


def details(data: Dataset, recipe: Recipe) -> dict[str, str]:
    """Return the entry `bottleneck` of a stage's outcome, from Ray Data's statistics of an executed plan.

    It lists the busiest operator first, such as "MapBatches(EncodeWindows) busy 93 % of 12.1 s,
    MapBatches(ReadImages) 21 %"; without measurements there is no entry.
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
