"""Train a small ViT by self-supervision on a folder of images, for domains without a pretrained encoder.

`python jobs/pretrain.py` is `transfgu pretrain` in a clone that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.cli.main import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
