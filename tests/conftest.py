"""Define fixtures for all tests; annotations of the library are checked at run time in tests."""

import atexit
import functools
import gc
import multiprocessing
import os
import socket
import socketserver
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from jaxtyping import install_import_hook

from tests import typechecking

# Tests are tiny: more threads would only wait for each other. Before torch and FAISS are imported, here and in workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # where the library asks for more
# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("transfgu", deadline=None)
hypothesis.settings.load_profile("transfgu")

# Shapes and types in signatures are promises: the suite runs with every one of them checked.
install_import_hook("transfgu", f"{typechecking.__name__}.check_when_called")

# What is imported stays: looking through it again and again for garbage takes a tenth of the time.
gc.set_threshold(200_000, 20, 100)

Arrays = dict[str, np.ndarray]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options of the fuzzer in `tests/fuzz`."""
    parser.addoption("--fuzz-seconds", type=float, default=0.0, help="seconds in all; 0: a few cases of each kind")
    parser.addoption("--fuzz-seed", type=int, default=0, help="of the cases")


@pytest.hookimpl(tryfirst=True)  # before those that select by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of `two_processes`; skip those marked `gpu` on a machine without one.

    `TRANSFGU_GPU_TESTS=cpu` runs `tests/gpu` on the CPU.
    """
    for item in items:
        if "two_processes" in getattr(item, "fixturenames", ()):
            item.add_marker("processes")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    tried = os.environ.get("TRANSFGU_GPU_TESTS") == "cpu"
    if not torch.cuda.is_available():
        for item in marked:
            if not (tried and item.path.parent.name == "gpu"):
                item.add_marker(pytest.mark.skip(reason="torch finds no GPU"))


def pytest_collection_finish() -> None:
    """Exempt what is imported from garbage collection: a search through it takes half a second."""
    gc.freeze()
    atexit.register(gc.unfreeze)


_ray_is_expected = False
_started: list[str] = []


def _record_programs() -> None:
    """Replace the functions that start programs and servers by ones that also record it in `_started`."""
    start_program, start_process = subprocess.Popen.__init__, BaseProcess.start
    start_server = socketserver.BaseServer.__init__

    @functools.wraps(start_program)
    def program(self: subprocess.Popen[Any], *args: Any, **kwargs: Any) -> None:
        _started.append(str(args[0] if args else kwargs["args"]))
        start_program(self, *args, **kwargs)

    @functools.wraps(start_process)
    def process(self: BaseProcess) -> None:
        _started.append(f"{self}")
        start_process(self)

    @functools.wraps(start_server)
    def server(self: socketserver.BaseServer, *args: Any, **kwargs: Any) -> None:
        _started.append(f"{self}")
        start_server(self, *args, **kwargs)

    subprocess.Popen.__init__, BaseProcess.start = program, process  # type: ignore[method-assign]
    socketserver.BaseServer.__init__ = server  # type: ignore[method-assign]


_record_programs()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Record whether a test so far was marked `ray`."""
    global _ray_is_expected
    _ray_is_expected |= item.get_closest_marker("ray") is not None
    _started.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Fail a test that starts Ray, a program or a server without the mark that says so: each takes time."""
    yield
    ray = sys.modules.get("ray")
    if not _ray_is_expected and ray is not None and ray.is_initialized():
        pytest.fail(f"{item.nodeid} started Ray: mark it `ray`")
    if _started and not any(item.get_closest_marker(name) for name in ("processes", "s3", "ray", "trackers", "long")):
        pytest.fail(f"{item.nodeid} started {_started[0]}: mark it `processes`")


@pytest.fixture(scope="session")
def samples() -> Path:
    """Folder of a few real images and labels in each benchmark's official layout."""
    if "TRANSFGU_SAMPLES" not in os.environ:
        pytest.skip("TRANSFGU_SAMPLES is unset: it names a folder of real samples (coco, voc, cityscapes, lip)")
    return Path(os.environ["TRANSFGU_SAMPLES"]).resolve()


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Arrays]:
    """Reader of the reference vectors by name, such as ``encoder``."""

    def read(name: str) -> Arrays:
        with np.load(Path(__file__).parent / "reference" / f"{name}.npz") as file:
            return dict(file)

    return read


@pytest.fixture(scope="session")
def two_processes() -> Iterator[ProcessPoolExecutor]:
    """Two more processes, for tests distributed without Ray: `torch.distributed` over the loopback device."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    # Forked, as PyTorch's own data loaders are: fresh ones would spend ten seconds on imports. OpenMP's threads are not
    # there after a fork: one that waited for them, as some test had more than one, would wait for ever.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(2, mp_context=fork, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


replaced: list[Callable[[], bool]] = []
"""The function `works_here` of the connection, once a cluster was started for the tests."""


@pytest.fixture(scope="session")
def ray_cluster(s3_environment: str) -> Iterator[None]:
    """One local cluster for all tests of the session."""
    import ray

    from tests import worker_coverage
    from transfgu.runtime import connect as runtime_connect

    runtime_connect.connect(setup_hook=worker_coverage.start if worker_coverage.wanted() else None)
    with pytest.MonkeyPatch.context() as patch:
        # Stages should pass through Ray, however little there is for them.
        replaced.append(runtime_connect.works_here)
        patch.setattr(runtime_connect, "works_here", lambda: False)
        yield
    ray.shutdown()


@pytest.fixture
def small_work_here(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster as users have it: a single block of work runs in the calling process."""
    from transfgu.runtime import connect as runtime_connect

    monkeypatch.setattr(runtime_connect, "works_here", replaced[-1])


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put caches of decoded images into a folder of the session; Ray's workers inherit the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSFGU_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if it starts Ray."""
    from transfgu.runtime import connect as runtime_connect

    def connect(**_: object) -> None:
        pytest.fail("Ray was started")

    monkeypatch.setattr(runtime_connect, "connect", connect)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has no cluster and no GPU, and in which an attempt to start Ray fails the test."""
    import ray
    import torch

    from transfgu.runtime import capacity, connect

    for works_here in replaced:
        monkeypatch.setattr(connect, "works_here", works_here)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    yield
    capacity.assume(None)


REAL_S3 = "AWS_ENDPOINT_URL_S3" in os.environ
"""Return True if the tests use the caller's S3 server instead of moto, which checks no key."""


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[str]:
    """URL of the S3 endpoint: that of `AWS_ENDPOINT_URL_S3` (with its keys), or that of moto.

    It is set before Ray starts, because Ray's workers inherit the environment of that moment.
    """
    if REAL_S3:
        yield os.environ["AWS_ENDPOINT_URL_S3"]
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL_S3": url,
            "AWS_ACCESS_KEY_ID": "key-of-the-tests",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        yield url


@pytest.fixture(scope="session")
def s3_endpoint(s3_environment: str) -> Iterator[str]:
    """URL of a running S3 server; moto's is started here."""
    if REAL_S3:
        yield s3_environment
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(s3_environment.rpartition(":")[2]), verbose=False)
    server.start()
    yield s3_environment
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str) -> str:
    """URI of an empty S3 bucket, which the environment makes accessible."""
    import boto3

    bucket = f"transfgu-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"
