"""Search for a better recipe in many short trainings on the same pseudo labels, on all resources of a cluster.

`python jobs/tune.py` is `transfgu tune` in a clone that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.cli.main import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
