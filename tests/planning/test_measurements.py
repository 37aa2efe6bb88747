"""Turns, medians and the table of measurements, by hand."""

import subprocess
import sys

import pytest

from tests.refusals import refused
from transfgu.planning.measurements import Measurements, Timing, aligned, in_turns


def timing(stage: str = "features", items: int = 4, **changes: object) -> Timing:
    given: dict[str, object] = {
        "bound_is": "a forward",
        "unit": "images",
        "ours": (5.0, 2.0, 3.0),
        "bound": (2.0, 8.0, 1.0),
        "peak_bytes": 2**30,
        "flops": 6e9,
    }
    return Timing(stage=stage, items=items, **{**given, **changes})  # type: ignore[arg-type]


def measurements(*timings: Timing, **costs: float) -> Measurements:
    return Measurements(
        preset="coco-stuff-27",
        encoder="tiny",
        device="a device",
        precision="float32",
        date="2026-01-02",
        cores=2,
        matmul_flops=4e9,
        timings=timings,
        costs=costs,
    )


def test_the_two_take_turns_and_the_first_does_not_count() -> None:
    calls = []
    numbers = iter(range(100))

    def turn(who: str) -> float:
        calls.append(who)
        return float(next(numbers))

    ours, bound = in_turns(lambda: turn("ours"), lambda: turn("bound"), 2)
    assert calls == ["ours", "bound"] * 3
    assert (ours, bound) == ((2.0, 4.0), (3.0, 5.0))
    assert in_turns(lambda: turn("ours"), lambda: turn("bound"), 1, warm=True) == ((6.0,), (7.0,))


def test_a_ratio_is_of_medians() -> None:
    assert timing().seconds == 3.0
    assert timing().ratio == 1.5


def test_the_table_shows_what_was_found() -> None:
    found = measurements(timing(details={"windows an image": 7.5}))
    _, _, line, note = found.table().splitlines()
    assert line.split()[:7] == ["features", "3.000", "s", "2.000", "s", "1.500", "1.00"]
    assert "50%" in line  # 6e9 operations in 3 s, of 4e9 a second
    assert note == "features: windows an image 7.5"
    assert aligned([["a", "10"], ["bcd", "2"]]) == ["a    10", "bcd  2"]


def test_measurements_are_read_back_as_they_were() -> None:
    found = measurements(timing(), timing("training", flops=0.0), **{"file bytes": 3.0})
    assert Measurements.from_json(found.to_json()) == found
    assert found.timing("training").flops == 0
    with refused("measurements-missing evaluation"):
        found.timing("evaluation")
    for text in ("{}", "[1]", "no JSON"):
        with refused("measurements-damaged"):
            Measurements.from_json(text)


@pytest.mark.processes
def test_a_plan_needs_no_torch() -> None:
    code = "import sys, transfgu.planning.cost_plan; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
