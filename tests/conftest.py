"""Fixtures that every test may use; annotations of the library are checked at run time while tests run."""

import multiprocessing
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from jaxtyping import install_import_hook

# Tests are tiny: more threads would only wait for each other. Before torch and FAISS are imported, here and in workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("transfgu", deadline=None)
hypothesis.settings.load_profile("transfgu")

# Shapes and types in signatures are promises: the suite runs with every one of them checked.
install_import_hook("transfgu", "beartype.beartype")

Arrays = dict[str, np.ndarray]


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
    """Two fresh processes, for what is distributed without Ray: `torch.distributed` over the loopback device."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster, shared by all tests of the session."""
    import ray

    from tests import worker_coverage
    from transfgu import runtime

    runtime.connect(setup_hook=worker_coverage.start if worker_coverage.wanted() else None)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of an S3 server: that of `AWS_ENDPOINT_URL_S3` (with the keys beside it), else moto's, started here."""
    if "AWS_ENDPOINT_URL_S3" in os.environ:
        yield os.environ["AWS_ENDPOINT_URL_S3"]
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of an empty S3 bucket, with the environment set to reach it."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL_S3": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "key-of-the-tests",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    bucket = f"transfgu-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"
