"""Time each stage and compare it with a lower bound, or plan a full data set from such measurements.

`python jobs/benchmark.py` is `transfgu benchmark` in a clone that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.runtime import stopping

if __name__ == "__main__":
    stopping.install()  # before the imports below, which take a second

from transfgu.cli.benchmark import main
from transfgu.cli.command_line import run_job

if __name__ == "__main__":
    run_job(main)
