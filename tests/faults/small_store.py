"""Run with an almost full object store: `python small_store.py stages|pretraining|search RECIPE OUT HELD`.

It is a separate process. HELD bytes of the store are an array in use by this process, which Ray therefore can't spill:
it must spill the objects of the work. The last output is JSON: for each work (each stage, or the whole pretraining or
search) the spilled and restored bytes, and its seconds.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import ray
from ray._private.internal_api import get_memory_info_reply
from ray._private.state import state

from tests.pretraining.test_stage import QUIET, TINY
from transfgu import pipeline
from transfgu.methods import STAGES
from transfgu.pretraining.stage import PretrainingJob, pretrain
from transfgu.recipe import Recipe, from_yaml
from transfgu.runtime import connect
from transfgu.search import space
from transfgu.search.stage import run_search
from transfgu.search.trials import Search
from transfgu.store.artifacts import Run

PRETRAINING_STEPS = 96  # three epochs of 256 images, eight a batch


def moved() -> tuple[int, int]:
    """Return the bytes that Ray has spilled and restored so far."""
    stats = get_memory_info_reply(state).store_stats
    return stats.spilled_bytes_total, stats.restored_bytes_total


def works(kind: str, recipe: Recipe, out: str) -> dict[str, Callable[[], object]]:
    """Return what there is to do, by name."""
    if kind == "stages":
        return {s: partial(pipeline.run_stages, recipe, Run(out), until=s, quiet=True) for s in STAGES}
    if kind == "pretraining":
        small = dataclasses.replace(TINY, steps=PRETRAINING_STEPS)
        side = recipe.dataset.training_size[0]
        job = PretrainingJob(images=recipe.data, out=f"{out}/vit.safetensors", recipe=small, image_size=side)
        return {kind: partial(pretrain, job, dataclasses.replace(recipe.compute, workers=1), QUIET)}
    ranges = space.parse(["omega_1=uniform(0.5,2)"], recipe)
    search = Search(recipe=recipe, uri=out, space=ranges, trials=2, concurrent=1, scheduler="none")
    return {kind: partial(run_search, search, quiet=True)}


def main(kind: str, recipe_file: str, out: str, held: str) -> None:
    """Do one work after the other."""
    recipe, found = from_yaml(Path(recipe_file).read_text()), {}
    connect.connect()
    looked_at = ray.get(ray.put(np.full(int(held), 7, np.uint8)))
    for name, work in works(kind, recipe, out).items():
        before, started = moved(), time.monotonic()
        work()
        spilled, restored = (now - then for now, then in zip(moved(), before, strict=True))
        found[name] = {"spilled": spilled, "restored": restored, "seconds": time.monotonic() - started}
    assert (looked_at == 7).all()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
