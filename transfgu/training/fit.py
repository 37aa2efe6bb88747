"""Run a training on Ray Train: the driver starts workers, watches a board, and returns the last checkpoint.

If a worker, a node or the driver is lost, the current epoch is lost, and training resumes from the last checkpoint.
Errors that a retry can't fix (a user's mistake, a loss that is not a number) go to the board and end the training.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from transfgu.errors import UserError
from transfgu.recipe import ComputeRecipe
from transfgu.runtime import capacity
from transfgu.runtime.progress import Progress
from transfgu.store import storage
from transfgu.training import checkpoints
from transfgu.training.board import ATTEMPTS, Status, put_up, watched
from transfgu.training.controller import Deaths
from transfgu.training.job import Job, Place, Training
from transfgu.training.process_group import gpus_found, process_group
from transfgu.training.worker import work


def fit(
    make: Callable[[Place], Training],
    *,
    name: str,
    folder: str,
    compute: ComputeRecipe,
    workers: int | tuple[int, int],
    progress: Progress,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    goes_on: Callable[[dict[str, Any]], bool] | None = None,
    attempts: int = ATTEMPTS,
    beside: int = 1,
) -> checkpoints.Found:
    """Train from the newest whole checkpoint of this name in `folder`, if there is one.

    Args:
        make: makes the training on each worker.
        name: of all that the weights depend on: another recipe or other images must not go on from these.
        folder: URI under which Ray keeps the training's state.
        compute: what a worker holds of the cluster.
        workers: number of workers, or the smallest and the largest number.
        progress: reports steps and epochs.
        on_epoch: called with each epoch's row of the history, from another thread; after a restart with those of
            the checkpoint, too.
        goes_on: asked likewise whether training goes on after that epoch; the next one waits for the answer.
        attempts: failed attempts at one epoch after which a fault ends the training.
        beside: number of trainings, this one included, that share the cores of a node.

    Returns:
        The last checkpoint.

    Raises:
        UserError: a user's mistake, or a loss that is not a number.
        RuntimeError: the training failed again and again at one epoch, or twice alike.
    """
    # Ray Train looks after its workers every two seconds, which an epoch of one second would wait for.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    kept = storage.join(storage.absolute(folder), name)
    checkpoints.mend_account(kept)
    fs, root = storage.travelling(storage.absolute(folder))
    board = put_up(attempts)
    resources = capacity.actor_resources(compute)
    trainer = TorchTrainer(
        # Bound, not a config: Ray Train's controller would unpickle that, and import all that training needs.
        partial(work, Job(make=make, checkpoints=kept, board=board, beside=beside, asks=goes_on is not None)),
        scaling_config=ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # Ray takes pairs, too
            use_gpu=resources["num_gpus"] > 0,
            resources_per_worker={"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]},
            elastic_resize_monitor_interval_s=compute.resize_seconds,  # type: ignore[call-arg]  # and this
        ),
        torch_config=process_group(resources["num_gpus"], workers),  # type: ignore[arg-type]  # any backend's will do
        run_config=RunConfig(
            name=name,
            storage_path=root,
            storage_filesystem=fs,
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[Deaths(board)],  # type: ignore[list-item]
        ),
    )
    with watched(board, progress, on_epoch, goes_on), gpus_found():
        trainer.fit()
    status: Status = ray.get(board.read.remote(0))
    ray.kill(board)
    if status.failure:
        if status.is_mistake:
            raise UserError(status.failure, status.code)
        raise RuntimeError(status.failure)
    if found := checkpoints.newest(kept):
        return found
    raise RuntimeError(f"training ended without a whole checkpoint in {storage.shown(kept)}")
