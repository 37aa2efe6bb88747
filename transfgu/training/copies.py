"""Copy batches to a GPU while it computes, on a separate stream and from page-locked memory."""

from collections.abc import Iterator

import torch

from transfgu.learner import Batch
from transfgu.transfer import to_device


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches with inputs and maps on `device`; unchanged on a CPU.

    A copy to a GPU is queued and overlaps with the previous step, whose result the host has not waited for.
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
            tensor.record_stream(computing)  # its memory is not reused before the step has finished
        yield batch._replace(inputs=inputs, maps=maps)
