"""Try what another user can do with the ports of a Ray cluster: `python intruder.py UID GCS_ADDRESS PORT ...`.

Prints JSON: for each port, the answer to each kind of request; and whether a function that workers run could be
replaced. The environment contains the token to try, if any. Root starts this, so that Python is found in any folder; it
becomes the other user before it does anything.
"""

import contextlib
import json
import os
import sys
import urllib.error
import urllib.request

import grpc  # type: ignore[import-untyped]
from ray import _raylet

METHODS = (
    "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "ray.rpc.InternalKVGcsService/InternalKVKeys",
    "ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "ray.rpc.NodeManagerService/GetNodeStats",
    "ray.rpc.NodeManagerService/GetSystemConfig",
    "ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "ray.rpc.CoreWorkerService/NumPendingTasks",
    "ray.rpc.ObjectManagerService/FreeObjects",
    "ray.rpc.RayletDriver/ClusterInfo",
    "ray.rpc.ReporterService/GetTraceback",
    "ray.rpc.LogService/ListLogs",
)
"""A harmless request to each of Ray's services: an empty message."""

PATHS = ("/api/version", "/api/jobs/", "/api/job_agent/jobs/", "/metrics", "/get_or_create_runtime_env")


def grpc_status(port: int, method: str) -> str:
    """Return the name of the status of a call without a message."""
    token = os.environ.get("RAY_AUTH_TOKEN")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(f"/{method}")
        try:
            call(b"", timeout=5, metadata=[("authorization", f"Bearer {token}")] if token else None)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def http_status(port: int, path: str) -> str:
    """Return the status of a GET, or the kind of error; `metrics` if Prometheus figures are returned for any path."""
    token = os.environ.get("RAY_AUTH_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers), timeout=5
        ) as answer:
            return "metrics" if answer.read(6) == b"# HELP" else str(answer.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except Exception as error:
        return type(error).__name__


def replaced_function(gcs: str) -> str:
    """Try to read the functions that the cluster's workers unpickle, and to replace one."""
    try:
        client = vars(_raylet)["GcsClient"](address=gcs)
        keys = client.internal_kv_keys(b"", b"fun", 10)
        if not keys:
            return "read"
        held = client.internal_kv_get(keys[0], b"fun", 10)
        client.internal_kv_put(keys[0], held, True, b"fun", 10)
    except Exception as error:
        return f"refused: {type(error).__name__}"
    return "replaced"


if __name__ == "__main__":
    user, gcs, ports = int(sys.argv[1]), sys.argv[2], [int(port) for port in sys.argv[3:]]
    # Modules that are loaded late may lie in folders that only root reads.
    grpc_status(1, METHODS[0])
    http_status(1, PATHS[0])
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    found = {
        port: {**{m: grpc_status(port, m) for m in METHODS}, **{p: http_status(port, p) for p in PATHS}}
        for port in ports
    }
    with contextlib.redirect_stdout(sys.stderr):
        function = replaced_function(gcs)
    print(json.dumps({"ports": found, "function": function, "user": os.getuid()}))
