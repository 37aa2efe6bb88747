"""The lock of a run: one writer, a dead one's taken over, on a disk and on S3."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import REAL_S3
from tests.gateway import Gateway
from tests.refusals import refused
from transfgu.store import lock as store_lock
from transfgu.store import storage
from transfgu.store.lock import Lock, Timing, hold

HOLD = """
import sys, time
from transfgu.store.lock import Lock
Lock(sys.argv[1]).take(print)
print("held", flush=True)
time.sleep(99)
"""


@pytest.fixture
def said() -> list[str]:
    return []


def lock_of(uri: str) -> dict[str, object]:
    tree: dict[str, object] = json.loads(storage.read_bytes(storage.join(uri, store_lock.FILE)))
    return tree


def write_lock(uri: str, **fields: object) -> None:
    """Write a lock like that of a process on another machine."""
    content = {"id": "other", "host": "elsewhere", "process": "another-boot/pid:[1]/7@1", "beats": 3, **fields}
    storage.write_bytes(storage.join(uri, store_lock.FILE), json.dumps(content).encode())


@pytest.mark.parametrize("kind", ["disk", pytest.param("s3", marks=pytest.mark.s3)])
def test_a_second_run_is_refused_until_the_first_lets_go(
    kind: str, tmp_path: Path, said: list[str], request: pytest.FixtureRequest
) -> None:
    uri = storage.join(request.getfixturevalue("s3") if kind == "s3" else str(tmp_path), "run")
    with hold(uri, said.append):
        with refused(f"run-locked {os.getpid()} --run"):
            Lock(uri).take(said.append)
        assert lock_of(uri)["beats"] == 0
    assert not storage.exists(storage.join(uri, store_lock.FILE))
    with hold(uri, said.append):
        pass
    assert said == []


@pytest.mark.s3
@pytest.mark.skipif(REAL_S3, reason="a request that lost a header has another signature, and moto checks none")
def test_a_server_that_would_replace_the_lock(
    s3: str, s3_endpoint: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = Gateway(s3_endpoint)
    gateway.unknown = frozenset({"if-none-match"})
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", gateway.url)
    with hold(f"{s3}/run", said.append), refused("run-locked"):
        Lock(f"{s3}/run").take(said.append)
    gateway.close()


def test_of_many_that_try_at_once_one_holds_it(tmp_path: Path, said: list[str]) -> None:
    made = []
    threads = [
        threading.Thread(target=lambda i=i: made.append(storage.create(str(tmp_path / "a" / "x"), b"%d" % i)))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 7 + [True]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x"]


@pytest.mark.processes
def test_a_killed_runs_lock_is_taken_over_at_once(tmp_path: Path, said: list[str]) -> None:
    root = Path(store_lock.__file__).parents[2]
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with refused(f"run-locked {other.pid}"):
            Lock(str(tmp_path)).take(said.append)
    finally:
        other.send_signal(signal.SIGKILL)
    while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    started = time.monotonic()
    with hold(str(tmp_path), said.append):  # not yet waited for: a zombie
        assert time.monotonic() - started < 5
        assert f"/{os.getpid()}@" in str(lock_of(str(tmp_path))["process"])
    other.wait()
    assert said == ["took over the lock of a run that died"]


def test_another_machines_lock_is_watched(tmp_path: Path, said: list[str]) -> None:
    timing = Timing(patience=1, settle=0.01)
    write_lock(str(tmp_path))
    beats = threading.Timer(0.3, lambda: write_lock(str(tmp_path), beats=4))
    beats.start()
    with refused("run-locked 7 elsewhere"):
        Lock(str(tmp_path), timing=timing).take(said.append)
    beats.join()
    with hold(str(tmp_path), said.append, timing=timing):  # now it does not beat
        assert lock_of(str(tmp_path))["id"] != "other"
    assert said[-1] == "took over the lock of a run that died"
    assert "elsewhere may be dead" in said[0]


def test_a_lock_that_was_cut_short_is_a_dead_runs(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / store_lock.FILE).write_text('{"id": "oth')
    with hold(str(tmp_path), said.append):
        assert lock_of(str(tmp_path))["host"]


def test_of_two_that_take_over_a_dead_runs_lock_one_holds_it(tmp_path: Path, said: list[str]) -> None:
    """Both have found it dead; the other one writes and waits, and only then does this one write."""
    timing = Timing(settle=0.01)
    file = tmp_path / store_lock.FILE
    file.write_text("{}")
    late = Lock(str(tmp_path), timing=timing)
    found = late.read()
    with hold(str(tmp_path), said.append, timing=timing) as lock:
        held = lock_of(str(tmp_path))["id"]
        with refused("run-locked"):
            late.take_over(found, said.append)
        assert lock_of(str(tmp_path))["id"] == held
        lock.check()


def test_a_lock_that_was_lost_since_the_last_beat_is_not_deleted(tmp_path: Path, said: list[str]) -> None:
    with hold(str(tmp_path), said.append):
        write_lock(str(tmp_path))
    assert lock_of(str(tmp_path))["id"] == "other"


def test_the_holder_beats_and_notices_a_loss(tmp_path: Path, said: list[str]) -> None:
    with hold(str(tmp_path), said.append, timing=Timing(beat=0.05)) as lock:
        deadline = time.monotonic() + 60
        while lock_of(str(tmp_path))["beats"] == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert lock_of(str(tmp_path))["beats"] != 0
        lock.check()
        # A beat under way may overwrite it, so it is written until it stays.
        while lock_of(str(tmp_path))["id"] != "other" and time.monotonic() < deadline:
            write_lock(str(tmp_path))
            time.sleep(0.2)
        with refused("run-taken"):
            lock.check()
    assert lock_of(str(tmp_path))["id"] == "other"  # not ours to delete


def test_a_loss_shows_before_the_next_beat(tmp_path: Path, said: list[str]) -> None:
    with hold(str(tmp_path), said.append, timing=Timing(beat=3600)) as lock:
        lock.check()
        write_lock(str(tmp_path))
        with refused("run-taken"):
            lock.check()
