"""Run a scaling cluster on one machine, with real Ray nodes and Ray's own autoscaler; only the machines are simulated.

`python cluster/simulated.py -- python jobs/train.py shapes --run s3://bucket/run` starts a head of two CPUs, runs the
command on it, and stops the cluster. GPU nodes start when work waits for them and stop when they are idle; their number
is printed on standard error. Their GPUs don't exist: the work is done on CPUs.

The processes of a simulated node belong to the autoscaler, and outlive it. So the cluster has its own process
namespace, and all its processes end with it.
"""

import argparse
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INSIDE = "TRANSFGU_SIMULATED"  # set inside the cluster's own process namespace
NODE = {"CPU": 2, "GPU": 1}
OBJECTS = 512 << 20  # bytes of a node's object store, because all nodes share the machine's memory
START_SECONDS = 120
SHRINK_SECONDS = 60
HEAD = "ray.head.default"


def configuration(nodes: int, port: int) -> dict[str, Any]:
    """Return the content for `ray start --autoscaling-config`: like `ray_cluster.yaml`, with a simulated provider."""
    empty_lists = (
        *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
        *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
        *("rsync_exclude", "rsync_filter"),
    )
    return {
        "cluster_name": "simulated",
        "max_workers": nodes,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 4.0,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "head_node_id": "f" * 51 + "00000",  # the id that Ray itself uses
            "gcs_address": f"127.0.0.1:{port}",
        },
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in empty_lists},
        "file_mounts_sync_continuously": False,
        "head_node_type": HEAD,
        "available_node_types": {
            HEAD: {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "gpu": {
                "resources": {**NODE, "object_store_memory": OBJECTS},
                "node_config": {},
                "min_workers": 0,
                "max_workers": nodes,
            },
        },
    }


def environment(nodes: int, port: int) -> dict[str, str]:
    """Return environment variables for the head and its jobs, in addition to those of this process."""
    return {
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # nodes of such clusters use the loopback device, as these do
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "TRANSFGU_NODES": json.dumps([{"count": nodes, **NODE}]),
        "TRANSFGU_DEVICE": "cpu",  # the GPUs are declared but don't exist
        # Workers import the package from this clone.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }


def run(command: list[str], nodes: int) -> int:
    """Start the cluster, run `command` on it, and wait until it has shrunk; returns the command's exit status."""
    port, client_port = _free_port(), _free_port()
    os.environ.update(environment(nodes, port))
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # it contains sockets, whose paths must be short
    file, log = folder / "cluster.json", folder / "head.log"
    file.write_text(json.dumps(configuration(nodes, port)))
    start = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *(f"--port={port}", f"--ray-client-server-port={client_port}", "--dashboard-agent-listen-port=0"),
        *("--num-cpus=2", "--num-gpus=0", f"--object-store-memory={OBJECTS}", "--include-dashboard=false"),
        *(f"--autoscaling-config={file}", f"--temp-dir={folder}"),
    ]
    try:
        with log.open("w") as output:
            # Ctrl-C is handled by the command, which stops as it does elsewhere.
            head = subprocess.Popen(start, stdout=output, stderr=output, start_new_session=True)
        signal.signal(signal.SIGINT, lambda *_: None)
        _join(port, head, log)
        ended = threading.Event()
        teller = threading.Thread(target=_tell_nodes, args=(ended,), daemon=True)
        teller.start()
        try:
            status = subprocess.run(command, check=False).returncode
            return status if status >= 0 else 128 - status  # stopped by a signal: the status that a shell returns
        except OSError as error:
            sys.exit(f"can't run {command[0]}: {error.strerror}")
        finally:
            signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
            _wait_until_shrunk()
            ended.set()
            teller.join()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _join(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    """Connect this process to the head, to list its nodes."""
    import ray

    deadline = time.monotonic() + START_SECONDS
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        if head.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"Ray's head did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)
    ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR, namespace="observer")


def _gpu_nodes() -> int:
    import ray

    return sum("GPU" in node["Resources"] for node in ray.nodes() if node["Alive"])


def _tell_nodes(ended: threading.Event) -> None:
    """Print the number of GPU nodes whenever it changes."""
    started, before = time.monotonic(), -1
    while not ended.wait(0.2):
        now = _gpu_nodes()
        if now != before:
            print(f"[{time.monotonic() - started:.1f} s] GPU nodes: {now}", file=sys.stderr, flush=True)
            before = now


def _wait_until_shrunk() -> None:
    deadline = time.monotonic() + SHRINK_SECONDS
    while _gpu_nodes() and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(0.5)  # so that the last change is printed


def _enter() -> None:
    """Start this program again in a namespace with only the cluster's processes."""
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if os.geteuid():
        unshare += ["--user", "--map-root-user"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit("a simulated cluster requires Linux and its command `unshare` (package util-linux)")
    except subprocess.CalledProcessError as error:
        sys.exit(f"a simulated cluster needs its own process namespace, but {error.stderr.strip()}: run it as root")
    os.environ[INSIDE] = "1"
    os.execvp("unshare", [*unshare, sys.executable, *sys.argv])


def main() -> None:
    """Parse the command line, and run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2, help="maximum number of GPU nodes (default: 2)")
    parser.add_argument("command", nargs="+", help="command to run on the cluster, after --")
    arguments = parser.parse_args()
    if arguments.nodes < 1:
        parser.error(f"--nodes must be positive, not {arguments.nodes}")
    if INSIDE not in os.environ:
        _enter()
    sys.exit(run(arguments.command, arguments.nodes))


if __name__ == "__main__":
    main()
