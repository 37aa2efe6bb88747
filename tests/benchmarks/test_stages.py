"""The real stages are timed at sizes at which figures mean nothing; what they measure is tested."""

from pathlib import Path

import pytest

from tests.benchmarks.test_arithmetic import tiny_recipe
from tests.refusals import refused
from transfgu.benchmarks import stages
from transfgu.planning import cost_plan
from transfgu.planning.measurements import Measurements

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ci_long
@pytest.mark.long
@pytest.mark.ray
def test_stages_are_timed_beside_their_bounds(tmp_path: Path, ray_cluster: None) -> None:
    # Ray Data looks for what is done every tenth of a second: a batch of the evaluation must take longer.
    recipe = tiny_recipe(tmp_path).with_fields({"min_background": 0.55, "image_size": (512, 512)})
    found = stages.measure(recipe, ["features", "evaluation"], images=3, repeats=1, rows=100)
    features, scoring = found.timings
    assert (features.stage, features.items, scoring.stage) == ("features", 3, "evaluation")
    windows = features.details["windows an image"] * 3
    assert windows == round(windows) > 0
    assert features.bound_is == f"bare forwards: {windows:g} of 32 x 32, 3 of 128 x 128"
    assert scoring.bound_is == "bare forwards: 3 of 512 x 512"
    assert scoring.details["counting [images/s]"] > 1
    assert scoring.ratio > 0.5  # the forwards of a batch are in it
    for timing in found.timings:
        assert timing.seconds > 0
        assert timing.flops > 0
        assert timing.peak_bytes > 50 << 20  # a process with torch in it
    assert found.costs["file bytes"] > 1000
    assert 0 < found.costs["training decoding"] < 1


@pytest.mark.ray
@pytest.mark.long
def test_from_measurements_to_a_plan(tmp_path: Path, ray_cluster: None) -> None:
    recipe = tiny_recipe(tmp_path).with_fields({"iterations": 5})
    found = stages.measure(recipe, stages.STAGES, images=2, repeats=1, rows=3000)
    assert [t.stage for t in found.timings] == [
        "features",
        "concepts, one worker",
        "concepts, two workers",
        "concept maps",
        "pseudo-labels",
        "training step",
        "training",
        "evaluation",
    ]
    assert len(found.timing("training").ours) == 1  # the first epoch has no teacher
    assert found.timing("pseudo-labels").details["bytes an image"] > 2 * 6 * 8 * 8
    rates = cost_plan.measured_rates(recipe, Measurements.from_json(found.to_json()))
    text = cost_plan.shown(recipe, rates, cost_plan.Site(gpus=8), 118_287, 5000)
    assert "118287 images, 8 x" in text


def test_a_stage_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with refused("stage-unknown speed features"):
        stages.measure(tiny_recipe(tmp_path), ["speed"], images=1, repeats=1, rows=1)
