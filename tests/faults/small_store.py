"""Run with an almost full object store: `python small_store.py RECIPE RUN HELD`, a separate process.

HELD bytes of the store are an array in use by this process, which Ray therefore can't spill: it must spill the objects
of the stages. The last output is JSON: for each stage the spilled and restored bytes, and its seconds.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import ray
from ray._private.internal_api import get_memory_info_reply
from ray._private.state import state

from transfgu import pipeline
from transfgu.methods import STAGES
from transfgu.recipe import from_yaml
from transfgu.runtime import connect
from transfgu.store.artifacts import Run


def moved() -> tuple[int, int]:
    """Return the bytes that Ray has spilled and restored so far."""
    stats = get_memory_info_reply(state).store_stats
    return stats.spilled_bytes_total, stats.restored_bytes_total


def main(recipe_file: str, uri: str, held: str) -> None:
    """Run stage by stage."""
    recipe, found = from_yaml(Path(recipe_file).read_text()), {}
    connect.connect()
    looked_at = ray.get(ray.put(np.full(int(held), 7, np.uint8)))
    for stage in STAGES:
        before, started = moved(), time.monotonic()
        pipeline.run_stages(recipe, Run(uri), until=stage, quiet=True)
        spilled, restored = (now - then for now, then in zip(moved(), before, strict=True))
        found[stage] = {"spilled": spilled, "restored": restored, "seconds": time.monotonic() - started}
    assert (looked_at == 7).all()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
