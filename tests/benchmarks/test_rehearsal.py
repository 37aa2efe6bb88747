"""A rehearsal runs, is killed and resumes, at sizes at which its figures mean nothing; what they measure is tested."""

import json
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.refusals import refused
from transfgu.benchmarks import many_rows, rehearsal
from transfgu.benchmarks.processes import Command, Line, Memory, kind_of_title
from transfgu.recipe import preset

IMAGES, VALIDATION = 128, 8


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("ray::MapWorker(MapBatches(EncodeWindows)).submit", "EncodeWindows"),
        ("ray::MapBatches(ReadImages)", "ReadImages"),
        ("ray::KMeansActor.assign", "KMeansActor"),
        ("ray::IDLE", "IDLE"),
        ("/site-packages/ray/core/src/ray/raylet/raylet", "raylet"),
        ("", ""),
    ],
)
def test_kinds_of_processes(title: str, kind: str) -> None:
    assert kind_of_title(title) == kind


def test_peaks_are_of_the_largest_process_and_of_all_together() -> None:
    memory = Memory()
    memory.take({"driver": [5], "task": [3, 4]}, 10)
    memory.take({"driver": [6], "task": [1]}, 8)
    assert memory.by_kind == {"driver": 6, "task": 4}
    assert memory.processes == {"driver": 1, "task": 2}
    assert (memory.together, memory.object_store) == (12, 10)


ALLOCATES = """
import subprocess, sys, time
print("began", flush=True)
held = bytearray(50 << 20)
hold = "import time; held = bytearray(80 << 20); print('held', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
child.stdout.readline()
print("working\\rdone", flush=True)
time.sleep(float(sys.argv[1]))
child.kill()
"""


@pytest.mark.processes
def test_memory_and_lines_of_a_command_and_its_children() -> None:
    memory, lines = Memory(), list[str]()
    command = Command([sys.executable, "-c", ALLOCATES, "1"], memory, lambda line: lines.append(line.text), {})
    assert command.wait() == 0
    assert lines == ["began", "working", "done"]
    assert 50 << 20 < memory.by_kind["driver"] < 75 << 20
    assert 80 << 20 < max(size for kind, size in memory.by_kind.items() if kind != "driver") < 105 << 20
    assert memory.together > 130 << 20
    assert command.seconds > 1


@pytest.mark.processes
def test_a_killed_command_leaves_no_process() -> None:
    memory, working = Memory(), threading.Event()
    command = Command(
        [sys.executable, "-c", ALLOCATES, "60"], memory, lambda line: working.set() if line.text == "done" else None, {}
    )
    assert working.wait(30)
    while memory.together < 130 << 20:  # both have been seen
        time.sleep(0.1)
    started = time.monotonic()
    command.kill(patience=0.5)
    assert time.monotonic() - started < 20
    assert command.ended
    assert not command.living()


def test_when_a_resumed_stage_works() -> None:
    lines = [
        Line(1.0, "samples: complete already (136 images, 0.1 s at the time), skipped"),
        Line(2.0, "features: 64/128 images"),
        Line(3.0, "features: 96/128 images  8.0 images/s"),
        Line(4.0, "features: 128 images in 2.5 s"),
    ]
    assert rehearsal.worked_at(lines, 64) == 3.0
    assert rehearsal.worked_at(lines, 96) == 4.0
    assert rehearsal.ended_at(lines, "features") == 4.0


def test_too_few_images_are_refused() -> None:
    with refused("images-few"):
        rehearsal.rehearse(preset("coco-stuff-27"), 100, 4)


@pytest.mark.parametrize("on_disk", [False, True])
def test_many_rows_are_clustered(tmp_path: Path, capsys: pytest.CaptureFixture[str], on_disk: bool) -> None:
    assert many_rows.write_parts(tmp_path / "features", 3000).shape == (3000, many_rows.WIDTH)
    many_rows.main([str(tmp_path / "features"), "27", "3", str(int(on_disk))])
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["iterations"], found["on_disk"]) == (3000, 3, on_disk)
    assert found["peak_bytes"] > 0


@pytest.mark.long
@pytest.mark.ci_long
def test_a_process_of_its_own_clusters_many_rows(tmp_path: Path) -> None:
    recipe = preset("coco-stuff-27").with_fields({"iterations": 3})
    found = many_rows.measure(recipe, 30_000, str(tmp_path), on_disk=True)
    assert (found.rows, found.faiss_rows, found.iterations, found.on_disk) == (30_000, 30_000, 3, True)
    assert found.peak_own_bytes > 20 << 20
    assert json.loads(found.to_json())["ratio"] == found.ratio > 0
    assert not list(tmp_path.iterdir())


def test_too_few_rows_are_refused() -> None:
    with refused("flag-range --rows"):
        many_rows.measure(preset("coco-stuff-27"), 100)


@pytest.mark.ray
@pytest.mark.long
def test_a_rehearsal(tmp_path: Path) -> None:
    said: list[str] = []
    recipe = preset("coco-stuff-27").with_fields({"training.batch_size": 32, "iterations": 5})
    found = rehearsal.rehearse(recipe, IMAGES, VALIDATION, root=str(tmp_path), requests="echo 7", say=said.append)
    assert list(found.stages) == list(recipe.stages)
    assert {name: stage.images for name, stage in found.stages.items()} == {
        **dict.fromkeys(recipe.stages, IMAGES),
        "samples": IMAGES + VALIDATION,
        "evaluation": VALIDATION,
    }
    assert all(stage.requests == 0 for stage in found.stages.values())  # the server's count stays at 7
    assert found.stages["pseudo_labels"].files == IMAGES // 32 + 3  # parts, index, claim, manifest
    assert 0 < found.parts_at_kill <= IMAGES // 32
    assert 0 < found.resume_seconds < found.wall_seconds
    assert len(found.epoch_seconds) == len(found.score_share) == rehearsal.EPOCHS
    assert all(0 < share < 1 for share in found.score_share)
    assert {"driver", "EncodeWindows", "RayTrainWorker", "raylet"} <= set(found.memory.by_kind)
    assert found.memory.by_kind["driver"] > 50 << 20
    assert found.memory.object_store > 1 << 20
    assert json.loads(found.to_json())["images"] == IMAGES
    assert "| pseudo_labels |" in found.to_markdown()
    assert (tmp_path / "data" / "train" / f"{IMAGES - 1:012d}.jpg").exists()
    with refused("run-there"):
        rehearsal.rehearse(recipe, IMAGES, VALIDATION, root=str(tmp_path))
