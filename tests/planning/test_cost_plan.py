"""Plans with figures derived by hand."""

import pytest

from tests.planning.test_measurements import measurements, timing
from transfgu.errors import UserError
from transfgu.planning.cost_plan import STREAMED_REQUESTS, Cost, Rates, Site, costs, measured_rates, shown, total
from transfgu.planning.measurements import Ingest, Measurements
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


def rates(ingest: Ingest | None = None) -> Rates:
    return measured_rates(RECIPE, found(), ingest)


def test_a_stage_needs_what_its_images_need() -> None:
    features, concepts, maps, training, between, scoring = costs(RECIPE, rates(), 100, 40)
    assert (features.device, features.decode) == (200.0, 50.0)
    assert (features.read, features.written) == (100 * 1e6, 100 * 1000)
    assert (features.gets, features.puts) == (100, 4)  # a request per image, parts of 32
    assert features.network == 100 * 3 * 640 * 640
    assert concepts.device == pytest.approx(100 * 60 * 100 / 1e6)  # windows, iterations, rows a second
    assert maps.written == 100 * 500
    assert training.device == pytest.approx(1000.0)
    assert training.decode == pytest.approx(1000 * 0.201)
    assert training.read == pytest.approx(1000 * (1e6 + 500))
    assert training.gets == STREAMED_REQUESTS * 1000
    assert between.device == pytest.approx(100.0)  # 40 images, ten times, a quarter of a second each
    assert scoring.device == pytest.approx(10.0)


def test_a_cache_is_filled_once_and_copied_out_of_afterwards() -> None:
    cached = Ingest(
        samples_per_second_per_core=2000.0,
        first_epoch_requests_per_sample=1.2,
        requests_per_sample=0.0,
        bytes_per_sample=0.0,
    )
    training = costs(RECIPE, rates(cached), 100, 40)[3]
    assert training.decode == pytest.approx(100 * 0.201 + 1000 / 2000)
    assert training.gets == pytest.approx(120.0)
    assert training.read == pytest.approx(100 * (1e6 + 500))


def test_the_bottleneck_moves_from_devices_to_the_store() -> None:
    features = costs(RECIPE, rates(), 100_000, 40)[0]
    assert features.bottleneck(SITE) == ("GPU", 50_000.0)
    assert features.bottleneck(Site(gpus=4, cpus_per_gpu=0.1)) == ("decode", 125_000.0)
    name, seconds = features.bottleneck(Site(gpus=4096, network=100.0))
    assert name == "store"
    assert seconds == pytest.approx(100 * 1.001)


def test_dollars_are_machines_requests_and_bytes() -> None:
    cost = Cost(stage="a", device=7200.0, read=3e9, gets=2e6, puts=5e4)
    site = Site(gpus=2, gpu_hour=1.5, get=0.0004, put=0.005, gigabyte=0.02)
    # An hour of two devices; 2,000 thousand reads and 50 thousand writes; 3 GB.
    assert cost.dollars(site) == {
        "machines": pytest.approx(3.0),
        "requests": pytest.approx(0.8 + 0.25),
        "bytes": pytest.approx(0.06),
    }
    assert total([cost, cost], site) == pytest.approx((7200.0, 2 * 4.11))


def test_the_plan_names_every_stage_and_how_it_moves() -> None:
    text = shown(RECIPE, rates(), SITE, 100_000, 5000)
    for stage in ("features", "concepts", "pseudo-labels", "training", "scores between epochs", "evaluation"):
        assert f"\n{stage}" in text
    assert "a device (float32, measured 2026-01-02)" in text
    assert "ingest: not measured" in text
    lines = [line.split() for line in text.partition("by the number of GPUs:")[2].splitlines()]
    moves = {line[0]: float(line[1]) for line in lines if line and line[0].isdigit()}
    assert list(moves) == ["1", "4", "8", "64"]
    assert moves["4"] == pytest.approx(2 * moves["8"], rel=0.01)


def test_measurements_of_another_encoder_and_bad_sites_are_refused() -> None:
    with pytest.raises(UserError) as error:
        measured_rates(preset("coco-stuff-27"), found())
    assert error.value.code == "measurements-mismatch"
    for arguments in ({"gpus": 0}, {"gpus": 1, "gpu_hour": -1.0}):
        with pytest.raises(UserError) as error:
            Site(**arguments)
        assert error.value.code == "flag-range"


def test_the_ingests_file_is_read_or_refused() -> None:
    text = (
        '{"samples_per_second_per_core": 1500, "first_epoch_requests_per_sample": 1.1, "requests_per_sample": 0, '
        '"bytes_per_sample": 0, "more": 1}'
    )
    assert Ingest.from_json(text, "a.json").where == "from the node's cache (a.json)"
    for bad in ("{}", "no JSON", text.replace("1500", "0")):
        with pytest.raises(UserError) as error:
            Ingest.from_json(bad, "a.json")
        assert error.value.code == "measurements-damaged"
