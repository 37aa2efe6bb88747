"""Count the actors and workers that the cluster can hold, now and after it has scaled up."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import ActorPoolStrategy

from transfgu.errors import UserError, counted
from transfgu.recipe import ComputeRecipe
from transfgu.store import storage

NODES = "TRANSFGU_NODES"
"""Environment variable with the nodes that a scaling cluster may have."""


_UNKNOWN_MEMORY = 4 << 30  # bytes of a node that an autoscaler is still to add


@dataclass(frozen=True)
class Nodes:
    """A number of nodes with the same resources."""

    resources: Mapping[str, float]
    """Resources of one node, with Ray's names: `CPU`, `GPU`."""
    count: int


def possible_nodes() -> list[Nodes]:
    """Return the nodes that the cluster may have: those that an autoscaler may add, and present ones of other kinds.

    Ray does not report what its autoscaler may add, so the definition of a cluster sets an environment variable on
    the head: ``TRANSFGU_NODES='[{"count": 8, "CPU": 4, "GPU": 1}]'``.

    Raises:
        UserError: the variable can't be read.
    """
    told = _told_nodes(os.environ.get(NODES, ""))
    told_kinds = [nodes.resources for nodes in told]
    return [*told, *(node for node in _nodes_there() if node.resources not in told_kinds)]


def every_possible_node() -> list[Mapping[str, float]]:
    """Return the resources of each node of :func:`possible_nodes`, one entry per node; raises the same errors."""
    return [nodes.resources for nodes in possible_nodes() for _ in range(nodes.count)]


_only: Nodes | None = None


def assume(node: Nodes | None) -> None:
    """Answer all questions as for a cluster of this node alone, without Ray; None: ask Ray again."""
    global _only
    _only = node


def _nodes_there() -> list[Nodes]:
    if _only is not None:
        return [_only]
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
            f'{NODES} must have the form {NODES}=\'[{{"count": 8, "CPU": 4, "GPU": 1}}]\', not {text}',
            code="nodes-invalid",
        ) from None


def present() -> tuple[int, float, float]:
    """Return the number of present nodes, of their CPUs and of their GPUs."""
    if _only is not None:
        return _only.count, _only.resources["CPU"], _only.resources["GPU"]
    resources = ray.cluster_resources()
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    return nodes, float(resources.get("CPU", 0)), float(resources.get("GPU", 0))


def task_memory() -> int:
    """Return the bytes of memory that a task may ask for so that two of them fit on each node that is there now."""
    living = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    held = [int(node["memory"]) for node in living if node.get("memory") and node.get("CPU", 0) >= 1]
    return min(held, default=_UNKNOWN_MEMORY) // 2


def cluster_gpus() -> float:
    """Return the number of GPUs that the cluster may have."""
    return sum(nodes.count * nodes.resources["GPU"] for nodes in possible_nodes())


def pool_size(compute: ComputeRecipe) -> int:
    """Return the maximum number of encoder actors: as asked, else one per GPU share, else one per node with room."""
    if compute.actors:
        return compute.actors
    gpus = cluster_gpus()
    if gpus:
        return max(1, int(gpus / compute.gpus_per_actor))
    return max(1, sum(nodes.count for nodes in possible_nodes() if _fit(nodes, compute.cpus_per_actor, 0.0)))


def actors_per_node(compute: ComputeRecipe) -> int:
    """Return the number of encoder actors that share the cores of a node when all of them run."""
    gpus = compute.gpus_per_actor if cluster_gpus() else 0.0
    holding = sum(nodes.count for nodes in possible_nodes() if _fit(nodes, compute.cpus_per_actor, gpus))
    return math.ceil(pool_size(compute) / max(1, holding))


def _fit(nodes: Nodes, cpus: float, gpus: float) -> int:
    """Return the number of actors with these resources that one of the nodes can hold."""
    wanted = (("CPU", cpus), ("GPU", gpus))
    return min(int(nodes.resources[r] / amount + 1e-9) for r, amount in wanted if amount > 0)


def actor_resources(compute: ComputeRecipe) -> dict[str, float]:
    """Return the resources of an encoder actor or training worker, as Ray's `num_cpus` and `num_gpus`.

    Raises:
        UserError: no node that the cluster may have could ever hold it.
    """
    gpus = compute.gpus_per_actor if cluster_gpus() else 0.0
    if not any(_fit(nodes, compute.cpus_per_actor, gpus) for nodes in possible_nodes()):
        raise UserError(
            f"no node of the cluster has {counted(compute.cpus_per_actor, 'CPU')} and {counted(gpus, 'GPU')}, which "
            "an actor requires: lower --cpus_per_actor or --gpus_per_actor",
            code="cluster-too-small",
        )
    return {"num_cpus": compute.cpus_per_actor, "num_gpus": gpus}


def check_satisfiable(compute: ComputeRecipe) -> None:
    """Refuse, before anything starts, an actor, worker or task that no node can hold and that would wait forever.

    Raises:
        UserError: there is one; the message gives the possible number.
    """
    resources = actor_resources(compute)
    cpus, gpus = resources["num_cpus"], resources["num_gpus"]
    nodes = possible_nodes()
    room = sum(kind.count * _fit(kind, cpus, gpus) for kind in nodes)
    if compute.workers > room:
        raise UserError(
            f"the cluster has room for {counted(room, 'training worker')} of {counted(cpus, 'CPU')} and "
            f"{counted(gpus, 'GPU')}, but {compute.workers} are requested: lower --workers",
            code="cluster-too-small",
        )
    # An actor is of no use without the task of one CPU that feeds it.
    least = max(1, compute.workers) * cpus + 1
    total = sum(kind.count * kind.resources["CPU"] for kind in nodes)
    if total < least:
        raise UserError(
            f"Ray counts {counted(total, 'CPU')} in the cluster, but {least:g} are needed, one of them to read images: "
            "add CPUs, or lower --cpus_per_actor or --workers",
            code="cluster-too-small",
        )


def encoder_pool(compute: ComputeRecipe) -> dict[str, Any]:
    """Return the arguments of `Dataset.map_batches` for a pool of encoder actors."""
    size = ActorPoolStrategy(min_size=1, max_size=pool_size(compute), initial_size=_first_actors(compute))
    return {"compute": size, **actor_resources(compute)}


def _first_actors(compute: ComputeRecipe) -> int:
    """Return the initial number of encoder actors: as many as the present nodes hold, with two other tasks.

    These tasks read and write. A pool that grows from one actor only gets its share of the CPUs that Ray Data has not
    reserved for reading and writing: if an actor takes more than a third of a node, this is less than one per node.
    """
    resources, nodes = actor_resources(compute), _nodes_there()
    held = [_fit(node, resources["num_cpus"], resources["num_gpus"]) for node in nodes]
    if not resources["num_gpus"]:
        held = [min(1, actors) for actors in held]
    room = int((sum(node.resources["CPU"] for node in nodes) - 2) / resources["num_cpus"] + 1e-9)
    return max(1, min(pool_size(compute), sum(held), room))


def training_workers(compute: ComputeRecipe) -> int:
    """Return the maximum number of training workers: as asked, else one per possible GPU share, else one."""
    return compute.workers or max(1, int(cluster_gpus() / compute.gpus_per_actor))


def elastic_workers(compute: ComputeRecipe) -> int | tuple[int, int]:
    """Return the range of an elastic number of training workers: as asked, else from one to all possible ones."""
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
            f"{uri} is a folder of one machine, but the cluster has {nodes} nodes: give {flag} a URI that all reach, "
            "such as s3://bucket/run",
            code="folder-local",
        )
