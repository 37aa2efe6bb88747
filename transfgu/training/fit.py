"""Run a training on Ray Train: the driver starts workers, watches a board, and returns the last checkpoint.

If a worker, a node or the driver is lost, training resumes from the last complete checkpoint. The current epoch is
lost, and also the previous one if its checkpoint was still being written.
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
from transfgu.runtime import capacity, stopping
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
    """Train from the newest complete checkpoint of this name in `folder`, if there is one.

    Args:
        make: creates the training on each worker.
        name: identifies everything that the weights depend on, so that other recipes or images start again.
        folder: URI of the folder in which Ray keeps the training's state.
        compute: resources of a worker.
        workers: number of workers, or the smallest and the largest number.
        progress: reports steps and epochs.
        on_epoch: called with each epoch's row of the history, from another thread; after a restart also with those of
            the checkpoint.
        goes_on: called likewise; returns False to end training after that epoch. The next epoch waits for it.
        attempts: failed attempts at one epoch after which a fault ends the training.
        beside: number of trainings, including this one, that share the cores of a node.

    Returns:
        The last checkpoint.

    Raises:
        UserError: a user's mistake, or a loss that is not a number.
        RuntimeError: the training failed repeatedly at one epoch, or twice with the same error.
    """
    # Ray Train checks its workers every two seconds, which is long for an epoch of one second.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths of the recipe, such as weights, stay valid
    kept = storage.join(storage.absolute(folder), name)
    checkpoints.mend_account(kept)
    fs, root = storage.travelling(storage.absolute(folder))
    board = put_up(attempts)
    resources = capacity.actor_resources(compute)
    trainer = TorchTrainer(
        # A bound argument, not a config: Ray Train's controller would unpickle a config, and import all of training.
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
    with watched(board, progress, on_epoch, goes_on), gpus_found(), stopping.interrupt_restored():
        trainer.fit()
    status: Status = ray.get(board.read.remote(0))
    ray.kill(board)
    if status.failure:
        if status.is_mistake:
            raise UserError(status.failure, status.code)
        raise RuntimeError(status.failure)
    if found := checkpoints.newest(kept):
        return found
    raise RuntimeError(f"training ended without a complete checkpoint in {storage.shown(kept)}")
