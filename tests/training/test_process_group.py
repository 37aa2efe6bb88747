"""The backend for exchanging gradients, and the error if it requires GPUs that are missing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ray.train.torch import TorchConfig

from transfgu.inference.device import DEVICE
from transfgu.training.controller import Alone
from transfgu.training.process_group import process_group

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("gpus", "workers", "backend"), [(1.0, 2, "nccl"), (2.0, (1, 4), "nccl"), (0.5, 2, "gloo"), (0.0, (1, 3), "gloo")]
)
def test_whole_gpus_communicate_by_nccl(gpus: float, workers: int | tuple[int, int], backend: str) -> None:
    group = process_group(gpus, workers)
    assert isinstance(group, TorchConfig)
    assert group.backend == backend


def test_one_worker_has_no_group() -> None:
    assert isinstance(process_group(1.0, 1), Alone)


def test_simulated_gpus_communicate_by_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE, "cpu")
    group = process_group(1.0, 2)
    assert isinstance(group, TorchConfig)
    assert group.backend == "gloo"


SCRIPT = """
import sys
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from transfgu.errors import UserError
from transfgu.training.process_group import gpus_found, process_group

ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
trainer = TorchTrainer(
    lambda: None,
    scaling_config=ScalingConfig(num_workers=2, use_gpu=True, resources_per_worker={"CPU": 0.5, "GPU": 1}),
    torch_config=process_group(1.0, 2),
    run_config=RunConfig(name="group", storage_path=sys.argv[1]),
)
try:
    with gpus_found():
        trainer.fit()
except UserError as error:
    sys.exit(error.code)
"""


@pytest.mark.long
@pytest.mark.ci_long
@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_group_whose_gpus_are_not_there_is_one_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "gpu-missing"
