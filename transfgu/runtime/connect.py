"""Connect to an existing Ray cluster if there is one, otherwise start an embedded local one.

Everyone who reaches a port of Ray can run code, so the embedded cluster requires a random token that only this user's
processes have, and keeps its sockets and logs in a folder that only this user can enter.
"""

import atexit
import logging
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import ray

from transfgu.errors import UserError
from transfgu.runtime import capacity, ray_internals, ray_watch, stopping
from transfgu.runtime.capacity import NODES, cluster_gpus
from transfgu.runtime.folders import RayFolders

# Threads that spin while they wait use CPU time that other processes need: four times as much per step. glibc returns
# large blocks to the kernel at every free; page faults for new ones take a third of a small ViT's time.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # a job may set variables of its submitted environment again
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""Variables for Ray's processes, unless the environment has others."""
OF_EMBEDDED = {
    # This machine is not preempted, so no process needs to watch for a warning.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # No dashboard shows metrics and records of tasks, for which Ray's processes would keep 4 KB per task.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
}
"""Further variables of an embedded cluster, unless the environment has others."""
_PATIENT_SECONDS = 150.0  # Ray's time to start in the second attempt; in the first it is 30 s
_ADDRESS_SECONDS = 5.0

FOLDERS = RayFolders()
"""Folders of the embedded cluster that this process has started."""
_embedded = False


def connect(
    *,
    verbose: bool = False,
    setup_hook: Callable[[], None] | None = None,
    single_process: bool = False,
    answer_seconds: float = 15.0,
) -> None:
    """Join the cluster in `RAY_ADDRESS` (set by `ray job submit`), or start an embedded one on this machine.

    Args:
        verbose: show Ray's own messages, and keep its logs until the next start.
        setup_hook: called in every worker process before its first task.
        single_process: the work needs one process only, such as a dry run or a single block, for which no embedded
            cluster is started on a machine without GPUs: it runs in this process (:func:`works_here`).
        answer_seconds: maximum time for a cluster at `RAY_ADDRESS` to answer [seconds].

    Raises:
        UserError: no cluster answers at `RAY_ADDRESS`, or Ray does not start on this machine.
    """
    capacity.assume(None)
    if ray.is_initialized():
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ core does not use Python's logging
    address = os.environ.get("RAY_ADDRESS", "").strip()
    settings: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }
    environment: dict[str, Any] = {"worker_process_setup_hook": setup_hook} if setup_hook else {}
    global _embedded
    _embedded = address in ("", "local")
    if _embedded and single_process and not _has_gpu():
        capacity.assume(capacity.Nodes({"CPU": float(_cpus()), "GPU": 0.0}, 1))
    elif _embedded:
        _start({**settings, "runtime_env": environment or None}, verbose=verbose)
    else:
        # Processes on all nodes must compute with the same possible nodes as this one.
        environment["env_vars"] = {n: os.environ[n] for n in (*ENVIRONMENT, NODES) if n in os.environ}
        _join(address, {**settings, "runtime_env": environment}, answer_seconds, verbose=verbose)
    quiet(verbose=verbose)


def disconnect() -> None:
    """Leave the cluster; stop an embedded one and remove its folder."""
    ray_watch.stop()
    if ray.is_initialized():
        ray.shutdown()
    FOLDERS.remove()


def _join(address: str, settings: dict[str, Any], answer_seconds: float, *, verbose: bool) -> None:
    """Join a cluster, after a check that one answers at the address: Ray itself would wait for minutes."""
    remedy = "unset RAY_ADDRESS to use this machine alone, or name the cluster as HOST:PORT"
    if address == "auto":
        address = ray_internals.address_on_this_machine()
        if not address:
            raise UserError(f"RAY_ADDRESS=auto finds no cluster on this machine: {remedy}", code="ray-address-unknown")
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16 or address.startswith("http"):
        raise UserError(
            f"RAY_ADDRESS={address} is not HOST:PORT of a Ray cluster: {remedy}", code="ray-address-invalid"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ADDRESS_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error.strerror or error}): start it, or {remedy}",
            code="ray-address-unreachable",
        ) from None
    wrong_token = UserError(
        f"the Ray cluster at RAY_ADDRESS={address} refuses this process: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to "
        "the cluster's token",
        code="ray-token-wrong",
    )
    with nullcontext() if verbose else _no_stderr(), stopping.handlers_kept():
        if "://" not in address and os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
            status = ray_internals.gcs_status(address, _token(), answer_seconds)
            if status == "UNAUTHENTICATED":
                raise wrong_token
            if status in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL", "UNKNOWN"):
                raise UserError(
                    f"no Ray cluster answers at RAY_ADDRESS={address} ({status.lower()}): start it, or {remedy}",
                    code="ray-address-unreachable",
                )
        try:
            ray.init(address=address, **settings)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            told = str(error)
            if "token" in told.lower() or "authenticat" in told.lower():
                raise wrong_token from None
            raise UserError(
                f"can't join the Ray cluster at RAY_ADDRESS={address} ({_first_line(error)}): check that it runs, or "
                f"{remedy}",
                code="ray-address-unreachable",
            ) from None
    if not address.startswith("ray://"):  # then the connection to the cluster is no raylet of this machine
        ray_watch.start_joined()


