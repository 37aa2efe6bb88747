"""Train on one worker: run, epoch, step. All random numbers follow from the seed and a counter.

So the state is weights, moments and counters, without the state of a generator. An epoch that is restarted, with fewer
or more workers, has the same images, views, permutations and order. The checkpoint of an epoch is copied at its end,
and written during the next epoch.
"""

import errno
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint
from ray.train.collective import broadcast_from_rank_zero

from transfgu.errors import UserError, in_words
from transfgu.inference.device import own_device, use_cores
from transfgu.learner import Pending
from transfgu.runtime import ray_internals
from transfgu.runtime.failures import find_user_error
from transfgu.store import storage
from transfgu.training import checkpoints, state
from transfgu.training.board import may_pass
from transfgu.training.job import Job, Place

_TELL_SECONDS = 0.3  # between two reports to the driver
_ASK_SECONDS = 0.1
_WRITE_SECONDS = 60.0  # for which a training that failed waits for the checkpoint of its previous epoch
_QUEUED = 1  # steps that a GPU may be behind the host, which prepares the next batch in the meantime


def work(job: Job) -> None:
    """Train on one worker of Ray Train, from the last checkpoint."""
    try:
        may_begin, checkpoint = _begin(job)
        if may_begin:
            Worker(job, checkpoint).run()
    except Exception as error:
        is_mistake = _report_failure(job, error)
        # Raised, so that workers which wait for this one end, too; the board prevents a retry.
        if not is_mistake or ray.train.get_context().get_world_size() > 1:
            raise


