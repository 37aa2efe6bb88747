"""Add or remove nodes in every stage of a run: `python changing_cluster.py RECIPE RUN removed|added`.

Real Ray nodes on one machine, with declared GPUs that don't exist; they share only the run's URI. The head has no CPU,
so all work is done on nodes that are added or removed. The last line of standard output is JSON: for each stage, its
seconds, when the cluster changed, and which process worked then.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
import ray
from ray.cluster_utils import Cluster

from transfgu import pipeline
from transfgu.methods import STAGES
from transfgu.recipe import Recipe, from_yaml
from transfgu.runtime import capacity as runtime
from transfgu.store import storage
from transfgu.store.artifacts import Run

NODE = {"CPU": 3, "GPU": 1}
NODES = 2
LOOK_SECONDS = 21.0  # Ray Data and Ray Train look for new nodes every 20 s
# A node that is gone is missed within seconds; left to itself Ray takes about a quarter of a minute.
QUICK = {
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
    "health_check_initial_delay_ms": 1000,
}
# What Ray calls the processes that do a stage's work.
AT_WORK = {
    "features": "MapBatches(EncodeWindows)",
    "concepts": "ray::KMeansActor",
    "pseudo_labels": "MapBatches(MapConcepts)",
    "training": "ray::RayTrainWorker",
    "evaluation": "MapBatches(Count)",
}


class Stage:
    """A stage that runs in another thread, because only the main thread adds nodes."""

    def __init__(self, cluster: Cluster, recipe: Recipe, run: Run, stage: str) -> None:
        self.cluster, self.run, self.stage = cluster, run, stage
        self._failure: list[BaseException] = []
        self._thread = threading.Thread(target=self._work, args=(recipe,))
        self._started = time.monotonic()
        self._changes: list[tuple[float, str]] = []
        self._thread.start()

    def _work(self, recipe: Recipe) -> None:
        try:
            pipeline.run_stages(recipe, self.run, until=self.stage)
        except BaseException as error:
            self._failure.append(error)

    def wait(self, there: Callable[[], Any]) -> Any:
        """Return the result of `there` once it is not empty."""
        while not (found := there()):
            if not self._thread.is_alive():
                raise SystemExit(f"{self.stage} ended before the cluster changed: {self._failure}")
            time.sleep(0.02)
        return found

    def began(self) -> bool:
        """Return True if there are files of the stage in the run's folder."""
        return bool(storage.list_files(self.run.file(self.stage)))

    def checkpointed(self) -> bool:
        """Return True if an epoch is complete."""
        return any(uri.endswith("digests.json") for uri in storage.list_files(self.run.file("ray")))

    def at_work(self) -> tuple[Any, str] | None:
        """Return a node that works on the stage, and the name of its process."""
        for node in self.cluster.worker_nodes:
            (raylet,) = node.all_processes["raylet"]
            for process in psutil.Process(raylet.process.pid).children():
                try:
                    name = " ".join(process.cmdline())
                except psutil.Error:
                    continue
                if AT_WORK[self.stage] in name and "__init__" not in name:  # it has started
                    return node, name.strip()
        return None

    def changed(self, what: str) -> None:
        """Record the time of the change."""
        self._changes.append((round(time.monotonic() - self._started, 1), what))

    def end(self) -> dict[str, Any]:
        """Wait for the stage's end; returns its record."""
        assert self._thread.is_alive(), f"{self.stage} had ended: {self._failure}"
        self._thread.join()
        if self._failure:
            raise self._failure[0]
        told = {"seconds": round(time.monotonic() - self._started, 1), "changes": self._changes}
        print(self.stage, told, flush=True)
        return told


def add_node(cluster: Cluster) -> None:
    """Add a node."""
    cluster.add_node(num_cpus=NODE["CPU"], num_gpus=NODE["GPU"])


def remove_all(cluster: Cluster) -> None:
    """Remove all nodes except the head."""
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node, allow_graceful=False)


def with_a_node_removed(cluster: Cluster, recipe: Recipe, run: Run, stage: str) -> dict[str, Any]:
    """Run a stage on two nodes, and kill one that works on it."""
    while len(cluster.worker_nodes) < NODES:
        add_node(cluster)
    if stage == "training":
        time.sleep(LOOK_SECONDS)  # or it might begin with the node that it knows
    work = Stage(cluster, recipe, run, stage)
    if stage == "training":  # so that there is something to go on from
        work.wait(work.checkpointed)
    node, process = work.wait(work.at_work)
    cluster.remove_node(node, allow_graceful=False)
    work.changed(process)
    return work.end()


def with_nodes_added(cluster: Cluster, recipe: Recipe, run: Run, stage: str) -> dict[str, Any]:
    """Start a stage on a head without CPUs, and add a node; add a second one to a training that has started."""
    remove_all(cluster)
    work = Stage(cluster, recipe, run, stage)
    work.wait(work.began)
    add_node(cluster)
    work.changed("the first node")
    work.wait(work.at_work)
    if stage == "training":
        work.wait(work.checkpointed)
        add_node(cluster)
        work.changed("the second node")
    return work.end()


def main(recipe_file: str, uri: str, how: str) -> None:
    """Change the cluster in every stage that works on it."""
    recipe, run = from_yaml(Path(recipe_file).read_text()), Run(uri)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "20"
    os.environ["TRANSFGU_DEVICE"] = "cpu"  # the GPUs are declared, not there
    os.environ[runtime.NODES] = json.dumps([{"count": NODES, **NODE}])
    head = {
        "num_cpus": 0,
        "num_gpus": 0,
        "include_dashboard": False,
        "dashboard_agent_listen_port": 0,
        "_system_config": QUICK,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    os.environ["RAY_ADDRESS"] = cluster.address
    pipeline.run_stages(recipe, run, until="samples")
    change = {"removed": with_a_node_removed, "added": with_nodes_added}[how]
    told = {stage: change(cluster, recipe, run, stage) for stage in STAGES[1:]}
    ray.shutdown()  # or this process would end as one that has lost its cluster
    cluster.shutdown()
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
