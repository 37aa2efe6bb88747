"""Teach a small ViT by self-supervision alone, on any folder of images: for a domain that has no DINO.

`python jobs/pretrain.py --out vit.safetensors` makes the embedded demonstration's encoder anew. What was made is used
by `python jobs/train.py folder --data URI --encoder.name my_vit --encoder.weights vit.safetensors`.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.command_line import Parser, run_job


def main() -> None:
    """Parse the command line and pretrain."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--out", metavar="URI", required=True, help="weights to write: a .safetensors file")
    add = parser.add_argument
    add("--images", metavar="URI", default="shapes", help="folder of images, or shapes: drawn (default: shapes)")
    add("--count", metavar="N", type=int, default=12_000, help="images drawn for shapes [images] (default: 12000)")
    add("--image_size", metavar="N", type=int, default=72, help="side of the kept images [pixels] (default: 72)")
    add("--steps", metavar="N", type=int, default=2_600, help="optimiser steps (default: 2600)")
    add("--batch_size", metavar="N", type=int, default=64, help="global batch [images] (default: 64)")
    add("--learning_rate", metavar="X", type=float, default=1e-3, help="at a batch of 64 (default: 0.001)")
    add("--patch_size", metavar="N", type=int, default=8, help="patch of the ViT [pixels] (default: 8)")
    add("--width", metavar="N", type=int, default=96, help="channels of the ViT (default: 96)")
    add("--depth", metavar="N", type=int, default=4, help="blocks of the ViT (default: 4)")
    add("--heads", metavar="N", type=int, default=3, help="attention heads of the ViT (default: 3)")
    add(
        "--global_size",
        metavar="N",
        type=int,
        default=48,
        help="large views, the ViT's own size [pixels] (default: 48)",
    )
    add("--local_size", metavar="N", type=int, default=24, help="small views [pixels] (default: 24)")
    add("--seed", metavar="N", type=int, default=0, help="of images, weights, order and views (default: 0)")
    add("--workers", metavar="N", type=int, default=0, help="training workers (default: one a GPU; one without)")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--verbose", action="store_true", help="let Ray's own messages through")
    given = vars(parser.parse())
    # Only now torch and Ray, which take seconds to import: a mistake on the command line is answered at once.
    from transfgu import runtime, storage
    from transfgu.pretraining import PretrainingRecipe
    from transfgu.progress import Progress
    from transfgu.recipe import ComputeRecipe
    from transfgu.stages.pretraining import PretrainingJob, pretrain

    own = ("out", "images", "count", "image_size", "workers", "quiet", "verbose")
    job = PretrainingJob(
        images=given["images"],
        out=given["out"],
        recipe=PretrainingRecipe(**{name: value for name, value in given.items() if name not in own}),
        count=given["count"],
        image_size=given["image_size"],
        command=shlex.join(["python", "jobs/pretrain.py", *sys.argv[1:]]),
    )
    storage.check_writable(job.work)
    runtime.connect(verbose=given["verbose"])
    prepared = pretrain(job, ComputeRecipe(workers=given["workers"]), Progress("pretraining", quiet=given["quiet"]))
    if prepared.left_out and not given["quiet"]:
        print(f"{len(prepared.left_out)} images were left out, such as {prepared.left_out[0]['name']}")
    if not given["quiet"]:
        print(f"{storage.shown(job.out)}: learned from {prepared.images} images")


if __name__ == "__main__":
    run_job(main)
