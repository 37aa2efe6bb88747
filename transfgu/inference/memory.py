"""Halve batches that do not fit in the device's memory, and remember the size that fitted."""

import logging
from collections.abc import Callable

import torch
from jaxtyping import Shaped
from torch import Tensor

from transfgu.errors import UserError

logger = logging.getLogger(__name__)


class HalveOnOutOfMemory:
    """Call `function` on a batch, or on parts of it that fit in the device's memory.

    `function` maps a tensor whose first dimension is the batch to another with the same batch; rows are independent.
    The size that fitted is kept for later calls. One warning names `what` ("encoder batch"), however often it was
    halved. Raises UserError if a single row doesn't fit.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], what: str) -> None:
        self.function = function
        self.what = what
        self.size: int | None = None  # rows a part; None until something did not fit
        self._warned = False

    def __call__(self, batch: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "B ..."]:
        """Return the function's results for the whole batch."""
        done: list[Tensor] = []
        rows = 0
        while rows < len(batch) or not done:
            size = self.size or len(batch)
            part = self._try(batch[rows : rows + size])
            if part is None:
                self._halve(min(size, len(batch) - rows))
            else:
                done.append(part)
                rows += size
        return torch.cat(done) if len(done) > 1 else done[0]

    def _try(self, part: Tensor) -> Tensor | None:
        # The next try must come after this frame is gone: a caught exception's traceback keeps its tensors alive.
        try:
            return self.function(part)
        except torch.OutOfMemoryError:
            return None

    def _halve(self, size: int) -> None:
        if size <= 1:
            raise UserError(
                f"one row of the {self.what} is too large for the device: use a smaller image or model",
                code="image-too-large",
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = size // 2
        if not self._warned:
            logger.warning("out of memory: %s halved from %d to %d and on", self.what, size, self.size)
            self._warned = True
