"""Score a decoder or a folder of masks on labelled images.

`python jobs/evaluate.py` is `transfgu evaluate` in a clone that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.cli.main import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
