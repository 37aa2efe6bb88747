"""The board alone, mostly without Ray; training and pretraining use it through Ray in their own tests."""

import subprocess
import sys
import time
from typing import Any

import pytest
import ray

from transfgu.runtime.progress import Progress
from transfgu.training.board import ProgressBoard, may_pass, put_up, watched


def test_the_board_ends_what_fails_again_and_again() -> None:
    board = ProgressBoard()
    assert all(board.begin(2, 1) for _ in range(5))
    assert board.begin(2, 3)  # other workers: not the same attempt
    assert board.begin(3, 3)  # and here is progress
    assert all(board.begin(3, 3) for _ in range(4))
    board.fail("OSError()", is_mistake=False)
    assert not board.begin(3, 3)
    status = board.read(0)
    assert status.failure == "training failed 5 times in epoch 4, at last with OSError()"
    assert not status.is_mistake


def test_the_board_takes_a_users_mistake_at_once() -> None:
    board = ProgressBoard()
    board.note("epoch 1")
    board.note("epoch 2")
    board.fail("weights missing", is_mistake=True)
    assert not board.begin(0, 1)
    status = board.read(1)
    assert (status.failure, status.is_mistake, status.notes) == ("weights missing", True, ["epoch 2"])


def test_the_first_mistake_is_kept() -> None:
    board = ProgressBoard()
    board.fail("ValueError()", is_mistake=False)
    board.fail("ValueError()", is_mistake=False)
    board.fail("can't write checkpoints", is_mistake=True, code="disk-full")
    board.fail("can't write a picture", is_mistake=True, code="storage-failed")
    status = board.read(0)
    assert (status.failure, status.code) == ("can't write checkpoints", "disk-full")


def test_an_epoch_counts_once() -> None:
    board = ProgressBoard(attempts=2)
    board.epochs([{"epoch": 1}, {"epoch": 2}])  # of a checkpoint
    board.epochs([{"epoch": 2}])  # begun again
    board.epochs([{"epoch": 3}])
    assert board.read(0, 1).rows == [{"epoch": 2}, {"epoch": 3}]
    board.fail("out of memory: a worker was killed", is_mistake=False)
    board.fail("a connection was reset", is_mistake=False)  # by the other worker, because the first is gone
    assert [board.begin(3, 2) for _ in range(3)] == [True, True, False]
    assert board.read(0).failure.endswith("2 times in epoch 4, at last with out of memory: a worker was killed")


def test_once_training_is_not_to_go_on_it_never_does() -> None:
    board = ProgressBoard()
    assert board.goes_on(1) is None
    board.answer(1, True)
    assert (board.goes_on(1), board.goes_on(2)) == (True, None)
    board.answer(2, False)
    board.answer(3, True)
    assert (board.goes_on(1), board.goes_on(3), board.goes_on(4)) == (False, False, False)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_workers_are_answered_even_where_the_question_fails() -> None:
    board = put_up()

    def fails(row: dict[str, Any]) -> bool:
        raise OSError(f"no record after epoch {row['epoch']}")

    def training() -> None:
        with watched(board, Progress("training", quiet=True), goes_on=fails):
            ray.get(board.epochs.remote([{"epoch": 1}]))
            while (answer := ray.get(board.goes_on.remote(1))) is None:
                time.sleep(0.05)
            answers.append(answer)

    answers: list[bool] = []
    with pytest.raises(OSError, match="no record after epoch 1"):
        training()
    assert answers == [False]


@pytest.mark.processes
def test_its_process_has_no_torch_to_import() -> None:
    code = "import sys, transfgu.training.board; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_error_that_comes_twice_ends_the_training_unless_it_may_pass() -> None:
    board = ProgressBoard()
    assert board.begin(2, 2)
    board.fail("ValueError('shapes')", is_mistake=False)
    board.fail("RuntimeError('gloo: peer is gone')", is_mistake=False, may_pass=True)
    assert board.begin(2, 2)
    board.fail("RuntimeError('gloo: peer is gone')", is_mistake=False, may_pass=True)
    assert board.begin(2, 2)  # another worker's death, not what is computed
    board.fail("ValueError('shapes')", is_mistake=False)
    assert board.begin(2, 2)  # not twice in a row
    board.fail("ValueError('shapes')", is_mistake=False)
    assert not board.begin(2, 2)
    assert board.read(0).failure == "training failed twice alike in epoch 3, with ValueError('shapes')"
    assert not board.read(0).is_mistake


def test_progress_forgets_the_errors_before_it() -> None:
    board = ProgressBoard()
    assert board.begin(0, 1)
    board.fail("ValueError('now and then')", is_mistake=False)
    assert board.begin(1, 1)
    board.fail("ValueError('now and then')", is_mistake=False)
    assert board.begin(1, 1)


class Collective(Exception):
    """An error like torch's."""

    __module__ = "torch.distributed"


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (ConnectionResetError(), True),
        (ray.exceptions.WorkerCrashedError(), True),
        (RuntimeError("[/pytorch/third_party/gloo/tcp/pair.cc:553] Connection closed by peer"), True),
        (Collective("a peer is gone"), True),
        (ValueError("shapes"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_may_pass_comes_from_elsewhere(error: Exception, passing: bool) -> None:
    assert may_pass(error) is passing
