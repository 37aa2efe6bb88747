"""Each private or developer API of Ray that the package uses exists and works as expected.

A test that fails here after an upgrade names the API that Ray dropped or changed.
"""

import importlib
import inspect
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import ray
import ray.train
from ray._private import ray_constants, services
from ray.data import ActorPoolStrategy, DataContext
from ray.train.torch import TorchTrainer

from transfgu.runtime import ray_internals

SUBCLASSED = {
    "ray.train.UserCallback": ("after_exception",),
    "ray.train.backend.BackendConfig": ("backend_cls",),
    "ray.tune.search.Searcher": ("suggest", "on_trial_result", "on_trial_complete", "save", "restore"),
    "ray.tune.schedulers.TrialScheduler": ("CONTINUE", "PAUSE", "STOP", "on_trial_result"),
}
"""Developer APIs from which the package's classes inherit, with the attributes that are overridden or used."""

pytestmark = pytest.mark.ray


class Rows:
    """An actor: the rows of its block, in one row."""

    def __init__(self, factor: int) -> None:
        self._factor = factor

    def __call__(self, block: pa.Table) -> pa.Table:
        return pa.table({"rows": [self._factor * len(block)]})


def in_order(block: pa.Table) -> pa.Table:
    return block


@pytest.mark.parametrize("name", SUBCLASSED)
def test_class_that_is_inherited_from(name: str) -> None:
    module, _, cls = name.rpartition(".")
    found = getattr(importlib.import_module(module), cls)
    assert inspect.isclass(found)
    for attribute in SUBCLASSED[name]:
        assert hasattr(found, attribute), f"{name} has no {attribute}"


def test_ray_constants_enable_ray_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    ray_internals.stay_on_this_machine()
    assert ray_constants.ENABLE_RAY_CLUSTER is False
    assert "ENABLE_RAY_CLUSTER" in inspect.getsource(importlib.import_module("ray._private.services"))


def test_ray_constants_bind_the_nodes_ports_to_this_machine(ray_cluster: None) -> None:
    assert socket.inet_aton(ray.nodes()[0]["NodeManagerAddress"])[0] == 127


def test_services_canonicalize_bootstrap_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Ray replaces a loopback address by the node's own, unless its embedded cluster has started.
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: {"192.0.2.7:6380"})
    assert ray_internals.address_on_this_machine() == "192.0.2.7:6380"


def test_check_alive_of_the_gcs(ray_cluster: None) -> None:
    address, token = ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"]
    assert ray_internals.gcs_status(address, token, 20.0) == "OK"
    assert ray_internals.gcs_status(address, "0" * 64, 20.0) == "UNAUTHENTICATED"
    assert ray_internals.gcs_status(address, "", 20.0) == "UNAUTHENTICATED"


PATIENT = """
import sys, time
from ray._private import services
from transfgu.runtime import ray_internals
with ray_internals.patience(0.5):
    started = time.monotonic()
    try:
        services.get_node(sys.argv[1], "f" * 56)
    except RuntimeError:
        print(time.monotonic() - started)
"""


def test_services_get_node(ray_cluster: None) -> None:
    """Ray finds its node in the replaced function, and raises RuntimeError for a node that is not there yet."""
    assert "services.get_node(" in inspect.getsource(importlib.import_module("ray._private.node"))
    address = ray.get_runtime_context().gcs_address
    with ray_internals.patience(0.5):
        assert services.get_node(address, ray.get_runtime_context().get_node_id())
    # In a process of its own, as Ray reads once how long its core looks for a node: 30 s.
    done = subprocess.run(
        [sys.executable, "-c", PATIENT, address],
        env={**os.environ, "RAY_raylet_start_wait_time_s": "0", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0.4 < float(done.stdout) < 20


def test_data_context() -> None:
    before = DataContext.get_current()
    with ray_internals.data_context(preserve_order=True, whole_blocks=True, store_bytes=1e6):
        context = DataContext.get_current()
        assert context.execution_options.preserve_order
        assert context.raise_original_map_exception
        assert not context.enable_progress_bars
        assert context.target_max_block_size is None
        assert context.execution_options.resource_limits.object_store_memory == 1e6
    assert DataContext.get_current() is before
    with ray_internals.data_context():
        assert DataContext.get_current().target_max_block_size == before.target_max_block_size


def test_data_context_enable_progress_bars() -> None:
    with DataContext.current(DataContext.get_current().copy()):
        for shown in (True, False):
            ray_internals.show_progress_bars(shown)
            assert DataContext.get_current().enable_progress_bars is shown


def test_dataset_map_batches_internal_and_get_stats_summary(ray_cluster: None) -> None:
    blocks = [pa.table({"x": list(range(n))}) for n in (3, 1, 5)]
    pool: dict[str, Any] = {"compute": ActorPoolStrategy(size=1), "num_cpus": 1}
    with ray_internals.data_context(preserve_order=True, whole_blocks=True):
        plan = ray_internals.map_whole_blocks(ray.data.from_arrow(blocks), Rows, {"factor": 10}, pool)
    plan = ray_internals.map_with_context_of(plan, in_order)
    assert [row["rows"] for row in plan.iter_rows()] == [30, 10, 50]
    seconds, worked = ray_internals.task_seconds(plan)
    assert 0 < max(worked.values()) <= seconds
    assert any("Rows" in name for name in worked)


def upload(folder: str) -> None:
    found = ray_internals.upload_checkpoint(folder, "checkpoint_1")
    ray.train.report({}, checkpoint=found, checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD)


@pytest.mark.long
@pytest.mark.ci_long
def test_persist_current_checkpoint(ray_cluster: None, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.mkdir()
    (local / "weights").write_bytes(b"content")
    trainer = TorchTrainer(
        partial(upload, str(local)),
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(name="run", storage_path=str(tmp_path)),
    )
    result = trainer.fit()
    assert result.checkpoint
    assert result.checkpoint.path == str(tmp_path / "run" / "checkpoint_1")
    assert (tmp_path / "run" / "checkpoint_1" / "weights").read_bytes() == b"content"


def test_global_node_all_processes(ray_cluster: None) -> None:
    found = ray_internals.main_processes()
    assert sorted(found) == ["gcs_server", "raylet"]
    assert [process.poll() for process in found.values()] == [None, None]
    assert {psutil.Process(process.pid).name() for process in found.values()} == set(found)


def test_flag_node_id_of_a_raylet(ray_cluster: None) -> None:
    raylet = ray_internals.raylet_of_this_machine()
    assert raylet
    assert raylet.pid == ray_internals.main_processes()["raylet"].pid
