"""An object store that is too small for the objects of a job, so that Ray spills them to the disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.faults.harness import assert_same, row, write_data
from tests.faults.jobs import JOBS
from transfgu.methods import STAGES
from transfgu.recipe import Recipe
from transfgu.store.artifacts import Run

pytestmark = [pytest.mark.long, pytest.mark.ray]

SIDE, IMAGES = 160, 256
BLOCK = 32 * 3 * SIDE * SIDE  # bytes of one part's images, of eight
STORE, HELD = 80 << 20, 76 << 20  # the least that Ray takes; what is left has no room for two blocks


SMALL = {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(STORE)}


def measured(
    kind: str, recipe: Recipe, out: str, folder: Path, held: int, **environment: str
) -> dict[str, dict[str, float]]:
    """Return the spilled and restored bytes of each stage, or of the whole pretraining or search, and its seconds."""
    file = folder / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("small_store.py")), kind, str(file), out, str(held)],
        env={**os.environ, "RAY_TMPDIR": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def large_images(folder: Path) -> Recipe:
    """Write the data; returns a recipe with one epoch of images that are large for the store."""
    sizes = {f"dataset.{kind}_size": (SIDE, SIDE) for kind in ("image", "feature", "training")}
    return write_data(folder, IMAGES).with_fields({**sizes, "windows.scales": (0.5,), "epochs": 1, "passes": 1})


def print_row(work: str, wanted: dict[str, float], found: dict[str, float]) -> None:
    more = found["seconds"] - wanted["seconds"]
    spilled, restored = (found[what] / 1e6 for what in ("spilled", "restored"))
    outcome = f"goes on: {spilled:.0f} MB spilled, {restored:.0f} MB read back"
    row("object store too small", work, outcome, more, "nothing")


def test_ray_spills_what_the_stages_put_into_its_store(tmp_path: Path, ray_folder: Path) -> None:
    recipe = large_images(tmp_path)
    roomy, tight = Run(str(tmp_path / "roomy")), Run(str(tmp_path / "tight"))
    wanted = measured("stages", recipe, roomy.uri, ray_folder, 0)
    assert all(stage["spilled"] == 0 for stage in wanted.values())
    found = measured("stages", recipe, tight.uri, ray_folder, HELD, **SMALL)
    print("\n" + "\n".join(f"{stage}: {wanted[stage]} roomy, {found[stage]} tight" for stage in STAGES))
    for stage in STAGES:
        assert_same(tight, roomy, stage)
    for stage in ("features", "pseudo_labels", "training", "evaluation"):
        assert found[stage]["spilled"] >= BLOCK, stage
        print_row(stage, wanted[stage], found[stage])


@pytest.mark.parametrize("kind", ["pretraining", "search"])
def test_ray_spills_what_another_job_puts_into_its_store(kind: str, tmp_path: Path, ray_folder: Path) -> None:
    recipe = large_images(tmp_path)
    roomy, tight = str(tmp_path / "roomy"), str(tmp_path / "tight")
    wanted = measured(kind, recipe, roomy, ray_folder, 0)[kind]
    assert wanted["spilled"] == 0
    found = measured(kind, recipe, tight, ray_folder, HELD, **SMALL)[kind]
    np.testing.assert_equal(JOBS[kind].outcome(tight), JOBS[kind].outcome(roomy))
    assert found["spilled"] >= BLOCK
    print_row(kind, wanted, found)
