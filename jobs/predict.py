"""Predict masks for a folder of images with a trained run, in the same subfolders and with the same names.

`python jobs/predict.py` is `transfgu predict` in a clone that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.cli.main import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
