"""An object store that is too small for the stages' objects, so that Ray spills them to the disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.harness import assert_same, row, write_data
from transfgu.methods import STAGES
from transfgu.recipe import Recipe
from transfgu.store.artifacts import Run

pytestmark = [pytest.mark.long, pytest.mark.ray]

SIDE, IMAGES = 160, 256
BLOCK = 32 * 3 * SIDE * SIDE  # bytes of one part's images, of eight
STORE, HELD = 80 << 20, 76 << 20  # the least that Ray takes; what is left has no room for two blocks


def measured(recipe: Recipe, run: Run, folder: Path, held: int, **environment: str) -> dict[str, dict[str, float]]:
    """Return the spilled and restored bytes of each stage, and its seconds."""
    file = folder / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("small_store.py")), str(file), run.uri, str(held)],
        env={**os.environ, "RAY_TMPDIR": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_ray_spills_what_the_stages_put_into_its_store(tmp_path: Path, ray_folder: Path) -> None:
    sizes = {f"dataset.{kind}_size": (SIDE, SIDE) for kind in ("image", "feature", "training")}
    recipe = write_data(tmp_path, IMAGES).with_fields({**sizes, "windows.scales": (0.5,), "epochs": 1, "passes": 1})
    roomy, tight = Run(str(tmp_path / "roomy")), Run(str(tmp_path / "tight"))
    wanted = measured(recipe, roomy, ray_folder, 0)
    assert all(stage["spilled"] == 0 for stage in wanted.values())
    small = {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(STORE)}
    found = measured(recipe, tight, ray_folder, HELD, **small)
    print("\n" + "\n".join(f"{stage}: {wanted[stage]} roomy, {found[stage]} tight" for stage in STAGES))
    for stage in STAGES:
        assert_same(tight, roomy, stage)
    for stage in ("features", "pseudo_labels", "training", "evaluation"):
        assert found[stage]["spilled"] >= BLOCK, stage
        more = found[stage]["seconds"] - wanted[stage]["seconds"]
        spilled, restored = (found[stage][what] / 1e6 for what in ("spilled", "restored"))
        outcome = f"goes on: {spilled:.0f} MB spilled, {restored:.0f} MB read back"
        row("object store too small", stage, outcome, more, "nothing")
