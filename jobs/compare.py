"""Compare methods on the same images: train each with each seed, and score all with one evaluator.

`python jobs/compare.py` is `transfgu compare` in a clone that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.cli.main import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
