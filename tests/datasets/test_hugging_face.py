"""Read a data set by `hf://` from a small server that answers like the Hub."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests import hub
from transfgu.datasets.shapes import scene

ROOT = Path(__file__).parents[2]


def png(index: int) -> bytes:
    found = io.BytesIO()
    Image.fromarray(scene(5, "train", index)[0]).save(found, "PNG")
    return found.getvalue()


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Serve six images in the image column of a Parquet file."""
    held = io.BytesIO()
    rows = [{"bytes": png(index), "path": f"{index}.png"} for index in range(6)]
    pq.write_table(pa.table({"image": rows}), held, row_group_size=4)
    with hub.serving(held.getvalue()) as url:
        yield url


@pytest.mark.ray
@pytest.mark.long
def test_images_of_a_data_set_on_the_hub_are_unpacked_unchanged(endpoint: str, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads `HF_ENDPOINT` when it is imported."""
    command = [sys.executable, "-m", "transfgu", "train", "folder", "--data", hub.URI]
    recipe = ["--things", "3", "--stuff", "2", "--encoder.name", "vit_shapes", "--until", "samples"]
    own = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *recipe, "--run", str(tmp_path / "run")],
        env={**os.environ, **own},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "run" / "samples" / "images").rglob("*.png"))
    assert [path.read_bytes() for path in files] == [png(index) for index in range(6)]
