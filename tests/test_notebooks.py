"""Execute the notebooks of the documents in an empty folder."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {  # pictures, and files that are there at the end
    "cluster": (0, ("run/report.html",)),
    "own_images": (3, ("run/report.html", "run/names.yaml", "masks/cvat.xml")),
    "reading_a_run": (2, ("run/metrics.json",)),
}


def read(name: str) -> Any:
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_notebooks_are_stored_without_outputs() -> None:
    assert {path.stem for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")} == set(NOTEBOOKS)
    for name in NOTEBOOKS:
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in read(name).cells), name


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.ci_long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that fails in `%%bash` raises; one that fails after `!` is seen by its line in what is printed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", os.pathsep.join([str(commands(tmp_path)), os.environ["PATH"]]))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "180")  # 30 may be too short on a busy machine
    work = tmp_path / "work"
    work.mkdir()
    notebook = read(name)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(work)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "transfgu: error" not in printed, printed
    pictures, files = NOTEBOOKS[name]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
    assert [file for file in files if not (work / file).exists()] == []


def commands(folder: Path) -> Path:
    """Return a folder with the command `transfgu` of this clone; another version may be installed."""
    found = folder / "bin"
    found.mkdir()
    (found / "transfgu").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m transfgu "$@"\n')
    (found / "transfgu").chmod(0o755)
    return found
