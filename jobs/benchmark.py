"""Time each stage and compare it with a lower bound, or plan a full data set from such measurements.

`python jobs/benchmark.py` is `transfgu benchmark` in a clone that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.cli.main import main

if __name__ == "__main__":
    main(["benchmark", *sys.argv[1:]])
