"""Connect to an existing Ray cluster if there is one, else start an embedded local one."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray

from transfgu.runtime import ray_internals
from transfgu.runtime.capacity import NODES, cluster_gpus

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
        ray_internals.stay_on_this_machine()
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
    ray_internals.show_progress_bars(verbose)
    if not verbose:
        for name in ("ray", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it raises what it calls an error, too
