"""The software of a node besides Ray: the image, its scripts, and the copying of its logs."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from transfgu.store import storage

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


@pytest.fixture(scope="module")
def ship_logs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ship_logs", CLUSTER / "ship_logs.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.processes
def test_the_dockerfile_is_clean_to_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert hadolint, "hadolint comes with the extra `dev`"
    done = subprocess.run([hadolint, str(CLUSTER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_runs_as_an_ordinary_user_and_caches_the_packages() -> None:
    lines = [line for line in (CLUSTER / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    assert lines.index("USER 1000:1000") < next(i for i, line in enumerate(lines) if "pip install" in line)
    assert not any(line.startswith("USER") for line in lines[lines.index("USER 1000:1000") + 1 :])
    packages = next(i for i, line in enumerate(lines) if "--constraint constraints.txt" in line)
    assert packages < lines.index("COPY --chown=ray transfgu transfgu")


@pytest.mark.processes
@pytest.mark.parametrize("script", ["environment.sh", "setup_node.sh", "ship_logs.sh", "spill_disk.sh"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(CLUSTER / script)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    """A blank disk of 64 MB."""
    (tmp_path / "disk").touch()
    os.truncate(tmp_path / "disk", 64 << 20)
    made = subprocess.run(
        ["losetup", "--find", "--show", str(tmp_path / "disk")], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    yield made.stdout.strip()
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="a disk is mounted by root alone")
@pytest.mark.skipif(not (shutil.which("losetup") and shutil.which("mkfs.ext4")), reason="no losetup, mkfs.ext4")
@pytest.mark.parametrize("in_use", [False, True])
def test_a_local_disk_is_spilled_to_and_keeps_what_is_on_it(disk: str, tmp_path: Path, in_use: bool) -> None:
    spill, elsewhere = tmp_path / "spill", tmp_path / "elsewhere"
    if in_use:  # as AWS's images have it
        elsewhere.mkdir()
        subprocess.run(["mkfs.ext4", "-q", disk], check=True)
        subprocess.run(["mount", disk, str(elsewhere)], check=True)
        (elsewhere / "kept").touch()
    try:
        subprocess.run(["bash", str(CLUSTER / "spill_disk.sh"), disk, str(spill)], check=True)
        (spill / "spilled").touch()
        subprocess.run(["bash", str(CLUSTER / "spill_disk.sh"), disk, str(spill)], check=True)
        assert spill.is_mount()
        assert {"spilled", *(["kept"] if in_use else [])} <= {p.name for p in spill.iterdir()}
    finally:
        for folder in (spill, elsewhere):
            subprocess.run(["umount", str(folder)], check=False, capture_output=True)


def test_logs_that_grew_are_copied_and_no_others(ship_logs: ModuleType, tmp_path: Path) -> None:
    folder, uri = tmp_path / "logs", str(tmp_path / "kept")
    (folder / "old").mkdir(parents=True)
    (folder / "a.log").write_text("one\n")
    (folder / "old" / "b.out").write_text("two\n")
    seen: dict[str, tuple[int, int]] = {}
    assert ship_logs.ship(folder, uri, seen) == 2
    assert ship_logs.ship(folder, uri, seen) == 0
    with (folder / "a.log").open("a") as file:
        file.write("three\n")
    (folder / "old" / "b.out").unlink()
    assert ship_logs.ship(folder, uri, seen) == 1
    assert storage.read_bytes(f"{uri}/a.log") == b"one\nthree\n"
    assert storage.read_bytes(f"{uri}/old/b.out") == b"two\n"  # outlives what wrote it


def test_of_a_huge_log_the_end_is_copied(ship_logs: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("beginning, end")
    ship_logs.ship(tmp_path, str(tmp_path / "kept"), {}, largest=4)
    assert (tmp_path / "kept" / "a.log").read_text() == " end"


@pytest.mark.processes
def test_logs_of_a_machine_that_is_taken_away_remain(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "raylet.out").write_text("here")
    command = [sys.executable, str(CLUSTER / "ship_logs.py"), str(tmp_path / "logs"), str(tmp_path / "kept"), "0.1"]
    shipping = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "kept" / "raylet.out").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        shipping.kill()
        shipping.wait()
    assert (tmp_path / "kept" / "raylet.out").read_text() == "here"
