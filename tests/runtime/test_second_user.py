"""Another user of the machine has no access to an embedded cluster: neither its ports, its sockets, nor its token."""

import contextlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from transfgu.runtime import connect

NOBODY = 65534
INTRUDER = Path(__file__).with_name("intruder.py")
REFUSED = {"UNAUTHENTICATED", "401", "403"}

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user"),
]


def listening() -> set[int]:
    """Return the ports on which this process and its descendants listen."""
    found = set()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # an idle worker may end meanwhile
            if "moto" in process.name():
                continue
            found |= {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return found


def intrude(*words: str, **environment: str) -> Any:
    """Return the output of the script, run by another user."""
    done = subprocess.run(
        [sys.executable, str(INTRUDER), str(NOBODY), *words],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "RAY_BACKEND_LOG_LEVEL": "fatal", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "environment",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}],
    ids=["without a token", "with a wrong one"],
)
def test_every_port_refuses_another_user(environment: dict[str, str]) -> None:
    @ray.remote
    def known() -> int:
        return 1

    assert ray.get(known.remote()) == 1  # the cluster holds a function now that its workers unpickle
    gcs = ray.get_runtime_context().gcs_address
    ports = listening()
    assert int(gcs.rpartition(":")[2]) in ports
    found = intrude(gcs, *map(str, sorted(ports)), **environment)
    assert found["user"] == NOBODY
    assert found["function"].startswith("refused")
    for port, answers in found["ports"].items():
        answered = {what: status for what, status in answers.items() if status in ("OK", "200")}
        assert not answered, f"port {port}: {answered}"
    # Ray's metrics alone have no token: figures of memory and processors, which `ps` tells as well. The agent's, those
    # of the dashboard's modules and, once it has begun, the autoscaler's have a port each.
    assert sum("metrics" in answers.values() for answers in found["ports"].values()) <= 3
    assert REFUSED & set(found["ports"][gcs.rpartition(":")[2]].values())


def test_the_same_requests_succeed_with_the_token() -> None:
    gcs = ray.get_runtime_context().gcs_address
    environment = {n: os.environ[n] for n in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    found = intrude(gcs, gcs.rpartition(":")[2], **environment)
    assert "OK" in found["ports"][gcs.rpartition(":")[2]].values()
    assert not found["function"].startswith("refused")


def test_folder_and_token_are_the_owners_alone() -> None:
    (folder,) = connect.FOLDERS.paths
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    commands = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in commands if any(token in word for word in line)]
    for path in folder.rglob("*"):
        if path.is_file():
            assert token.encode() not in path.read_bytes(), path
    process = psutil.Process().children()[0].pid
    for words in (["ls", str(folder)], ["ls", str(folder / "r")], ["cat", f"/proc/{process}/environ"]):
        denied = subprocess.run(words, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, check=False)
        assert denied.returncode != 0
        assert b"denied" in denied.stderr


@pytest.mark.parametrize(
    "environment",
    [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}],
    ids=["no token", "no token in token mode", "a wrong one"],
)
def test_a_job_that_joins_without_the_clusters_token_ends_in_one_line(
    environment: dict[str, str], tmp_path: Path
) -> None:
    address = ray.get_runtime_context().gcs_address
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    join = (
        "from transfgu.cli.command_line import run_job; from transfgu.runtime.connect import connect; run_job(connect)"
    )
    done = subprocess.run(
        [sys.executable, "-c", join],
        env={**others, "HOME": str(tmp_path), "RAY_ADDRESS": address, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "RAY_AUTH_TOKEN" in line
    assert address in line
