"""Requests to a cluster are checked against the nodes that it may have, not only those present."""

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private import services

from tests.refusals import refused
from transfgu.errors import UserError
from transfgu.recipe import ComputeRecipe
from transfgu.runtime import capacity, connect, ray_internals
from transfgu.runtime.connect import works_here
from transfgu.runtime.folders import RayFolders


def cluster(monkeypatch: pytest.MonkeyPatch, *there: dict[str, float], may_be: str = "") -> None:
    """A cluster of these nodes, one of which declares what may be added."""
    nodes: list[dict[str, Any]] = [{"Alive": True, "Resources": {"memory": 1e9, **node}} for node in there]
    nodes.append({"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}})
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setenv(capacity.NODES, may_be)


@pytest.fixture
def listener() -> Iterator[str]:
    """Return the address of a port that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("is_named", [False, True])
def test_a_cluster_is_joined_where_it_is_named_alone(
    monkeypatch: pytest.MonkeyPatch, listener: str, is_named: bool
) -> None:
    named, joined = (listener, listener) if is_named else ("", "local")
    asked: list[dict[str, Any]] = []
    monkeypatch.setenv("RAY_ADDRESS", named)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_internals, "gcs_status", lambda *_: "OK")
    monkeypatch.setattr(ray, "init", lambda **how: asked.append({**how, "path": os.environ["PYTHONPATH"]}))
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    may_be = '[{"count": 2, "CPU": 4, "GPU": 1}]'
    monkeypatch.setenv(capacity.NODES, may_be)
    connect.connect()
    assert asked[0]["address"] == joined
    assert ("num_cpus" in asked[0]) == (joined == "local")
    # Processes that Ray starts in advance serve only who has no runtime environment: here the rest is inherited.
    assert (asked[0]["runtime_env"] is None) == (joined == "local")
    if named:  # an actor or a trial on another node knows what the head was told
        assert asked[0]["runtime_env"]["env_vars"][capacity.NODES] == may_be
    ours = str(Path(connect.__file__).parents[2])
    assert asked[0]["path"] == (os.pathsep.join([ours, "/theirs"]) if joined == "local" else "/theirs")
    assert os.environ["PYTHONPATH"] == "/theirs"
    assert ("_temp_dir" in asked[0]) == (joined == "local")
    # A single block of work is done here where nobody else could do it sooner.
    cluster(monkeypatch, {"CPU": 4})
    assert works_here() == (joined == "local")
    cluster(monkeypatch, {"CPU": 4, "GPU": 1})
    assert not works_here()


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("nonsense", "ray-address-invalid"),
        ("http://127.0.0.1:8265", "ray-address-invalid"),
        ("10.0.0.1:port", "ray-address-invalid"),
        ("127.0.0.1:1", "ray-address-unreachable"),
        ("no-such-host.invalid:6379", "ray-address-unreachable"),
        ("auto", "ray-address-unknown"),
    ],
)
def test_an_address_without_a_cluster_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, code: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    # `auto` finds the cluster that Ray noted there, or any of this machine: others may run beside the tests.
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        connect.connect()
    assert caught.value.code == code
    assert time.monotonic() - started < 10


def test_a_port_that_no_ray_cluster_listens_on_is_told(monkeypatch: pytest.MonkeyPatch, listener: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", listener)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError) as caught:
        connect.connect(answer_seconds=0.5)
    assert caught.value.code == "ray-address-unreachable"


def test_a_long_folder_for_temporary_files_gives_way_to_a_short_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 130)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    folders = RayFolders()
    folder, spill = folders.make()
    assert len(str(folder)) <= 41
    assert spill  # large things still go where the user wants them
    assert Path(spill).parent == long
    assert {stat.S_IMODE(Path(path).stat().st_mode) for path in (folder, spill)} == {0o700}
    folders.remove()
    assert not folder.exists()
    assert not list(long.iterdir())


def test_folders_of_dead_processes_are_removed_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(base))
    folders = RayFolders()
    dead, strange = base / "transfgu-dead", base / "transfgu-strange"
    for path in (dead, strange):
        path.mkdir()
    (dead / "owner").touch()
    first, _ = folders.make()
    second, _ = folders.make()
    assert set(base.iterdir()) == {first, second, strange}
    folders.remove()
    assert set(base.iterdir()) == {strange}
    shutil.rmtree(base)


def test_pools_grow_with_what_an_autoscaler_may_add(monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = json.dumps([{"count": 8, "CPU": 4, "GPU": 1}, {"count": 3, "CPU": 8}, {"count": 0, "GPU": 8}])
    cluster(monkeypatch, {"CPU": 2}, {"CPU": 4, "GPU": 1}, may_be=scaling)
    assert capacity.cluster_gpus() == 8  # the one that is there is one of the eight
    assert capacity.pool_size(ComputeRecipe()) == 8
    assert capacity.pool_size(ComputeRecipe(gpus_per_actor=0.5)) == 16
    assert capacity.pool_size(ComputeRecipe(actors=3)) == 3
    assert capacity.actors_per_node(ComputeRecipe(gpus_per_actor=0.5)) == 2
    pool = capacity.encoder_pool(ComputeRecipe())
    assert (pool["compute"].min_size, pool["compute"].initial_size, pool["compute"].max_size) == (1, 1, 8)
    assert (pool["num_cpus"], pool["num_gpus"]) == (1, 1)
    assert capacity.training_workers(ComputeRecipe()) == 8
    assert capacity.elastic_workers(ComputeRecipe()) == (1, 8)
    assert capacity.elastic_workers(ComputeRecipe(workers=2)) == 2
    capacity.check_satisfiable(ComputeRecipe(workers=8))
    gpu, cpu, head = {"CPU": 4, "GPU": 1}, {"CPU": 8, "GPU": 0}, {"CPU": 2, "GPU": 0}
    assert capacity.every_possible_node() == [*[gpu] * 8, *[cpu] * 3, head]


def test_without_gpus_there_is_an_actor_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 4})
    assert capacity.pool_size(ComputeRecipe()) == 1
    assert capacity.elastic_workers(ComputeRecipe()) == 1
    cluster(monkeypatch, {"CPU": 4}, {"CPU": 8}, {})
    assert capacity.pool_size(ComputeRecipe()) == 2
    assert capacity.actors_per_node(ComputeRecipe()) == 1
    assert capacity.actors_per_node(ComputeRecipe(actors=5)) == 3


@pytest.mark.parametrize(
    ("nodes", "cpus", "begin"),
    [
        ([{"CPU": 3}, {"CPU": 3}], 2.0, 2),
        ([{"CPU": 2}, {"CPU": 2}], 1.0, 2),
        ([{"CPU": 1}, {"CPU": 1}], 1.0, 1),  # a second one would leave nothing to read with
        ([{"CPU": 16}, {"CPU": 1}, {}], 2.0, 1),
        ([{"CPU": 2}, {"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1}], 1.0, 3),
        ([{"CPU": 1, "GPU": 4}, {"CPU": 4}], 1.0, 1),
    ],
)
def test_actors_begin_on_every_node_that_is_there(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], cpus: float, begin: int
) -> None:
    cluster(monkeypatch, *nodes)
    assert capacity.encoder_pool(ComputeRecipe(cpus_per_actor=cpus))["compute"].initial_size == begin


@pytest.mark.parametrize(
    ("compute", "refusal"),
    [
        (ComputeRecipe(gpus_per_actor=2.0), "cluster-too-small --gpus_per_actor"),
        (ComputeRecipe(cpus_per_actor=4.0), "cluster-too-small 4 --cpus_per_actor"),
        (ComputeRecipe(workers=3), "cluster-too-small 2 3 --workers"),
    ],
)
def test_what_no_node_can_ever_hold_is_told(
    monkeypatch: pytest.MonkeyPatch, compute: ComputeRecipe, refusal: str
) -> None:
    cluster(monkeypatch, {"CPU": 16}, may_be='[{"count": 2, "CPU": 3, "GPU": 1}]')
    capacity.check_satisfiable(ComputeRecipe(workers=2))
    with refused(refusal):
        capacity.check_satisfiable(compute)


def test_an_actor_that_leaves_no_cpu_to_read_images_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 2})
    capacity.check_satisfiable(ComputeRecipe())
    with refused("cluster-too-small 2 3"):
        capacity.check_satisfiable(ComputeRecipe(workers=2))


@pytest.mark.parametrize("text", ["8", "[8]", '[{"GPU": 1}]', "[{", '[{"count": "many"}]', '{"count": 1}'])
def test_a_cluster_that_misspells_its_nodes(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    cluster(monkeypatch, {"CPU": 2}, may_be=text)
    with refused("nodes-invalid TRANSFGU_NODES"):
        capacity.possible_nodes()


def test_a_local_folder_is_refused_where_nodes_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 2})
    capacity.check_shared("/tmp/run")
    cluster(monkeypatch, {"CPU": 2}, may_be='[{"count": 2, "CPU": 3}]')
    with refused("folder-local 3 --run"):
        capacity.check_shared("/tmp/run")
    capacity.check_shared("s3://bucket/run")


@pytest.mark.ray
def test_an_embedded_cluster_is_open_to_its_machine_alone(ray_cluster: None) -> None:
    processes = psutil.Process().children(recursive=True)
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # an idle worker may end meanwhile
            found += [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert len(found) > 3
    assert {c.laddr.ip for c in found} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.long
@pytest.mark.ci_long
@pytest.mark.ray
def test_ray_that_does_not_start_in_time_is_given_longer() -> None:
    base = Path(tempfile.mkdtemp(dir="/tmp"))
    start = (
        "import ray; from transfgu.runtime import connect; connect.connect(); "
        "print(len(ray.nodes()), connect.FOLDERS.paths)"
    )
    done = subprocess.run(
        [sys.executable, "-c", start],
        # How long Ray waits for its GCS: the second start sets another value.
        env={**os.environ, "RAY_gcs_server_port_wait_time_s": "0", "RAY_TMPDIR": str(base)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    left = list(base.iterdir())
    shutil.rmtree(base)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("Ray did not start")
    assert done.stderr.count("\n") == 1
    assert done.stdout.startswith("1 [")
    assert left == []
