"""Define what Ray Train's controller loads: this module imports neither torch nor the rest of the training.

The controller is a separate process that starts before any worker, so every training waits for its imports.
"""

from collections.abc import Mapping
from typing import Any

import ray
from ray.train import UserCallback
from ray.train.backend import BackendConfig

from transfgu.errors import in_words


class Deaths(UserCallback):
    """Reports to the board how workers died that could not report it themselves."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Handle Ray Train's hook: `worker_exceptions` by rank."""
        for error in worker_exceptions.values():
            # Only the kind of death; workers report their own exceptions.
            if died := getattr(error, "health_check_failure", None):
                ray.get(self._board.fail.remote(in_words(died), is_mistake=False, may_pass=True))


class Alone(BackendConfig):
    """Replaces `ray.train.torch.TorchConfig` if there is no process group."""

    backend = "none"
