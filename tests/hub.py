"""Serve one data set as the Hub of Hugging Face does, as far as huggingface_hub asks."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

FILE = "data/train-00000-of-00001.parquet"
URI = "hf://datasets/birds/small"


@contextlib.contextmanager
def serving(data: bytes) -> Iterator[str]:
    """Serve the data set `birds/small`, whose only file has these bytes; yields the endpoint's URL."""
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
