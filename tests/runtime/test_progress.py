"""Progress lines on a terminal and in a log."""

import io
import threading

from transfgu.runtime.progress import Progress


class Clock:
    """A clock that is set manually."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_in_a_log_is_plain_lines() -> None:
    out = io.StringIO()
    progress = Progress("features", stream=out)
    progress.update(0, 10, "images")
    progress.update(10, 10, "images")
    progress.note("done")
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("features: 10/10 images")
    assert lines[-1] == "features: done"
    assert "\r" not in out.getvalue()


def test_without_a_total_nothing_is_said_of_what_is_left() -> None:
    out = Terminal()
    clock = Clock()
    progress = Progress("concepts", stream=out, clock=clock)
    clock.now += 1
    progress.update(0, None, "iterations of things")
    clock.now += 1
    progress.update(8, None, "iterations of things")
    assert "concepts: 8 iterations of things  4.0 iterations of things/s" in out.getvalue()
    assert "left" not in out.getvalue()
    assert "/" not in out.getvalue().split("\r")[1]


def test_another_unit_has_a_rate_of_its_own() -> None:
    """367 images, then 700 steps at two per second: the rate is neither negative nor mixed."""
    out = Terminal()
    clock = Clock()
    progress = Progress("pretraining", stream=out, clock=clock)
    progress.update(367, 367, "images")
    progress.update(0, 700, "steps")
    clock.now += 5
    progress.update(10, 700, "steps")
    assert "pretraining: 10/700 steps  2.0 steps/s, 5 min 45 s left" in out.getvalue()
    clock.now += 5
    progress.update(4, 700, "steps")  # an epoch begun again
    assert "pretraining: 4/700 steps  " in out.getvalue()
    assert "-" not in out.getvalue()


def test_quiet_progress_says_nothing() -> None:
    out = io.StringIO()
    Progress("features", stream=out, quiet=True).update(10, 10, "images")
    assert out.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_redraws_one_line() -> None:
    out = Terminal()
    progress = Progress("training", stream=out)
    progress.update(12, 12, "epochs")
    progress.note("best epoch 7")
    assert out.getvalue().startswith("\rtraining: 12/12 epochs")
    assert out.getvalue().rstrip(" \n").endswith("training: best epoch 7")


def test_what_is_printed_after_the_end_has_a_line_of_its_own() -> None:
    out = Terminal()
    progress = Progress("features", stream=out)
    progress.update(10, 10, "images")
    progress.end()
    progress.end()
    assert out.getvalue().endswith("\n")
    assert out.getvalue().count("\n") == 1


def test_lines_appear_while_one_piece_of_work_lasts() -> None:
    out = io.StringIO()
    progress = Progress("prediction", stream=out, pause=0.01)
    thrice = threading.Event()

    def report() -> None:
        progress.update(0, 1, "images", ", 16/640 tiles of the images begun")
        if out.getvalue().count("\n") >= 3:
            thrice.set()

    with progress.repeated(report):
        assert thrice.wait(20)
    lines = out.getvalue().splitlines()
    assert {line.rstrip() for line in lines} == {"prediction: 0/1 images, 16/640 tiles of the images begun"}
    assert not [thread for thread in threading.enumerate() if thread.name == "progress of prediction"]
