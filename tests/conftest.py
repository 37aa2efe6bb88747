"""Fixtures that every test may use; annotations of the library are checked at run time while tests run."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import install_import_hook

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
def ray_cluster() -> Iterator[None]:
    """One local cluster, shared by all tests of the session."""
    import ray

    from transfgu import runtime

    runtime.connect()
    yield
    ray.shutdown()
