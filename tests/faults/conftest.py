"""Provide the undisturbed run and the data of other jobs, each made once."""

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import boto3
import pytest
import safetensors.torch
import torch

from tests.faults.harness import timed_run, write_data
from tests.faults.jobs import IMAGES, Data
from tests.made_run import make_run
from transfgu.decoder import MaskDecoder
from transfgu.methods import STAGES
from transfgu.recipe import Recipe
from transfgu.store import storage
from transfgu.store.artifacts import Run


class Undisturbed(NamedTuple):
    recipe: Recipe
    run: Run
    seconds: dict[str, float]


@pytest.fixture(scope="session")
def undisturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The whole run on this machine's disk, and the seconds of each stage (the first with the start of workers)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe, run = write_data(folder), Run(str(folder / "run"))
    seconds = {stage: timed_run(recipe, run, stage) for stage in STAGES}
    print("\nundisturbed: " + ", ".join(f"{stage} {s:.0f} s" for stage, s in seconds.items()))
    return Undisturbed(recipe, run, seconds)


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Folder of Ray's logs; its path must be short, because it contains sockets."""
    folder = Path(tempfile.mkdtemp(prefix="tf-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def data(s3_endpoint: str) -> Iterator[Data]:
    """What the jobs of `tests.faults.jobs` read."""
    folder = Path(tempfile.mkdtemp(prefix="tf-", dir="/tmp"))
    recipe = write_data(folder, IMAGES)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    torch.manual_seed(0)
    decoder = MaskDecoder(24, recipe.classes, num_heads=3)
    safetensors.torch.save_file(decoder.state_dict(), folder / "decoder.safetensors")
    (folder / "made").mkdir()
    make_run(folder / "made")
    bucket = f"s3://transfgu-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket.removeprefix("s3://"))
    for file in (f for f in folder.rglob("*") if f.is_file() and "made" not in f.parts):
        storage.write_bytes(storage.join(bucket, str(file.relative_to(folder))), file.read_bytes())
    yield Data(folder, bucket, s3_endpoint)
    shutil.rmtree(folder)
