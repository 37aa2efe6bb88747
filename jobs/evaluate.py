"""Score a decoder or a folder of masks on labelled images.

`python jobs/evaluate.py` is `transfgu evaluate` in a clone that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.runtime import stopping

if __name__ == "__main__":
    stopping.install()  # before the imports below, which take a second

from transfgu.cli.command_line import run_job
from transfgu.cli.evaluate import main

if __name__ == "__main__":
    run_job(main)
