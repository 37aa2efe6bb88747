"""A dry run describes the work of a run beforehand, with the numbers that the run then has."""

import re
from pathlib import Path

import pytest

from tests.folder_run import photographs, small
from tests.refusals import refused
from transfgu import pipeline
from transfgu.methods import METHODS
from transfgu.planning import dry_run
from transfgu.recipe import Recipe, preset
from transfgu.store.artifacts import Run


@pytest.fixture
def recipe(tmp_path: Path, ray_cluster: None) -> Recipe:
    """Six images of 8 x 8 patches, with nine windows per image: 4 x 4 patches in steps of 2."""
    photographs(tmp_path)
    return small(tmp_path, **{"windows.scales": (0.5,), "passes": 2})


@pytest.mark.ray
def test_counts_are_those_of_the_run_that_follows(tmp_path: Path, recipe: Recipe) -> None:
    run = Run(str(tmp_path / "run"))
    told = list(dry_run.describe(recipe, run))
    assert [line.partition("; about")[0] for line in told[2:3] + told[4:-1]] == [
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
        "training: 2 epochs of 3 steps of 4 images, 6 steps in total; 6 images are scored every epoch; 14 kB to write",
        "evaluation: score 6 images (12 images are scored during training)",
    ]
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
