"""Out of memory on a simulated device, a function that raises the same errors as torch above so many rows."""

import logging

import pytest
import torch
from torch import Tensor

from tests.refusals import refused
from transfgu.inference.memory import HalveOnOutOfMemory


class Device:
    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.calls: list[int] = []

    def double(self, batch: Tensor) -> Tensor:
        self.calls.append(len(batch))
        if len(batch) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch * 2


def test_a_batch_that_fits_is_taken_whole() -> None:
    device = Device(8)
    batch = torch.arange(24.0).reshape(8, 3)
    torch.testing.assert_close(HalveOnOutOfMemory(device.double, "batch")(batch), batch * 2)
    assert device.calls == [8]


def test_it_halves_until_it_fits_goes_on_and_remembers(caplog: pytest.LogCaptureFixture) -> None:
    device = Device(3)
    run = HalveOnOutOfMemory(device.double, "encoder batch")
    batch = torch.arange(20.0).reshape(10, 2)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(run(batch), batch * 2)
        assert device.calls == [10, 5, 2, 2, 2, 2, 2]
        device.calls.clear()
        torch.testing.assert_close(run(batch[:5]), batch[:5] * 2)
        assert device.calls == [2, 2, 1]
        device.rows = 1
        run(batch[:2])
    assert [record.message for record in caplog.records] == ["out of memory: encoder batch halved from 10 to 5 and on"]


def test_rows_done_are_not_done_again() -> None:
    device = Device(4)
    run = HalveOnOutOfMemory(device.double, "batch")
    run(torch.zeros(8, 1))
    device.rows, device.calls = 4, []
    rows = torch.arange(8.0)[:, None]
    seen: list[float] = []

    def shrinking(batch: Tensor) -> Tensor:
        if batch[0, 0] >= 4 and len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.extend(batch[:, 0].tolist())
        return batch

    torch.testing.assert_close(HalveOnOutOfMemory(shrinking, "batch")(rows), rows)
    assert seen == list(range(8))


def test_an_empty_batch_keeps_its_shape() -> None:
    assert HalveOnOutOfMemory(Device(1).double, "batch")(torch.zeros(0, 3)).shape == (0, 3)


def test_a_single_row_too_large_is_the_users_matter() -> None:
    with refused("image-too-large"):
        HalveOnOutOfMemory(Device(0).double, "encoder batch")(torch.zeros(4, 1))


def test_other_errors_pass() -> None:
    def fails(batch: Tensor) -> Tensor:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        HalveOnOutOfMemory(fails, "batch")(torch.zeros(4, 1))
