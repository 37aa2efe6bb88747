"""Batches reach a GPU while it computes: copies run on a stream of their own, out of page-locked memory."""

from collections.abc import Iterator

import torch

from transfgu.learner import Batch
from transfgu.transfer import to_device


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches with inputs and maps on `device`; on a CPU as they are.

    A copy to a GPU is queued and overlaps with the step before it, whose result the host has not waited for.
    """
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    computing = torch.cuda.current_stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            inputs, maps = to_device(batch.inputs, device), to_device(batch.maps, device)
        computing.wait_stream(copying)
        for tensor in (inputs, maps):
            tensor.record_stream(computing)  # its memory is not given to another copy before the step is done
        yield batch._replace(inputs=inputs, maps=maps)
