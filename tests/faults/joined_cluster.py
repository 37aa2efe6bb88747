"""Run a Ray cluster, a head without CPUs and one node with four, until standard input is closed.

A job that joins it connects to the head's raylet, because Ray prefers it, and works on the node. The only output is
JSON: the cluster's `address`, and the process ids of the raylets of its `head` and its `node`.
"""

import contextlib
import json
import os
import select
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
from ray.cluster_utils import Cluster

from transfgu.runtime import stopping

CPUS = 4


def main() -> None:
    """Start the cluster, wait, and end all of its processes."""
    stopping.adopt_orphans()  # what a killed raylet leaves behind
    head = {"num_cpus": 0, "include_dashboard": False, "dashboard_agent_listen_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    nodes = {"head": cluster.head_node, "node": cluster.add_node(num_cpus=CPUS)}
    raylets = {name: node.all_processes["raylet"][0].process.pid for name, node in nodes.items()}
    print(json.dumps({"address": cluster.address, **raylets}), flush=True)
    while not select.select([sys.stdin], [], [], 0.1)[0]:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)  # a worker's raylet lives, for the worker, until its end is noticed
    stopping.end_processes(psutil.Process().children(recursive=True))


if __name__ == "__main__":
    main()
