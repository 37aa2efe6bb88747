"""Many images and many trials in one process: memory, descriptors, threads, files and the object store stay level.

A phase is divided into tenths of its duration, and the first tenth, in which processes start, is left out. The growth
per image is the median of the differences between successive tenths, so a single step, such as a pool that an allocator
adds once, is no growth; a leak is in every tenth.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

IMAGES, VALIDATION, TRIALS = 20_000, 500, 50
LIMIT = 2400  # seconds, on a busy machine
OF_RAY = {"gcs_server", "raylet", "python", "DashboardAgent", "RuntimeEnvAgent", "_StatsActor"}
OF_RAY |= {"_AutoscalingCoordinatorActor", "ActorLocationTracker"}
"""Kinds of Ray's own processes; the others are the driver, and processes that run this project's tasks and actors."""
MOMENTS = {"start": 2, "middle": 5, "end": 10}
"""Tenths of a phase that are printed."""
SHORTEST = 30.0
"""Seconds of the shortest phase that is checked."""

Sample = Mapping[str, Any]
Phase = tuple[Mapping[str, Any], list[Sample]]


def total(place: int, is_meant: Callable[[str], bool], unit: float = 1.0) -> Callable[[Sample], float]:
    """Return a function that adds up a column of the processes of some kinds in a measurement."""
    return lambda sample: sum(row[place] for row in sample["processes"].values() if is_meant(row[0])) / unit


def is_driver(kind: str) -> bool:
    return kind == "driver"


def is_rays(kind: str) -> bool:
    return kind in OF_RAY


def is_worker(kind: str) -> bool:
    return not is_driver(kind) and not is_rays(kind)


QUANTITIES: dict[str, tuple[Callable[[Sample], float], float, float | None]] = {
    "memory of the driver, MB": (total(1, is_driver, 1e6), 0.0008, 0.5),
    "memory of tasks and actors, MB": (total(1, is_worker, 1e6), 0.0008, None),
    "memory of Ray, MB": (total(1, is_rays, 1e6), 0.0008, 1.0),
    "descriptors of the driver": (total(2, is_driver), 0.005, 0.5),
    "descriptors of tasks and actors": (total(2, is_worker), 0.005, None),
    "descriptors of Ray": (total(2, is_rays), 0.005, None),
    "threads of the driver": (total(3, is_driver), 0.005, 0.5),
    "threads of tasks and actors": (total(3, is_worker), 0.005, None),
    "threads of Ray": (total(3, is_rays), 0.005, 0.5),
    "files of Ray": (lambda sample: sample["files"], 0.005, 80.0),
    "files of Ray, MB": (lambda sample: sample["bytes"] / 1e6, 0.0002, 0.2),
    "object store, MB": (lambda sample: sample["store"] / 1e6, 0.0008, 0.1),
}
"""How each is read, and the growth that is too much: per image, and per trial.

The processes of trials come and go, and with them Ray's connections to them. A trial leaves their logs.
"""


def phases_of(lines: list[dict[str, Any]]) -> dict[str, Phase]:
    """Return each phase, with the measurements during it."""
    samples = [line for line in lines if "phase" not in line]
    return {
        line["phase"]: (line, [s for s in samples if line["began"] <= s["seconds"] <= line["ended"]])
        for line in lines
        if "phase" in line
    }


def tenths(phase: Phase, read: Callable[[Sample], float]) -> dict[int, float]:
    """Return the median of a quantity in each tenth of the phase but the first."""
    about, samples = phase
    step = (about["ended"] - about["began"]) / 10
    found: dict[int, list[float]] = {tenth: [] for tenth in range(2, 11)}
    for sample in samples:
        tenth = min(10, 1 + int((sample["seconds"] - about["began"]) / step))
        if tenth in found:
            found[tenth].append(read(sample))
    return {tenth: statistics.median(values) for tenth, values in found.items()}


def growth(phase: Phase, read: Callable[[Sample], float]) -> float:
    """Return how much a quantity grows per image or trial."""
    grown = statistics.median(b - a for a, b in pairwise(tenths(phase, read).values()))
    return 10 * grown / int(phase[0]["count"])


def too_much(name: str, phase: Phase) -> list[str]:
    """Return the quantities that grow too much in a phase; prints all of them."""
    about, found = phase[0], []
    seconds = about["ended"] - about["began"]
    print(f"{name}: {about['count']} in {seconds:.0f} s, {about['count'] / seconds:.2f} per second")
    for quantity, (read, per_image, per_trial) in QUANTITIES.items() if seconds > SHORTEST else ():
        limit = per_trial if name == "search" else per_image
        levels, grown = tenths(phase, read), growth(phase, read)
        print(f"  {quantity}: {', '.join(f'{levels[t]:.1f} at the {m}' for m, t in MOMENTS.items())}; {grown:.2g} each")
        if limit is not None and grown > limit:
            found.append(f"{name}: {quantity} grows by {grown:.2g} each, more than {limit:g}")
    return found


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(LIMIT + 60)
def test_nothing_grows_with_images_or_trials(tmp_path: Path, ray_folder: Path) -> None:
    program = Path(__file__).with_name("soaked.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), *map(str, (IMAGES, VALIDATION, TRIALS))],
        env={**os.environ, "RAY_TMPDIR": str(ray_folder), "TMPDIR": str(ray_folder)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "soak.jsonl").read_text().splitlines()]
    phases = phases_of(lines)
    assert not [text for name, phase in phases.items() for text in too_much(name, phase)]
    _, samples = phases["rest"]
    kinds = {row[0] for row in samples[-1]["processes"].values() if row[1]}  # others have just ended
    assert kinds <= OF_RAY | {"driver", "IDLE"}  # no actor of an earlier phase
    assert not list(ray_folder.iterdir())


def flat(leak: Mapping[str, float]) -> Phase:
    """Return a phase of 20,000 images in 100 s, in which each quantity grows by so much per image, beside noise."""
    samples: list[Sample] = []
    for second in range(100):
        images, noise = 200 * second, second % 7
        memory, descriptors, threads = (leak.get(n, 0.0) * images for n in ("memory", "descriptors", "threads"))
        step = 4_000_000 * (second > 66)  # once
        rows = {
            "1": ["driver", 600e6 + memory + 1e4 * noise + step, 50 + int(descriptors) + noise % 2, 40 + int(threads)],
            "2": ["ReadImages", 140e6 + step, 44, 25],
            "3": ["raylet", 20e6, 90, 30],
        }
        store = 1e6 * noise + leak.get("store", 0.0) * images
        files = int(leak.get("files", 0.0) * images)
        samples.append({"seconds": second, "processes": rows, "files": files, "bytes": 200 * files, "store": store})
    return {"count": IMAGES, "began": 0.0, "ended": 100.0}, samples


def test_level_quantities_with_noise_and_a_step_pass() -> None:
    assert not too_much("features", flat({}))


@pytest.mark.parametrize(
    ("what", "each", "quantity"),
    [
        ("memory", 1024, "memory of the driver"),
        ("descriptors", 0.01, "descriptors of the driver"),
        ("threads", 0.01, "threads of the driver"),
        ("files", 0.01, "files of Ray"),
        ("store", 1024, "object store"),
    ],
)
def test_a_small_leak_is_found(what: str, each: float, quantity: str) -> None:
    """One KB per image, or one descriptor, thread or file per hundred images."""
    (text,) = too_much("features", flat({what: each}))
    assert quantity in text
