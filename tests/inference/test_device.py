"""The device of a worker: its own GPU, or the CPU; never the CPU if a GPU was requested."""

import pytest
import torch

from transfgu.errors import UserError
from transfgu.inference import device
from transfgu.recipe import EncoderRecipe, TrainingRecipe

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@needs_no_gpu
@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_without_a_gpu_it_is_the_cpu(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert device.own_device() == torch.device("cpu")


@needs_no_gpu
def test_a_gpu_that_is_not_there_is_an_error_unless_it_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(UserError) as error:
        device.own_device()
    assert error.value.code == "gpu-missing"
    monkeypatch.setenv(device.DEVICE, "cpu")
    assert device.own_device() == torch.device("cpu")


@pytest.mark.gpu
def test_with_a_gpu_it_is_the_gpu_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.own_device().type == "cuda"
    monkeypatch.setenv(device.DEVICE, "cpu")
    assert device.own_device().type == "cpu"


def test_precision_on_a_cpu_is_float32_unless_asked_for() -> None:
    cpu = torch.device("cpu")
    assert not device.in_bfloat16(EncoderRecipe(), cpu)
    assert not device.in_bfloat16(TrainingRecipe(precision="float32"), cpu)
    assert device.in_bfloat16(TrainingRecipe(precision="bfloat16"), cpu)
    before = torch.get_float32_matmul_precision()
    device.allow_tf32(TrainingRecipe(precision="bfloat16"), cpu)
    assert torch.get_float32_matmul_precision() == before
