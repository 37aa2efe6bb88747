"""A gateway before an S3 server that answers some requests itself, with a fault.

Which ones, the test says: the next few, or whatever a function of the request chooses. Every request is written down.
"""

import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

HANG_UP = 0


class Asked(NamedTuple):
    """A request that came in."""

    line: str
    """Method and path, as `PUT /bucket/key`."""
    fault: int | None
    """The status it was answered with here, `HANG_UP`, or None where the server answered."""


class Gateway:
    """Passes requests on to the server at `target`, but for those that it answers by a fault."""

    def __init__(self, target: str) -> None:
        self.pending: list[int] = []
        """Faults of the next requests: a status, or `HANG_UP`."""
        self.fault: Callable[[str], int | None] = lambda line: None
        """Asked for each other request, by its line."""
        self.unknown: frozenset[str] = frozenset()
        """Headers, in lower case, that the server does not get to see: it acts as one that does not know them."""
        self.asked: list[Asked] = []
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
                if status == HANG_UP:
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
        """How many requests met a fault."""
        return sum(asked.fault is not None for asked in self.asked)

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
