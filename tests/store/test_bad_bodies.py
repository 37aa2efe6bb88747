"""Answers of an S3 server that end too early, trickle in, or never come, from a small server that is really there."""

import contextlib
import socketserver
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from transfgu.errors import UserError
from transfgu.store import s3_get, storage, waits

pytestmark = pytest.mark.processes

DATA = np.random.default_rng(0).bytes(300_000)
HEAD = 'HTTP/1.1 {status}\r\nContent-Length: {length}\r\nETag: "1"\r\nLast-Modified: Fri, 27 Nov 2026 09:00:00 GMT\r\n'


class Server(socketserver.ThreadingTCPServer):
    """Answers GET and HEAD with `DATA`, or its wanted range; `bad` bodies are sent first, by the function given."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bad = 0
        """How many bodies are still to be sent by `send`."""
        self.send: Callable[[Callable[[bytes], object], bytes], object] = lambda write, body: write(body)
        self.gets = 0


class Handler(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while self._answer():
                pass

    def _answer(self) -> bool:
        line, body, status = self.rfile.readline().decode(), DATA, "200 OK"
        while (header := self.rfile.readline().decode().strip().lower()) not in ("",):
            if header.startswith("range: bytes="):
                first, last = header.removeprefix("range: bytes=").split("-")
                body, status = DATA[int(first) : int(last) + 1], "206 Partial Content"
        if not line:
            return False
        self.wfile.write((HEAD.format(status=status, length=len(body)) + "\r\n").encode())
        if line.startswith("HEAD"):
            return True
        self.server.gets += 1
        if self.server.bad:
            self.server.bad -= 1
            self.server.send(self.wfile.write, body)
            return False  # which closes the connection
        self.wfile.write(body)
        return True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The S3 endpoint of this test."""
    with Server() as made:
        threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{made.server_address[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "any")
        yield made
        made.shutdown()


def short(write: Callable[[bytes], object], body: bytes) -> None:
    write(body[:-1])


def trickle(write: Callable[[bytes], object], body: bytes) -> None:
    for place in range(200):
        write(body[place : place + 1])
        time.sleep(0.05)


def pause(write: Callable[[bytes], object], body: bytes) -> None:
    time.sleep(1.5)
    write(body)


def read_by_arrow(uri: str) -> bytes:
    fs, path = storage.filesystem(uri)
    with fs.open_input_file(path) as file:
        return bytes(file.read())


@pytest.mark.parametrize(
    "read",
    [storage.read_bytes, lambda uri: b"".join(storage.read_chunks(uri, 1 << 20)), read_by_arrow],
    ids=["whole", "in pieces", "by Arrow, as Ray reads Parquet"],
)
@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_body_that_is_too_short_is_asked_for_again(server: Server, read: Callable[[str], bytes], bad: int) -> None:
    server.bad, server.send = bad, short
    assert read("s3://bucket/file") == DATA
    assert server.bad == 0
    assert server.gets >= bad + 1


def test_a_range_that_is_too_short_is_asked_for_again(server: Server) -> None:
    server.bad, server.send = 2, short
    assert storage.read_range("s3://bucket/file", 1000, 50) == DATA[1000:1050]
    assert server.gets == 3


def test_bodies_that_are_always_too_short_are_given_up(server: Server) -> None:
    server.bad, server.send = 100, short
    with pytest.raises(OSError, match="NETWORK_CONNECTION: 299999 of 300000 bytes"):
        s3_get.get("bucket", "file", attempts=3)
    assert server.gets == 3


def test_a_body_that_stays_too_short_ends_in_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the pauses between requests
    server.bad, server.send = 100, short
    with pytest.raises(UserError) as caught:
        storage.read_bytes("s3://bucket/file")
    assert caught.value.code == "storage-failed"
    assert server.gets == s3_get.ATTEMPTS


def test_a_body_that_trickles_in_is_given_up_and_asked_for_again(server: Server) -> None:
    server.bad, server.send = 1, trickle  # 20 bytes per second, for ten seconds
    started = time.monotonic()
    assert s3_get.get("bucket", "file", slow_seconds=1.0) == DATA
    assert 1 < time.monotonic() - started < 8


def test_no_request_is_repeated_after_the_deadline(server: Server) -> None:
    server.bad, server.send = 1, short
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        s3_get.get("bucket", "file", deadline_seconds=0.0)
    assert server.gets == 1


def test_a_long_wait_is_told_and_a_short_one_is_not(server: Server) -> None:
    lines: list[str] = []
    storage.read_bytes("s3://bucket/first")  # which imports and makes the client
    waits.tell(lines.append, after_seconds=0.5, look_seconds=0.1)
    assert storage.read_bytes("s3://bucket/quick") == DATA
    time.sleep(0.7)
    assert lines == []
    server.bad, server.send = 1, pause
    assert storage.read_bytes("s3://bucket/slow") == DATA
    assert len(lines) == 1  # the next one would come after a minute
    assert "s3://bucket/slow" in lines[0]
    assert lines[0].startswith("waiting for ")
