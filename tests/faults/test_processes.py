"""Killed processes and truncated files in every stage that they can affect."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import Reaper, assert_same, copy_until, history, part_hashes, row, timed_run
from tests.folder_run import photographs
from tests.method_run import recipe_of
from tests.refusals import refused
from transfgu import pipeline
from transfgu.store.artifacts import Run

pytestmark = [pytest.mark.long, pytest.mark.ray]


@pytest.mark.parametrize(
    ("fault", "stage", "pattern", "fields"),
    [
        pytest.param("actor killed", "features", "MapBatches(EncodeWindows)", {}, marks=pytest.mark.ci_long),
        ("task's worker killed", "features", "MapBatches(ReadImages)", {}),
        ("actor killed", "concepts", "ray::KMeansActor", {}),
        ("actor killed", "pseudo_labels", "MapBatches(MapConcepts)", {}),
        ("task's worker killed", "pseudo_labels", "MapBatches(WritePseudoLabels)", {}),
        pytest.param(
            *("one of two workers killed", "training", "ray::RayTrainWorker", {"compute.workers": 2}),
            marks=pytest.mark.ci_long,
        ),
        ("actor killed", "evaluation", "MapBatches(Count)", {}),
    ],
)
def test_a_process_that_dies(
    undisturbed: Undisturbed, tmp_path: Path, fault: str, stage: str, pattern: str, fields: dict[str, int]
) -> None:
    run = copy_until(undisturbed.run, tmp_path / "run", stage)
    # A worker of the training dies after its first epoch, so that there is something to go on from.
    first = tmp_path / "run" / "ray"
    with Reaper(pattern, lambda: stage != "training" or any(first.glob("*/checkpoint_*/digests.json"))) as reaper:
        seconds = timed_run(undisturbed.recipe.with_fields(fields), run, stage)
    assert pattern in reaper.killed
    assert_same(run, undisturbed.run, stage)
    row(fault, stage, "continues by itself", seconds - undisturbed.seconds[stage], "its work in hand")


@pytest.mark.parametrize("method", ["iic", "picie", "maskcontrast", "linear-head"])
def test_the_worker_of_a_method_of_comparison_that_dies(method: str, tmp_path: Path, ray_cluster: None) -> None:
    photographs(tmp_path)
    recipe = recipe_of(method, tmp_path, epochs=3, passes=4)
    wanted = Run(str(tmp_path / "undisturbed"))
    seconds = timed_run(recipe, wanted, "training")
    run = Run(str(tmp_path / "run"))
    pipeline.run_stages(recipe, run, until=recipe.stages[-3], quiet=True)
    begun = tmp_path / "run" / "ray"
    with Reaper("ray::RayTrainWorker", lambda: any(begun.glob("*/checkpoint_*/digests.json"))) as reaper:
        lost = timed_run(recipe, run, "training") - seconds
    assert "ray::RayTrainWorker" in reaper.killed
    assert history(run) == [1, 2, 3]
    assert_same(run, wanted, "training")
    row(f"worker killed, {method}", "training", "continues by itself", lost, "its work in hand")


@pytest.mark.parametrize("stage", [pytest.param("features", marks=pytest.mark.ci_long), "pseudo_labels"])
def test_a_part_cut_short_in_a_stage_that_was_stopped(undisturbed: Undisturbed, tmp_path: Path, stage: str) -> None:
    run = copy_until(undisturbed.run, tmp_path / "run", stage)
    shutil.copytree(undisturbed.run.file(stage), run.file(stage))
    Path(run.artifact(stage).file("manifest.json")).unlink()
    cut, *others = sorted(Path(run.file(stage)).glob("part-*"))
    cut.write_bytes(cut.read_bytes()[:-50])
    before = {p: p.stat().st_mtime_ns for p in others}
    seconds = timed_run(undisturbed.recipe, run, stage)
    assert {p: p.stat().st_mtime_ns for p in others} == before
    assert_same(run, undisturbed.run, stage)
    row("part cut short, before the stage's end", stage, "made anew when run again", seconds, "that part")


@pytest.mark.parametrize(
    ("stage", "reader"),
    [pytest.param("features", "concepts", marks=pytest.mark.ci_long), ("pseudo_labels", "training")],
)
def test_a_part_cut_short_in_a_finished_stage(
    undisturbed: Undisturbed, tmp_path: Path, stage: str, reader: str
) -> None:
    run = copy_until(undisturbed.run, tmp_path / "run", reader)
    cut = sorted(Path(run.file(stage)).glob("part-*"))[1]
    cut.write_bytes(cut.read_bytes()[:-50])
    with refused(f"file-damaged {cut.name} manifest.json"):
        timed_run(undisturbed.recipe, run, reader)
    cut.unlink()
    Path(run.artifact(stage).file("manifest.json")).unlink()
    seconds = timed_run(undisturbed.recipe, run, stage)
    assert_same(run, undisturbed.run, stage)
    row("part cut short, after the stage's end", stage, "one line says what to delete", seconds, "that part")


@pytest.mark.ci_long
def test_the_last_checkpoint_cut_short(
    undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_until(undisturbed.run, tmp_path / "run", "training")
    shutil.copytree(undisturbed.run.file("ray"), run.file("ray"))
    newest = max(Path(run.file("ray")).glob("*/checkpoint_2*"))  # they are named by their time
    student = newest / "student.safetensors"
    student.write_bytes(student.read_bytes()[:-50])
    account = newest.parent / "checkpoint_manager_snapshot.json"  # Ray's own
    account.write_text(account.read_text()[:-100])
    started = time.monotonic()
    pipeline.run_stages(undisturbed.recipe, run, until="training")
    told = "".join(capsys.readouterr())
    assert told.count(" is damaged: continuing from the previous one") == 1
    assert f"checkpoint {newest.name} is damaged" in told
    assert "epoch 3 of" not in told
    assert "epoch 4 of 4" in told
    assert_same(run, undisturbed.run, "training")
    seconds = time.monotonic() - started
    with capsys.disabled():
        row("checkpoint cut short", "training", "continues from the previous checkpoint", seconds, "one epoch of 4")


@pytest.mark.ci_long
def test_the_state_of_kmeans_cut_short(undisturbed: Undisturbed, tmp_path: Path) -> None:
    run = copy_until(undisturbed.run, tmp_path / "run", "concepts")
    run.artifact("concepts").begin(undisturbed.run.recipe())
    (tmp_path / "run" / "concepts" / "state-concepts.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    seconds = timed_run(undisturbed.recipe, run, "concepts")
    assert_same(run, undisturbed.run, "concepts")
    lost = seconds - undisturbed.seconds["concepts"]
    row("K-Means' state cut short", "concepts", "begins anew", lost, "the iterations")


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of a certain size is mounted by root alone")
@pytest.mark.parametrize(
    ("stage", "kilobytes"),
    [("features", 150), ("concepts", 16), ("pseudo_labels", 60), ("training", 500), ("evaluation", 16)],
)
def test_a_full_disk(undisturbed: Undisturbed, tmp_path: Path, stage: str, kilobytes: int) -> None:
    mounted = tmp_path / "disk"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(mounted)], check=True)
    try:
        run = copy_until(undisturbed.run, mounted / "run", stage)
        used = sum(f.stat().st_blocks // 2 for f in mounted.rglob("*") if f.is_file())
        subprocess.run(["mount", "-o", f"remount,size={used + kilobytes}k", str(mounted)], check=True)
        with refused("disk-full"):
            timed_run(undisturbed.recipe, run, stage)
        before = part_hashes(run, stage)
        subprocess.run(["mount", "-o", "remount,size=64m", str(mounted)], check=True)
        seconds = timed_run(undisturbed.recipe, run, stage)
        assert_same(run, undisturbed.run, stage)
        whole = "the epochs without a checkpoint" if stage == "training" else "the stage"
        repeated = f"none of the {len(before)} parts that were there" if before else whole
        row("disk full, then room made", stage, "one line; run again it goes on", seconds, repeated)
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)
