"""The report of a GPU from parts that succeed, fail, or take too long, and from the files that they write."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning.test_measurements import measurements, timing
from transfgu.benchmarks import gpu
from transfgu.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LOG = """\
tests/gpu/test_a.py::test_one PASSED                      [ 25%]
tests/gpu/test_a.py::test_two[bfloat16-0.1] FAILED        [ 50%]
tests/gpu/test_a.py::test_three SKIPPED (torch finds no GPU) [ 75%]
"""


def part(name: str, code: str, limit: float = 60.0, found: dict[str, Any] | None = None) -> gpu.Part:
    return gpu.Part(name=name, command=[sys.executable, "-c", code], limit=limit, read=lambda: found or {})


@pytest.mark.processes
def test_each_part_leaves_its_results_whatever_becomes_of_it(tmp_path: Path) -> None:
    said: list[str] = []
    parts = [
        part("good", "print('hello')", found={"tests": {"passed": 2}, "not passed": []}),
        part("bad", "raise SystemExit(3)"),
        part("slow", "import time; print('begun', flush=True); time.sleep(600)", limit=1.0),
    ]
    started = time.monotonic()
    found = gpu.report(parts, CPU, tmp_path, said.append)
    assert time.monotonic() - started < 60
    assert [row["status"] for row in found["parts"]] == ["done", "failed", "ended after its limit"]
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    assert found["device"]
    assert found["date"]
    assert (tmp_path / "good.log").read_text() == "hello\n"
    assert "2 passed" in (tmp_path / "gpu.md").read_text()
    assert len(said) == 6


def test_tests_are_counted_while_they_run(tmp_path: Path) -> None:
    assert gpu.read_tests(tmp_path / "tests.log") == {}
    (tmp_path / "tests.log").write_text(LOG)
    assert gpu.read_tests(tmp_path / "tests.log") == {
        "tests": {"passed": 1, "failed": 1, "skipped": 1, "error": 0},
        "not passed": ["tests/gpu/test_a.py::test_two[bfloat16-0.1]"],
    }


def test_timings_become_paces_and_shares_of_the_matrix_product(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    assert gpu.read_measurements(file) == {}
    file.write_text(measurements(timing(), timing("training", flops=0.0)).to_json())
    found = gpu.read_measurements(file)
    one, other = found["lines"]
    # 4 images in 3 s, and 6e9 operations in as many, of 4e9 a second.
    assert one["per second"] == pytest.approx(4 / 3, abs=1e-3)
    assert one["model FLOP utilisation"] == 0.5
    assert other["model FLOP utilisation"] is None
    text = gpu.markdown({"device": "a", "date": "b", "torch": "c", "cuda": None, "parts": [row(found)]})
    assert "| features | 1.3 images | 50% |" in text


def row(found: dict[str, Any]) -> dict[str, Any]:
    return {"name": "arithmetic", "status": "done", "seconds": 1.0, **found}


def test_arithmetic_is_written_line_by_line(tmp_path: Path) -> None:
    gpu.measure_arithmetic(CPU, tmp_path / "arithmetic.json")
    lines = gpu.read_measurements(tmp_path / "arithmetic.json")["lines"]
    assert [line["what"] for line in lines] == [
        "training step, 4 views, K = 27",
        "encoder forward, evaluation's size",
        "concept maps, K = 27",
        "counting, a batch at a time",
        "training step, 4 views, K = 27, float32",
        "training step, 4 views, K = 171",
        "concept maps, K = 171",
        "K-Means, one worker",
    ]


def test_a_device_that_is_not_there_or_unknown_is_refused() -> None:
    with pytest.raises(UserError) as error:
        gpu.choose_device("tpu")
    assert error.value.code == "device-unknown"
    assert gpu.choose_device("cpu") == CPU
    if not torch.cuda.is_available():
        with pytest.raises(UserError) as error:
            gpu.choose_device("cuda")
        assert error.value.code == "gpu-missing"


@pytest.mark.long
@pytest.mark.ci_long
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_command_says_so_and_ends_with_status_2(tmp_path: Path) -> None:
    command = ["make", "gpu", f"PYTHON={sys.executable}", f"OUT={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "[gpu-missing]" in done.stderr.splitlines()[0]
    assert not (tmp_path / "out").exists()