def _token() -> str:
    """Return the token that Ray will send to a cluster, found where Ray looks for it; empty if there is none."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return ""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    try:
        return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser().read_text().strip()
    except (OSError, ValueError, RuntimeError):
        return ""


def _start(settings: dict[str, Any], *, verbose: bool) -> None:
    """Start an embedded cluster; try a second time, with more patience, if the machine was too busy for the first.

    Raises:
        UserError: Ray does not start, or there is no folder for it.
    """
    for name, value in OF_EMBEDDED.items():
        os.environ.setdefault(name, value)
    # Its ports are open to this machine only, as Ray does where there can't be a cluster (macOS).
    ray_internals.stay_on_this_machine()
    # Ray turns authentication on by itself, unless the mode is set. Its own token is in a file of the home folder
    # that others may be able to read.
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    before = set(psutil.Process().children(recursive=True))
    for more_seconds in (0.0, _PATIENT_SECONDS):
        folder, spill = FOLDERS.make(keep=verbose)
        if not verbose:
            atexit.unregister(disconnect)
            atexit.register(disconnect)
            stopping.at_end(FOLDERS.remove)
        with (
            nullcontext() if verbose else _no_stderr(),
            _workers_find_the_package(),
            ray_internals.patience(more_seconds),
            stopping.handlers_kept(),
        ):
            try:
                ray.init(
                    # By default Ray joins any cluster of which this machine has a trace.
                    address="local",
                    num_cpus=_cpus(),
                    include_dashboard=False,
                    _temp_dir=str(folder / "r"),  # Ray opens this folder to all users, but not its parent
                    object_spilling_directory=spill,
                    **settings,
                )
                ray_watch.start()
                atexit.register(ray_watch.stop)  # runs before Ray's own, which were registered earlier
                return
            except Exception as error:
                cause = error
        if stopping.requested():
            raise KeyboardInterrupt
        # Ray records its processes only after all have started.
        stopping.end_processes(set(psutil.Process().children(recursive=True)) - before)
        with suppress(Exception):
            ray.shutdown()
        FOLDERS.remove()
        if not more_seconds:
            print(f"Ray did not start ({_first_line(cause)}): trying again", file=sys.stderr, flush=True)
    raise UserError(
        f"Ray does not start on this machine ({_first_line(cause)}), whose load is {os.getloadavg()[0]:.0f} on "
        f"{os.cpu_count()} cores: stop other work, free memory, or set RAY_ADDRESS to a running cluster",
        code="ray-start",
    ) from None


def _has_gpu() -> bool:
    import torch  # already imported by callers with work for one process

    return torch.cuda.is_available()


def _cpus() -> int:
    """Return twice the number of cores: decoding tasks are short, and small machines need room for a stage's actors."""
    return max(4, 2 * (os.cpu_count() or 1))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".:")


def is_embedded() -> bool:
    """Return True if the cluster is this process's own, on this machine."""
    return _embedded


def works_here() -> bool:
    """Return True if a single block should run in this process, because starting an actor would take longer.

    This is the case if Ray was started for this process alone and there is no GPU to share: an encoder actor needs six
    seconds to start, mostly for imports that this process has already done.
    """
    return _embedded and not cluster_gpus()


@contextmanager
def _workers_find_the_package() -> Iterator[None]:
    """Let processes of a cluster started in this block find the package, even in a clone that is not installed.

    They inherit the variable with the rest of the environment. In a `runtime_env` it would make the processes that Ray
    starts in advance unusable.
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
    """Silence Ray's core, which writes its log level to the file descriptor itself; errors are still raised."""
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
    ray_internals.show_progress_bars(verbose)
    if not verbose:
        for name in ("ray", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors that it logs are also raised