def _report_failure(job: Job, error: Exception) -> bool:
    """Report an error to the board; returns True if it is a user's mistake."""
    mistake = find_user_error(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        # A retry would need the same space.
        mistake = UserError(
            f"can't write {storage.shown(job.checkpoints)}: {error.strerror or error}: free some space",
            code="disk-full",
        )
    passing = mistake is None and may_pass(error)
    text = in_words(mistake or error)
    code = mistake.code if mistake else ""
    ray.get(job.board.fail.remote(text, is_mistake=mistake is not None, may_pass=passing, code=code))
    return mistake is not None


def _begin(job: Job) -> tuple[bool, str]:
    """Ask the board, once for all workers, whether to try again; returns the checkpoint to continue from."""
    context = ray.train.get_context()
    answer = None
    if context.get_world_rank() == 0:
        found = checkpoints.newest(job.checkpoints, job.board.note.remote)
        if found:
            ray.get(job.board.epochs.remote(found.history))
        may_begin = ray.get(job.board.begin.remote(len(found.history) if found else 0, context.get_world_size()))
        answer = (bool(may_begin), found.uri if found else "")
    answered: tuple[bool, str] = broadcast_from_rank_zero(answer)
    return answered


class Worker:
    """The training on one worker."""

    def __init__(self, job: Job, checkpoint: str) -> None:
        """Set up the training; `checkpoint` is the URI of the checkpoint to continue from; empty: from the start."""
        context = ray.train.get_context()
        self.job, self.rank, self.world = job, context.get_world_rank(), context.get_world_size()
        device = ray.train.torch.get_device() if own_device().type == "cuda" else torch.device("cpu")
        if device.type == "cpu":
            use_cores(context.get_local_world_size() * job.beside)
        self.training = job.make(Place(device=device, rank=self.rank, world=self.world))
        if checkpoint:
            with tempfile.TemporaryDirectory() as folder:
                checkpoints.download(checkpoint, Path(folder))
                self.training.load(*state.read(Path(folder), device))
        self._told = 0.0
        self._snapshot: state.Snapshot | None = None
        """What is being written."""
        self._written = threading.Event()
        self._written.set()
        self._write_error: Exception | None = None

    def run(self) -> None:
        """Train the remaining epochs, or until the driver ends the training."""
        try:
            for epoch in range(len(self.training.state.history), self.training.epochs):
                if not self._goes_on(epoch):
                    break
                self.epoch(epoch)
            self._wait_until_written()
        finally:  # a step that fails does not cost the previous epoch
            self._written.wait(_WRITE_SECONDS)

    def _goes_on(self, epoch: int) -> bool:
        """Return the driver's decision after `epoch` epochs, once there is one; the same for all workers."""
        if not self.job.asks or not epoch:
            return True
        answer = None
        while self.rank == 0 and answer is None:
            answer = ray.get(self.job.board.goes_on.remote(epoch))
            if answer is None:
                time.sleep(_ASK_SECONDS)
        return bool(broadcast_from_rank_zero(answer))

    def epoch(self, epoch: int) -> None:
        """Train one epoch, score it, and write its checkpoint."""
        started = time.monotonic()
        training = self.training
        training.begin(epoch)
        # Dropout differs between workers; a repeated epoch draws it again.
        torch.manual_seed(int(np.random.SeedSequence([training.seed, epoch, self.rank]).generate_state(1)[0]))
        results: list[Mapping[str, float]] = []
        pending: deque[Pending] = deque()
        first = started
        for index, batch in enumerate(training.batches(epoch)):
            if not index:
                first = time.monotonic()
            pending.append(training.step(batch, epoch, index))
            if len(pending) > _QUEUED:
                results.append(self._result(pending.popleft(), epoch, len(results)))
            self._tell(epoch, index + 1)
        results += [self._result(step, epoch, index) for index, step in enumerate(pending, len(results))]
        seconds = time.monotonic() - started
        row = {
            "epoch": epoch + 1,
            **training.end(epoch, results),
            "workers": self.world,
            "seconds": round(seconds, 3),
            "start_seconds": round(first - started, 3),
            "images_per_second": round(len(results) * training.order.batch / seconds, 2),
        }
        training.state.history.append(row)
        if self.rank == 0:
            self._wait_until_written()  # its error is the first one, if both writes fail
            training.epoch_ended(epoch)
        self._report(row)

    def _result(self, step: Pending, epoch: int, index: int) -> Mapping[str, float]:
        try:
            return step()
        except FloatingPointError as error:
            where = f"step {index + 1} of epoch {epoch + 1}"
            raise UserError(f"in {where}, {error}: {self.training.remedy}", code="loss-not-finite") from None

    def _report(self, row: dict[str, Any]) -> None:
        """Report an epoch, and start to write its checkpoint; the previous checkpoint is complete."""
        checkpoint = None
        if self.rank == 0:
            more, metadata = self.training.files()
            self._snapshot = self.training.state.snapshot(metadata, more)
            checkpoint = Checkpoint(self.job.checkpoints)  # stands for the one that `_write` returns
            self.job.board.note.remote(self.training.line(row))
            self.job.board.epochs.remote([row])
            self._written.clear()
        try:
            ray.train.report(
                row,
                checkpoint=checkpoint,
                checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
                checkpoint_upload_fn=self._write,
                delete_local_checkpoint_after_upload=False,
            )
        except BaseException:  # `_write` is not called
            self._written.set()
            raise

    def _write(self, _: Checkpoint, name: str) -> Checkpoint:
        """Write the snapshot to the folder `name` of the training's checkpoints; runs in a thread of Ray Train."""
        assert self._snapshot
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._snapshot.save(Path(folder))
                written: Checkpoint = ray_internals.upload_checkpoint(folder, name)
                return written
        except Exception as error:
            self._write_error = error
            _report_failure(self.job, error)
            # Ray Train ends the worker. It would write again, in some cases, after the original error.
            raise RuntimeError(f"{name} was not written") from error
        finally:
            self._snapshot = None
            self._written.set()

    def _wait_until_written(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            Exception: raised while it was written.
        """
        self._written.wait()
        if self._write_error:
            raise self._write_error

    def _tell(self, epoch: int, steps: int) -> None:
        now = time.monotonic()
        if self.rank == 0 and now - self._told > _TELL_SECONDS:
            self._told = now
            self.job.board.step.remote(epoch * self.training.order.steps + steps, self.training.steps)
