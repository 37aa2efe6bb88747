"""Read a data set by `hf://` from a small server that answers like the Hub, as far as huggingface_hub asks."""

import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from transfgu.datasets.shapes import scene

ROOT = Path(__file__).parents[2]
FILE = "data/train-00000-of-00001.parquet"


def png(index: int) -> bytes:
    found = io.BytesIO()
    Image.fromarray(scene(5, "train", index)[0]).save(found, "PNG")
    return found.getvalue()


@pytest.fixture
def hub() -> Iterator[str]:
    """Serve the data set `birds/small`: six images in the image column of a Parquet file."""
    held = io.BytesIO()
    rows = [{"bytes": png(index), "path": f"{index}.png"} for index in range(6)]
    pq.write_table(pa.table({"image": rows}), held, row_group_size=4)
    data = held.getvalue()
    about = {"id": "birds/small", "sha": "c" * 40, "siblings": [{"rfilename": FILE}]}
    folder = {"type": "directory", "path": "data", "size": 0, "oid": "b" * 40}
    file = {"type": "file", "path": FILE, "size": len(data), "oid": "a" * 40}

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

        def do_GET(self) -> None:
            path = urlparse(self.path).path
            answers = {
                "/api/datasets/birds/small": about,
                "/api/datasets/birds/small/revision/main": about,
                "/api/datasets/birds/small/tree/main": [folder],
                "/api/datasets/birds/small/tree/main/data": [file],
            }
            body, code = json.dumps(answers.get(path, {})).encode(), 200 if path in answers else 404
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if path == f"/datasets/birds/small/resolve/main/{FILE}" and asked:
                body, code = data[int(asked[1]) : int(asked[2]) + 1], 206
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.ci_long
def test_images_of_a_data_set_on_the_hub_are_unpacked_unchanged(hub: str, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads `HF_ENDPOINT` when it is imported."""
    command = [sys.executable, "-m", "transfgu", "train", "folder", "--data", "hf://datasets/birds/small"]
    recipe = ["--things", "3", "--stuff", "2", "--encoder.name", "vit_shapes", "--until", "samples"]
    own = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)}
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
