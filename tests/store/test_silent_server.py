"""An S3 server that accepts connections and never answers."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.refusals import refused
from transfgu.store import storage


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The endpoint of this test: a server that never reads or writes."""
    held = []

    def accept(server: socket.socket) -> None:
        while True:
            try:
                held.append(server.accept()[0])
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, args=(server,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "any")
        yield
        server.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()


@pytest.mark.long
@pytest.mark.ci_long
@pytest.mark.usefixtures("silent")
def test_a_check_before_work_gives_up_within_twenty_seconds() -> None:
    started = time.monotonic()
    with refused("storage-failed s3://bucket/images"):
        storage.check_readable("s3://bucket/images")
    assert 4 < time.monotonic() - started < 20
