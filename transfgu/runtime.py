"""One place that knows how the process meets Ray: an existing cluster if there is one, else an embedded local one.

Everything above asks for resources in the recipe's terms; everything below is Ray's.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
import torch
from ray.data import ActorPoolStrategy, DataContext

from transfgu import storage
from transfgu.errors import UserError
from transfgu.recipe import ComputeRecipe

# Threads that spin while they wait burn what other processes of a small machine need: four times the CPU for a step.
# glibc returns large blocks to the kernel at every free; faulting them in again costs a third of a small ViT's time.
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


def connect(*, verbose: bool = False, setup_hook: Callable[[], None] | None = None) -> None:
    """Join the cluster that `RAY_ADDRESS` names (as under `ray job submit`), or start an embedded one on this machine.

    Args:
        verbose: let Ray's own messages through.
        setup_hook: called in every worker process before its first task.
    """
    if ray.is_initialized():
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ core writes past Python's logging
    level = logging.INFO if verbose else logging.ERROR
    address = os.environ.get("RAY_ADDRESS")
    # Twice the cores: decoding tasks are short, and a stage's actors must fit beside them on the smallest laptop.
    local: dict[str, Any] = (
        {} if address else {"num_cpus": max(4, 2 * (os.cpu_count() or 1)), "include_dashboard": False}
    )
    environment: dict[str, Any] = {"env_vars": {n: os.environ[n] for n in _ENVIRONMENT}}
    if not address:
        # Workers of this machine find the package as this process did, from a clone that is not installed, too.
        paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        environment["env_vars"]["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if setup_hook:
        environment["worker_process_setup_hook"] = setup_hook
    with nullcontext() if verbose else _no_stderr():
        ray.init(
            address=address,
            log_to_driver=verbose,
            logging_level=level,
            runtime_env=environment,
            **local,
        )
    quiet(verbose=verbose)


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Ray's core announces its log level on the file descriptor itself; what goes wrong is raised all the same."""
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def quiet(*, verbose: bool = False) -> None:
    """Keep the progress bars and info messages of Ray Data, Train and Tune out of this process."""
    context = DataContext.get_current()
    context.enable_progress_bars = verbose
    if not verbose:
        for name in ("ray", "ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)


def cluster_gpus() -> float:
    """GPUs of the cluster as it is now."""
    return float(ray.cluster_resources().get("GPU", 0))


def device() -> torch.device:
    """The device of the calling actor or worker."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pool_size(compute: ComputeRecipe) -> int:
    """How many encoder actors the cluster takes: as asked, else one a GPU share, else one."""
    return compute.actors or max(1, int(cluster_gpus() / compute.gpus_per_actor))


def actor_resources(compute: ComputeRecipe) -> dict[str, float]:
    """What one encoder actor or training worker holds, as Ray's `num_cpus` and `num_gpus`.

    Raises:
        UserError: no node of the cluster could ever hold it.
    """
    gpus = compute.gpus_per_actor if cluster_gpus() else 0.0
    wanted = {"CPU": compute.cpus_per_actor, "GPU": gpus}
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    if not any(all(node.get(r, 0) >= amount for r, amount in wanted.items()) for node in nodes):
        raise UserError(
            f"no node of the cluster has {wanted['CPU']:g} CPUs and {gpus:g} GPUs, which an actor asks for: "
            "lower --cpus_per_actor or --gpus_per_actor"
        )
    return {"num_cpus": compute.cpus_per_actor, "num_gpus": gpus}


def encoder_pool(compute: ComputeRecipe) -> dict[str, Any]:
    """Arguments of `Dataset.map_batches` for a pool of encoder actors."""
    return {"compute": ActorPoolStrategy(min_size=1, max_size=pool_size(compute)), **actor_resources(compute)}


def training_workers(compute: ComputeRecipe) -> int:
    """How many workers train: as asked, else one a GPU share, else one."""
    return compute.workers or max(1, int(cluster_gpus() / compute.gpus_per_actor))


def check_shared(uri: str) -> None:
    """Refuse a local run folder on a cluster of several nodes, whose workers could not see it.

    Raises:
        UserError: such a folder.
    """
    nodes = sum(bool(n["Alive"]) for n in ray.nodes())
    if nodes > 1 and storage.is_local(uri):
        raise UserError(
            f"{uri} is a folder of one machine, and the cluster has {nodes} nodes: give --run a URI all can reach, as s3://bucket/run"
        )
