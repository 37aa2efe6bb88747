"""Show the progress of a stage, in the driver: a line that is redrawn on a terminal, plain lines in a log."""

import io
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import cast

from transfgu.runtime.threads import in_thread


class Progress:
    """One stage's progress: a line that is redrawn on a terminal, a line every ten seconds in a log."""

    def __init__(
        self,
        stage: str,
        stream: io.TextIOBase | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
        pause: float | None = None,
    ) -> None:
        """Start the clock.

        Args:
            stage: stands at the beginning of each line.
            stream: what is written to; None: stderr.
            quiet: write nothing.
            clock: returns the time, s.
            pause: minimum time between lines, s; None: 0.2 on a terminal, 10 in a log.
        """
        self._clock = clock
        self._stage = stage
        self._stream = stream
        self._quiet = quiet
        self._terminal = self._out.isatty()
        self._pause = pause if pause is not None else 0.2 if self._terminal else 10.0
        self._start = self._last = clock()
        self._first_done: int | None = None
        self._unit = ""
        self._width = 0

    def update(self, done: int, total: int | None, unit: str, more: str = "") -> None:
        """Report that `done` of `total` units, such as images or epochs, are done; `total` is None if unknown.

        `more` is printed after the unit.
        """
        now = self._clock()
        if unit != self._unit or done < (self._first_done or 0):  # a stage may count images first, then steps
            self._first_done, self._unit, self._start = None, unit, now if self._unit else self._start
        # Parts found from an earlier attempt cost nothing now: the rate counts from the first report on.
        if self._first_done is None:
            self._first_done, self._start = (done, now) if done else (0, self._start)
        if self._quiet or (now - self._last < self._pause and (total is None or done < total)):
            return
        self._last = now
        made, spent = done - self._first_done, max(now - self._start, 1e-9)
        rate = made / spent
        left = f", {duration((total - done) / rate)} left" if made and total is not None and done < total else ""
        speed = (f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s each") if made else ""
        of = "" if total is None else f"/{total}"
        self._write(f"{self._stage}: {done}{of} {unit}{more}  {speed}{left}", final=False)

    def repeated(self, report: Callable[[], None]) -> AbstractContextManager[None]:
        """Call `report`, which updates this progress, in a thread at the interval of its lines, until a block ends.

        So lines appear even while the block waits for one long piece of work.
        """

        def repeat(ended: threading.Event) -> None:
            while not ended.wait(self._pause):
                report()

        return in_thread(repeat, f"progress of {self._stage}")

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if not self._quiet:
            self._write(f"{self._stage}: {text}", final=True)

    @property
    def _out(self) -> io.TextIOBase:
        """The stream; looked up on each use, because Ray Tune pickles the holder of this object."""
        return self._stream or cast(io.TextIOBase, sys.stderr)

    def end(self) -> None:
        """End a redrawn line, so that later output starts on a new line."""
        if self._terminal and self._width:
            self._out.write("\n")
            self._out.flush()
            self._width = 0

    def _write(self, text: str, *, final: bool) -> None:
        if self._terminal:
            self._out.write("\r" + text.ljust(self._width) + ("\n" if final else ""))
            self._width = 0 if final else len(text)
        else:
            self._out.write(text + "\n")
        self._out.flush()


def duration(seconds: float) -> str:
    """Return a duration as text, such as ``3 min 20 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
