"""Measure coverage in Ray's workers, which are killed: their results are saved every half second."""

import os
import threading
import time


def wanted() -> bool:
    """Return True if the session is measured (with coverage's `patch = subprocess` the environment shows it)."""
    return "COVERAGE_PROCESS_CONFIG" in os.environ


def start() -> None:
    """Measure the calling worker; used as `worker_process_setup_hook` of Ray."""
    import coverage

    measured = coverage.Coverage.current() or coverage.process_startup(force=True)
    assert measured is not None

    def save() -> None:
        while True:
            time.sleep(0.5)
            measured.save()

    threading.Thread(target=save, name="coverage", daemon=True).start()
