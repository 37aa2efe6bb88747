"""One place that knows how the process meets Ray: an existing cluster if there is one, else an embedded local one.

Everything above asks for resources in the recipe's terms; everything below is Ray's.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray._private import ray_constants
from ray.data import ActorPoolStrategy, DataContext

from transfgu.errors import UserError
from transfgu.recipe import ComputeRecipe
from transfgu.store import storage

# Threads that spin while they wait burn what other processes of a small machine need: four times the CPU for a step.
# glibc returns large blocks to the kernel at every free; faulting them in again costs a third of a small ViT's time.
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # what a submitted job's environment sets may be said again by the job
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


_embedded = False

NODES = "TRANSFGU_NODES"
"""Environment variable in which a cluster that scales says what nodes it may come to have."""


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
    local: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    if address:
        # A process on any node must find the same nodes possible as this one does.
        environment["env_vars"] = {n: os.environ[n] for n in (*_ENVIRONMENT, NODES) if n in os.environ}
    else:
        # Twice the cores: decoding tasks are short, and a stage's actors must fit beside them on the smallest laptop.
        local = {"num_cpus": max(4, 2 * (os.cpu_count() or 1)), "include_dashboard": False}
        # Nobody takes this machine away with a warning: there is nothing to watch for, by a process of its own.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Its ports are open to this machine alone, as Ray has them where there can't be a cluster (macOS).
        ray_constants.ENABLE_RAY_CLUSTER = False
    if setup_hook:
        environment["worker_process_setup_hook"] = setup_hook
    with nullcontext() if verbose else _no_stderr(), nullcontext() if address else _workers_find_the_package():
        ray.init(
            # Left to itself Ray joins whatever cluster this machine has a trace of.
            address=address or "local",
            log_to_driver=verbose,
            logging_level=level,
            runtime_env=environment or None,
            **local,
        )
    global _embedded
    _embedded = not address
    quiet(verbose=verbose)


def works_here() -> bool:
    """Whether this process does itself what is a single block of work, sooner than an actor for it would have started.

    So it is where Ray was started for this process alone and no GPU is to be shared: starting takes an actor that
    encodes six seconds, most of them to import what this process has imported already.
    """
    return _embedded and not cluster_gpus()


@contextmanager
def _workers_find_the_package() -> Iterator[None]:
    """Processes of a cluster that starts meanwhile find it as this one did, from a clone that is not installed, too.

    They inherit this as they do the rest of the environment. Said in a `runtime_env`, the processes that Ray starts in
    advance would be of no use, for they have none.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


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
        for name in ("ray", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it raises what it calls an error, too


@dataclass(frozen=True)
class Nodes:
    """So many nodes of one kind."""

    resources: Mapping[str, float]
    """Of one of them, as Ray names them: `CPU`, `GPU`."""
    count: int


def possible_nodes() -> list[Nodes]:
    """The nodes that the cluster may come to have: those an autoscaler may add, and those of other kinds now there.

    Ray keeps to itself what its autoscaler may add, so whoever defines a cluster says so in the environment of its
    head: ``TRANSFGU_NODES='[{"count": 8, "CPU": 4, "GPU": 1}]'``.

    Raises:
        UserError: that variable can't be read.
    """
    told = _told_nodes(os.environ.get(NODES, ""))
    told_kinds = [nodes.resources for nodes in told]
    return [*told, *(node for node in _nodes_there() if node.resources not in told_kinds)]


def every_possible_node() -> list[Mapping[str, float]]:
    """Resources of each of :func:`possible_nodes`, one by one; raises what that raises."""
    return [nodes.resources for nodes in possible_nodes() for _ in range(nodes.count)]


def _nodes_there() -> list[Nodes]:
    living = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Nodes({r: float(node.get(r, 0)) for r in ("CPU", "GPU")}, 1) for node in living]


def _told_nodes(text: str) -> list[Nodes]:
    try:
        rows = json.loads(text or "[]")
        return [
            Nodes({r: float(row.get(r, 0)) for r in ("CPU", "GPU")}, count)
            for row in rows
            if (count := int(row["count"])) > 0
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f'{NODES} must read as in {NODES}=\'[{{"count": 8, "CPU": 4, "GPU": 1}}]\', not {text}'
        ) from None


def cluster_gpus() -> float:
    """GPUs that the cluster may come to have."""
    return sum(nodes.count * nodes.resources["GPU"] for nodes in possible_nodes())


