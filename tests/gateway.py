"""A gateway in front of an S3 server that answers some requests itself, with a fault.

The test selects them: the next few, or those that a function selects. Every request is recorded.
"""

import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

HANG_UP = 0
HANG = -1
HANG_SECONDS = 120.0  # longer than any client waits


class Asked(NamedTuple):
    """A received request."""

    line: str
    """Method and path, such as `PUT /bucket/key`."""
    fault: int | None
    """The status of the gateway's own answer, `HANG_UP`, `HANG` (no answer), or None if the server answered."""


class Gateway:
    """Forwards requests to the server at `target`, except those that it answers with a fault."""

    def __init__(self, target: str) -> None:
        self.pending: list[int] = []
        """Faults of the next requests: a status, `HANG_UP` or `HANG`."""
        self.fault: Callable[[str], int | None] = lambda line: None
        """Called for each other request with its line."""
        self.unknown: frozenset[str] = frozenset()
        """Headers, in lower case, that are not forwarded, so that the server acts as one without them."""
        self.asked: list[Asked] = []
        self.closed = threading.Event()
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                line = f"{self.command} {self.path}"
                fault = gateway.pending.pop(0) if gateway.pending else gateway.fault(line)
                gateway.asked.append(Asked(line, fault))
                if fault is not None:
                    self._fail(fault)
                    return
                upstream = http.client.HTTPConnection(urlsplit(target).netloc)
                headers = {name: value for name, value in self.headers.items() if name.lower() not in gateway.unknown}
                upstream.request(self.command, self.path, body, headers)
                answer = upstream.getresponse()
                data = answer.read()
                upstream.close()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _fail(self, status: int) -> None:
                if status == HANG:
                    gateway.closed.wait(HANG_SECONDS)
                if status in (HANG, HANG_UP):
                    self.close_connection = True
                    return
                code = {403: "AccessDenied", 501: "NotImplemented", 503: "SlowDown"}[status]
                data = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code></Error>".encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()  # closed within 0.02 s
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def met(self) -> int:
        """Number of requests with a fault."""
        return sum(asked.fault is not None for asked in self.asked)

    def close(self) -> None:
        """Stop it."""
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
