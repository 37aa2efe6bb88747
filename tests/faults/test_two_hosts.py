"""A run on two hosts without a shared disk: they exchange data only by Ray, Gloo and objects in the bucket."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from tests.faults.harness import assert_same, history, row, timed_run, write_data
from tests.faults.hosts import INTERFACE, Host, join, reachable, why_not
from tests.faults.s3_copies import fetched, on_s3
from transfgu.methods import STAGES
from transfgu.store import storage
from transfgu.store.artifacts import Run

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.s3]

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
PORT, DASHBOARD = 6379, 8265
HOST_CPUS = 3  # room for one worker of two CPUs, and for one task that reads for it
SCORED = 16  # of the images: decoding is slow at this size, too
# Parts that take seconds: a host that is up a moment later than the other finds work left.
SLOW = {"dataset.feature_size": (512, 512), "dataset.image_size": (512, 512), "windows.size": (96, 96)}


class Cluster(NamedTuple):
    head: Host
    other: Host
    environment: dict[str, str]

    def state(self, what: str) -> list[dict[str, Any]]:
        """Return Ray's information about nodes, actors or tasks, including those that have ended."""
        answer = self.head.get(DASHBOARD, f"api/v0/{what}?limit=10000&detail=true")
        found: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return found

    def addresses(self, what: str, wanted: dict[str, str]) -> set[str]:
        """Return the hosts on which such actors or tasks ran."""
        nodes = {node["node_id"]: node["node_ip"] for node in self.state("nodes")}
        return {nodes[row["node_id"]] for row in self.state(what) if wanted.items() <= row.items()}


@pytest.fixture
def cluster(s3_endpoint: str, tmp_path: Path) -> Iterator[Cluster]:
    """Ray on two hosts, which reach the S3 server at the head's address."""
    if reason := why_not():
        pytest.skip(f"no host can be made: {reason}")
    server = urlsplit(s3_endpoint)
    if server.scheme != "http" or not server.hostname:
        pytest.skip("the S3 server's certificate is of another address than the hosts would know it by")
    with ExitStack() as stack:
        hosts = []
        for name, address in (("host-1", "10.77.0.1"), ("host-2", "10.77.0.2")):
            hosts.append(Host(name, address))
            stack.callback(hosts[-1].end)
        head, other = hosts
        join(head, other)
        port = stack.enter_context(reachable(head, (server.hostname, server.port or 80)))
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": "/tmp",
            "AWS_ENDPOINT_URL_S3": f"http://{head.address}:{port}",
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": f"{head.address}:{PORT}",
        }
        found = Cluster(head, other, environment)
        start_ray(found, tmp_path)
        yield found


def start_ray(cluster: Cluster, logs: Path) -> None:
    """Start a head and a worker that joins it; returns when both are present."""
    flags = ["--block", f"--num-cpus={HOST_CPUS}", f"--object-store-memory={400 << 20}"]
    own = {name: value for name, value in cluster.environment.items() if name != "RAY_ADDRESS"}
    lead = ["--head", f"--port={PORT}", "--dashboard-host=127.0.0.1", f"--dashboard-port={DASHBOARD}"]
    follow = [f"--address={cluster.head.address}:{PORT}"]
    for host, role in ((cluster.head, lead), (cluster.other, follow)):
        log = logs / f"{host.name}.log"
        command = [RAY, "start", *role, f"--node-ip-address={host.address}", *flags]
        started = host.start(command, own, log)
        deadline = time.monotonic() + 120
        while host.address not in living(cluster):
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)


def living(cluster: Cluster) -> set[str]:
    """Return the addresses of Ray's nodes."""
    try:
        return {node["node_ip"] for node in cluster.state("nodes") if node["state"] == "ALIVE"}
    except OSError:  # the dashboard is not up yet
        return set()


def test_a_run_on_two_hosts(cluster: Cluster, ray_cluster: None, tmp_path: Path, s3: str) -> None:
    head, other, environment = cluster
    recipe = write_data(tmp_path).with_fields({**SLOW, "compute.workers": 2})
    for label in sorted(Path(recipe.labels).iterdir())[SCORED:]:
        label.unlink()
    remote = on_s3(recipe, s3).with_fields({"compute.cpus_per_actor": 2})
    storage.write_bytes(storage.join(s3, "recipe.yaml"), remote.to_yaml().encode())
    command = ["python", "jobs/train.py", "--recipe", storage.join(s3, "recipe.yaml"), "--run"]

    refused = head.run([*command, "/tmp/run", "--quiet"], environment, ROOT, 120)
    assert refused.returncode == 2
    assert refused.stderr == (
        "/tmp/run is a folder of one machine, and the cluster has 2 nodes: give --run a URI all can reach, as "
        "s3://bucket/run [folder-local]\n"
    )

    started = time.monotonic()
    submit = [RAY, "job", "submit", "--address", f"http://127.0.0.1:{DASHBOARD}", "--working-dir", ".", "--"]
    done = head.run([*submit, *command, storage.join(s3, "run")], environment, ROOT, 400)
    assert done.returncode == 0, done.stdout + done.stderr
    seconds = time.monotonic() - started
    print(done.stdout)

    both = {head.address, other.address}
    for operator in ("EncodeWindows", "MapConcepts"):
        block_done = {"name": f"MapWorker(MapBatches({operator})).submit", "state": "FINISHED"}
        assert cluster.addresses("tasks", block_done) == both
    assert cluster.addresses("actors", {"class_name": "RayTrainWorker"}) == both
    run = fetched(s3, tmp_path / "fetched")
    assert history(run) == [1, 2, 3, 4]
    assert history(run, "workers") == [2, 2, 2, 2]

    one_host, alone = Run(str(tmp_path / "run")), 0.0
    for stage in STAGES:
        alone += timed_run(recipe, one_host, stage)
    for stage in STAGES:
        assert_same(run, one_host, stage)
    row("two hosts without a common disk", "whole run", "same artefacts as on one host", seconds - alone, "–")
