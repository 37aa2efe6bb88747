"""Coverage inside Ray's workers, which are killed rather than ended: what they ran is saved every half second."""

import os
import threading
import time


def wanted() -> bool:
    """Whether the session is measured (coverage's `patch = subprocess` then leaves word in the environment)."""
    return "COVERAGE_PROCESS_CONFIG" in os.environ


def start() -> None:
    """Measure the calling worker; a `worker_process_setup_hook` of Ray's."""
    import coverage

    measured = coverage.Coverage.current() or coverage.process_startup(force=True)
    assert measured is not None

    def save() -> None:
        while True:
            time.sleep(0.5)
            measured.save()

    threading.Thread(target=save, name="coverage", daemon=True).start()
