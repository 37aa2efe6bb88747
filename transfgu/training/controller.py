"""Ray Train's controller opens its callbacks and with them their module, which therefore imports nothing of training's.

The controller is a process of its own that no worker is started before: what it imports, every training waits for.
"""

from collections.abc import Mapping
from typing import Any

import ray
from ray.train import UserCallback

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
