"""What Ray Train's controller loads: this module imports neither torch nor the rest of the training.

The controller is a process of its own, and no worker is started before it: every training waits for its imports.
"""

from collections.abc import Mapping
from typing import Any

import ray
from ray.train import UserCallback
from ray.train.backend import BackendConfig

from transfgu.errors import in_words


class Deaths(UserCallback):
    """Tells the board how workers died that could not tell it themselves."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Ray Train's hook: `worker_exceptions` by rank."""
        for error in worker_exceptions.values():
            # Only how a process died; what a worker raised it has told already.
            if died := getattr(error, "health_check_failure", None):
                ray.get(self._board.fail.remote(in_words(died), is_mistake=False, may_pass=True))


class Alone(BackendConfig):
    """In place of `ray.train.torch.TorchConfig`, where there is no process group."""

    backend = "none"
