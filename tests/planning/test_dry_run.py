"""A dry run describes the work of a run beforehand, with the numbers that the run then has."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from ray.data import Dataset

from tests.folder_run import photographs, small
from tests.refusals import refused
from transfgu import pipeline
from transfgu.methods import METHODS
from transfgu.planning import dry_run
from transfgu.recipe import Recipe, preset
from transfgu.runtime import parts
from transfgu.stages import features, pseudo_labels
from transfgu.store.artifacts import Run


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Six images of 8 x 8 patches, with nine windows per image: 4 x 4 patches in steps of 2."""
    photographs(tmp_path)
    return small(tmp_path, **{"windows.scales": (0.5,), "passes": 2})


LINES = [
    "data     6 training images, 6 for validation, 6 of them labelled",
    "samples: list 6 and 6 images",
    # Class tokens of 24 numbers of 4 bytes.
    "features: encode up to 54 windows of 32x32 pixels, 9 per image; 5.2 kB to write",
    "  Input > ReadImages (tasks) > EncodeWindows (actors) > WriteFeatures (tasks)",
    "concepts: K-Means into 0 and 2 clusters, at most 100 iterations; 192 bytes to write",
    # The two maps and two planes more, of 2 bytes a patch.
    "pseudo_labels: 2 maps of 8x8 patches for each of 6 images; 3.1 kB to write",
    "  Input > ReadImages (tasks) > MapConcepts (actors) > WritePseudoLabels (tasks)",
    # Six images, twice each, in batches of four.
    "training: 2 epochs of 3 steps of 4 images, 6 steps in total; 6 images to score every epoch; 14 kB to write",
    "evaluation: score 6 images (12 images in all during training)",
]
"""Lines for the recipe above, without times and without the lines of the machine and the total."""


def without_times(told: list[str]) -> list[str]:
    return [line.partition("; about")[0] for line in told[2:3] + told[4:-1]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="Ray counts the GPUs of a machine that has some")
@pytest.mark.processes
def test_one_machine_is_described_without_ray(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    code = "import ray, sys; from transfgu.cli import train; train.main(sys.argv[1:]); print(ray.is_initialized())"
    done = subprocess.run(
        [sys.executable, "-c", code, "--recipe", tmp_path / "recipe.yaml", "--run", tmp_path / "run", "--dry-run"],
        env={name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "TRANSFGU_NODES")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *told, started = done.stdout.splitlines()
    assert started == "False"
    assert without_times(told) == LINES
    # As many as an embedded cluster has.
    cores = os.cpu_count() or 1
    cpus = max(4, 2 * cores)
    assert told[3] == (
        f"machine  1 node, {cores} core{'s' * (cores > 1)} ({cpus} CPUs for Ray), 0 GPUs: up to 1 encoder actor, "
        "1 training worker, each holding 1 CPU and 0 GPUs"
    )


def in_rays_words(data: Dataset) -> list[str]:
    """Return the physical operators of a plan in the order in which Ray would execute them."""
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


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_operators_are_those_that_ray_would_execute(recipe: Recipe) -> None:
    one = parts.split(pa.table({"index": pa.array([0], pa.int32()), "name": ["x"], "image": ["x"]}), 1)
    centroids = np.zeros((2, 24), np.float32)
    assert in_rays_words(features.plan(recipe, one, "")) == features.planned_work(recipe, "").operators
    named = pseudo_labels.planned_work(recipe, centroids, "").operators
    assert in_rays_words(pseudo_labels.plan(recipe, one, centroids, "")) == named


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_counts_are_those_of_the_run_that_follows(tmp_path: Path, recipe: Recipe) -> None:
    run = Run(str(tmp_path / "run"))
    told = list(dry_run.describe(recipe, run))
    assert without_times(told) == LINES
    assert re.match(r"in total \d+ kB to write, about .* in the encoder, timed on this cpu\.", told[-1])
    assert list(Path(run.uri).iterdir()) == []

    metrics = pipeline.run_stages(recipe, run, until="features", quiet=True)
    assert sum(metrics["stages"]["features"]["windows"].values()) == 54
    again = list(dry_run.describe(recipe, run))
    assert again[2] == told[2]
    assert again[4:6] == [f"{stage}: complete already, skipped" for stage in ("samples", "features")]
    assert again[6] == told[7].partition("; about")[0]

    with refused("cluster-too-small 1000"):
        next(dry_run.describe(recipe.with_fields({"workers": 1000}), run))
    with refused("recipe-mismatch windows.scales"):
        next(dry_run.describe(recipe.with_fields({"windows.scales": (0.25,)}), run))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_scenes_are_counted_before_they_are_drawn(tmp_path: Path) -> None:
    recipe = preset("shapes").with_fields({"limit": 10})
    told = list(dry_run.describe(recipe, Run(str(tmp_path / "run")), until="samples"))
    assert told[2] == "data     10 training images, 10 for validation, 10 of them labelled"
    assert told[4] == "samples: list 10 and 10 images"
    assert told[5].startswith("in total 0 bytes to write")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("method", ["iic", "token-kmeans"])
def test_times_of_a_method_of_comparison_are_said_to_be_unknown(method: str, tmp_path: Path) -> None:
    told = list(dry_run.describe(preset("shapes", method), Run(str(tmp_path / "run"))))
    assert METHODS[method].title in told[-1]
    assert "not known" in told[-1]


@pytest.mark.parametrize(
    ("count", "shown"), [(12, "12 bytes"), (1500, "1.5 kB"), (25 * 10**6, "25 MB"), (3 * 10**16, "30000 TB")]
)
def test_bytes_are_written_in_two_figures_or_more(count: int, shown: str) -> None:
    assert dry_run.in_bytes(count) == shown