def device() -> torch.device:
    """The device of the calling actor or worker."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pool_size(compute: ComputeRecipe) -> int:
    """How many encoder actors at most: as asked, else one a GPU share, else one a node that can hold one."""
    if compute.actors:
        return compute.actors
    gpus = cluster_gpus()
    if gpus:
        return max(1, int(gpus / compute.gpus_per_actor))
    return max(1, sum(nodes.count for nodes in possible_nodes() if _fit(nodes, compute.cpus_per_actor, 0.0)))


def actors_per_node(compute: ComputeRecipe) -> int:
    """How many encoder actors share a node's cores, when there are as many as there may be."""
    gpus = compute.gpus_per_actor if cluster_gpus() else 0.0
    holding = sum(nodes.count for nodes in possible_nodes() if _fit(nodes, compute.cpus_per_actor, gpus))
    return math.ceil(pool_size(compute) / max(1, holding))


def _fit(nodes: Nodes, cpus: float, gpus: float) -> int:
    """How many actors of these resources one of the nodes can hold."""
    wanted = (("CPU", cpus), ("GPU", gpus))
    return min(int(nodes.resources[r] / amount + 1e-9) for r, amount in wanted if amount > 0)


def actor_resources(compute: ComputeRecipe) -> dict[str, float]:
    """What one encoder actor or training worker holds, as Ray's `num_cpus` and `num_gpus`.

    Raises:
        UserError: no node that the cluster may come to have could ever hold it.
    """
    gpus = compute.gpus_per_actor if cluster_gpus() else 0.0
    if not any(_fit(nodes, compute.cpus_per_actor, gpus) for nodes in possible_nodes()):
        raise UserError(
            f"no node of the cluster has {compute.cpus_per_actor:g} CPUs and {gpus:g} GPUs, which an actor asks for: "
            "lower --cpus_per_actor or --gpus_per_actor"
        )
    return {"num_cpus": compute.cpus_per_actor, "num_gpus": gpus}


def check_satisfiable(compute: ComputeRecipe) -> None:
    """Find out before anything starts what would wait for ever: an actor, a worker or a task that no node can hold.

    Raises:
        UserError: such a one; the message says how many there may be.
    """
    resources = actor_resources(compute)
    cpus, gpus = resources["num_cpus"], resources["num_gpus"]
    nodes = possible_nodes()
    room = sum(kind.count * _fit(kind, cpus, gpus) for kind in nodes)
    if compute.workers > room:
        raise UserError(
            f"the cluster has room for {room} training workers of {cpus:g} CPUs and {gpus:g} GPUs, and "
            f"{compute.workers} are asked for: lower --workers"
        )
    # An actor is of no use without the task of one CPU that feeds it.
    least = max(1, compute.workers) * cpus + 1
    total = sum(kind.count * kind.resources["CPU"] for kind in nodes)
    if total < least:
        raise UserError(
            f"the cluster has {total:g} CPUs, and {least:g} are needed, one of them to read images: add CPUs, or lower "
            "--cpus_per_actor or --workers"
        )


def encoder_pool(compute: ComputeRecipe) -> dict[str, Any]:
    """Arguments of `Dataset.map_batches` for a pool of encoder actors."""
    size = ActorPoolStrategy(min_size=1, max_size=pool_size(compute), initial_size=_first_actors(compute))
    return {"compute": size, **actor_resources(compute)}


def _first_actors(compute: ComputeRecipe) -> int:
    """How many encoder actors begin at once: those that the nodes there can hold, beside one task that reads for them
    and one that writes.

    Left to grow, a pool gets its share of what CPUs Ray Data has not set aside for reading and writing: where an actor
    takes more than a third of a node, that is not enough for one a node.
    """
    resources, nodes = actor_resources(compute), _nodes_there()
    held = [_fit(node, resources["num_cpus"], resources["num_gpus"]) for node in nodes]
    if not resources["num_gpus"]:
        held = [min(1, actors) for actors in held]
    room = int((sum(node.resources["CPU"] for node in nodes) - 2) / resources["num_cpus"] + 1e-9)
    return max(1, min(pool_size(compute), sum(held), room))


def training_workers(compute: ComputeRecipe) -> int:
    """How many workers train at most: as asked, else one a GPU share that the cluster may come to have, else one."""
    return compute.workers or max(1, int(cluster_gpus() / compute.gpus_per_actor))


def elastic_workers(compute: ComputeRecipe) -> int | tuple[int, int]:
    """How many workers train, where their number may change: as asked, else from one to all that there may be."""
    most = training_workers(compute)
    return most if compute.workers or most == 1 else (1, most)


def check_shared(uri: str, flag: str = "--run") -> None:
    """Refuse a local folder, given by `flag`, on a cluster of several nodes, whose workers could not see it.

    Raises:
        UserError: such a folder.
    """
    nodes = sum(kind.count for kind in possible_nodes())
    if nodes > 1 and storage.is_local(uri):
        raise UserError(
            f"{uri} is a folder of one machine, and the cluster has {nodes} nodes: give {flag} a URI all can reach, "
            "as s3://bucket/run"
        )
