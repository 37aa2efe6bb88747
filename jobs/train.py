"""Segment a data set without labels: features, concepts, pseudo labels, training, evaluation, report.

`python jobs/train.py` is `transfgu train` in a clone that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
