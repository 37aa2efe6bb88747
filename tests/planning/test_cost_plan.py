"""Plans whose figures hold by hand."""

import pytest

from tests.planning.test_measurements import measurements, timing
from tests.refusals import refused
from transfgu.planning.cost_plan import Site, costs, shown
from transfgu.planning.measurements import Measurements
from transfgu.recipe import preset

RECIPE = preset("coco-stuff-27").with_fields({"encoder.name": "tiny", "epochs": 10})
SITE = Site(gpus=4, cpus_per_gpu=2.0, store=1.0, network=3.0)


def found() -> Measurements:
    kept = {"windows an image": 60.0, "bytes an image": 1000.0}
    return measurements(
        timing("features", ours=(8.0,), bound=(7.0,), details=kept),  # 2 s an image
        timing("concepts, one worker", items=10**6, ours=(1.0,), bound=(1.0,)),
        timing("pseudo-labels", details={"bytes an image": 500.0, "reading [s an image and core]": 0.001}),
        timing("training", ours=(4.0,)),  # 1 s an image
        timing("evaluation", ours=(1.0,)),
        **{"file bytes": 1e6, "features decoding": 0.5, "pseudo-labels decoding": 0.25, "training decoding": 0.2},
    )


def test_a_stage_needs_what_its_images_need() -> None:
    features, concepts, _, training, scoring = costs(RECIPE, found(), 100, 40)
    assert (features.device, features.decode) == (200.0, 50.0)
    assert (features.read, features.written) == (100 * 1e6, 100 * 1000)
    assert features.network == 100 * 3 * 640 * 640
    assert concepts.device == pytest.approx(100 * 60 * 100 / 1e6)  # windows, iterations, rows a second
    assert training.device == pytest.approx(1000.0)
    assert training.decode == pytest.approx(1000 * 0.201)
    assert training.read == pytest.approx(1000 * (1e6 + 500))
    assert scoring.device == pytest.approx(100.0)  # 40 images, ten times, a quarter of a second each


def test_the_bottleneck_moves_from_devices_to_the_store() -> None:
    features = costs(RECIPE, found(), 100_000, 40)[0]
    assert features.bottleneck(SITE) == ("GPU", 50_000.0)
    assert features.bottleneck(Site(gpus=4, cpus_per_gpu=0.1)) == ("decode", 125_000.0)
    name, seconds = features.bottleneck(Site(gpus=4096, network=100.0))
    assert name == "store"
    assert seconds == pytest.approx(100 * 1.001)


def test_the_plan_names_every_stage_and_how_it_moves() -> None:
    text = shown(RECIPE, found(), SITE, 100_000, 5000)
    for stage in ("features", "concepts", "pseudo-labels", "training", "evaluation"):
        assert f"\n{stage}" in text
    assert "assumed: GPUs divide a stage's time by their number." in text
    assert "unless each GPU comes with the 2 measured." in text
    lines = [line.split() for line in text.splitlines()]
    moves = {line[0]: float(line[1]) for line in lines if line and line[0].isdigit()}
    assert list(moves) == ["1", "2", "4", "8"]
    assert moves["1"] == pytest.approx(2 * moves["2"], rel=0.01)


def test_measurements_of_another_encoder_are_refused() -> None:
    with refused("measurements-mismatch tiny vit_small_patch8_224"):
        costs(preset("coco-stuff-27"), found(), 1, 1)
    with refused("flag-range"):
        Site(gpus=0)
