"""Keep every private or developer API of Ray in one place, one function each.

A release of Ray may drop any of them. `tests/runtime/test_ray_internals.py` has a test for each, named after the API.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import grpc  # type: ignore[import-untyped]
import psutil
import ray
from ray._private import ray_constants, services, worker
from ray.data import DataContext, Dataset, ExecutionResources


def stay_on_this_machine() -> None:
    """Bind the ports of a cluster that starts later to this machine alone, as Ray does on macOS.

    API: `ray._private.ray_constants.ENABLE_RAY_CLUSTER`.
    """
    ray_constants.ENABLE_RAY_CLUSTER = False


def address_on_this_machine() -> str:
    """Return HOST:PORT of the cluster for `RAY_ADDRESS=auto`; empty if there is none.

    API: `ray._private.services.canonicalize_bootstrap_address`.
    """
    with suppress(ConnectionError, ValueError, OSError):
        return services.canonicalize_bootstrap_address("auto") or ""
    return ""


def gcs_status(address: str, token: str, seconds: float) -> str:
    """Return the name of the gRPC status with which the cluster at `address` answers: "OK" if it grants access.

    API: the method `ray.rpc.NodeInfoGcsService/CheckAlive`. Ray itself repeats the request silently.

    Args:
        address: HOST:PORT of the cluster's GCS.
        token: the cluster's token; empty: none is sent.
        seconds: maximum time to wait for an answer.
    """
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            ask(b"", timeout=seconds, metadata=[("authorization", f"Bearer {token}")] if token else None)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Allow a cluster started in the block up to `seconds` for each of its processes; 0: Ray's own 30 s.

    API: `ray._private.services.get_node`, which Ray calls for 30 s until its raylet is there.
    """
    if not seconds:
        yield
        return
    find: Callable[..., Any] = services.get_node
    name = "RAY_gcs_server_port_wait_time_s"
    deadline = time.monotonic() + seconds

    def wait(*given: Any, **named: Any) -> Any:
        while True:
            try:
                return find(*given, **named)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    services.get_node, before = wait, os.environ.get(name)
    os.environ[name] = str(int(seconds))
    try:
        yield
    finally:
        services.get_node = find
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def main_processes() -> dict[str, "subprocess.Popen[bytes]"]:
    """Return the processes, by name, without which the cluster that this process has started does not work.

    API: `ray._private.worker._global_node.all_processes`.
    """
    started: dict[str, Any] = worker._global_node.all_processes if worker._global_node else {}
    kinds = (ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER)
    return {kind: info.process for kind in kinds for info in started.get(kind, ())}


def raylet_of_this_machine() -> psutil.Process | None:
    """Return the raylet by which this process takes part in a cluster; None if it can't be found.

    API: the flag `--node_id` of the raylet's command line, by which Ray itself finds the raylets of a machine.
    """
    flag = f"--node_id={ray.get_runtime_context().get_node_id()}"
    return next((p for p in psutil.process_iter(["cmdline"]) if flag in (p.info["cmdline"] or ())), None)


def show_progress_bars(shown: bool) -> None:
    """Switch the progress bars of Ray Data on or off for data sets that this process creates from now on.

    API: `ray.data.DataContext`.
    """
    DataContext.get_current().enable_progress_bars = shown


@contextmanager
def data_context(
    *, preserve_order: bool = False, whole_blocks: bool = False, store_bytes: int | float | None = None
) -> Iterator[None]:
    """Create data sets without progress bars, in which exceptions of mapped functions are not wrapped.

    API: `ray.data.DataContext`, whose settings belong to each data set created in the block.

    Args:
        preserve_order: return blocks in the order of the input.
        whole_blocks: do not divide or join blocks, whatever their size.
        store_bytes: maximum size of the plan's blocks in the object store [bytes]; None: Ray's own limit.
    """
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    context.execution_options.preserve_order = preserve_order
    if whole_blocks:
        context.target_max_block_size = None
    if store_bytes is not None:
        limits = ExecutionResources.for_limits(object_store_memory=store_bytes)
        context.execution_options.resource_limits = limits
    with DataContext.current(context):
        yield


def map_whole_blocks(data: Dataset, actor: type[Any], arguments: Mapping[str, Any], pool: Mapping[str, Any]) -> Dataset:
    """Add an operator that turns each block into one block, in a pool of actors.

    API: `Dataset.map_batches_internal`. `map_batches` refuses whole blocks on GPUs, and joins small blocks.

    Args:
        data: the plan so far.
        actor: a class; it is called with blocks as Arrow tables.
        arguments: arguments of the class's constructor.
        pool: further arguments of `map_batches`, from `transfgu.runtime.capacity.encoder_pool`.
    """
    return data.map_batches_internal(
        actor, batch_size=None, batch_format="pyarrow", fn_constructor_kwargs=dict(arguments), **pool
    )


def map_with_context_of(data: Dataset, write: Callable[[Any], Any]) -> Dataset:
    """Add an operator that turns each block into one block in tasks, with the settings of `data`.

    API: `Dataset.context`.
    """
    with DataContext.current(data.context):
        return data.map_batches(write, batch_size=None, batch_format="pyarrow", num_cpus=1)


def task_seconds(data: Dataset) -> tuple[float, dict[str, float]]:
    """Return the seconds from the first task of an executed plan to the last, and those of all tasks by operator.

    API: `Dataset.get_stats_summary`.
    """
    summary = data.get_stats_summary()
    worked: dict[str, float] = {}
    pending = [summary]
    while pending:
        found = pending.pop()
        pending += found.parents
        worked.update({o.operator_name: o.wall_time.sum for o in found.operators_stats if o.wall_time})
    return summary.get_total_wall_time(), worked


def upload_checkpoint(folder: str, name: str) -> Any:
    """Copy a local folder to `name` in the folder of the running training, as Ray Train does; returns a `Checkpoint`.

    API: `ray.train.get_context().get_storage().persist_current_checkpoint`.
    """
    import ray.train  # only workers of a training need it

    storage = ray.train.get_context().get_storage()
    return storage.persist_current_checkpoint(ray.train.Checkpoint.from_directory(folder), name)
