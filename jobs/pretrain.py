"""Teach a small ViT by self-supervision alone, on any folder of images: for a domain that has no DINO.

`python jobs/pretrain.py --out vit.safetensors` makes the embedded demonstration's encoder anew. What was made is used
by `python jobs/train.py folder --data URI --encoder.name my_vit --encoder.weights vit.safetensors`.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.cli.command_line import Parser, add_pretraining_recipe, pretraining_recipe_of, run_job
from transfgu.recipe import FIELDS


def main() -> None:
    """Parse the command line and pretrain."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--out", metavar="URI", required=True, help="weights to write: a .safetensors file")
    add = parser.add_argument
    add("--images", metavar="URI", default="shapes", help="folder of images, or shapes: drawn (default: shapes)")
    add("--count", metavar="N", type=int, default=12_000, help="images drawn for shapes [images] (default: 12000)")
    add("--image_size", metavar="N", type=int, default=72, help="side of the kept images [pixels] (default: 72)")
    add("--workers", metavar="N", type=int, default=0, help="training workers (default: one a GPU; one without)")
    add("--track", metavar="TEXT", default="tensorboard", help=f"{FIELDS['compute.track'].doc} (default: tensorboard)")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--verbose", action="store_true", help="let Ray's own messages through")
    add_pretraining_recipe(parser)
    given = parser.parse()
    recipe = pretraining_recipe_of(given)
    # Only now torch and Ray, which take seconds to import: a mistake on the command line is answered at once.
    from transfgu.pretraining.stage import SHAPES, PretrainingJob, pretrain
    from transfgu.recipe import ComputeRecipe
    from transfgu.runtime import capacity, connect
    from transfgu.runtime.progress import Progress
    from transfgu.store import storage
    from transfgu.training import tracking

    job = PretrainingJob(
        images=given.images,
        out=given.out,
        recipe=recipe,
        count=given.count,
        image_size=given.image_size,
        command=shlex.join(["python", "jobs/pretrain.py", *sys.argv[1:]]),
    )
    if job.images != SHAPES:
        storage.check_readable(job.images)
    storage.check_writable(job.work)
    tracking.names(given.track)
    connect.connect(verbose=given.verbose)
    compute = ComputeRecipe(workers=capacity.training_workers(ComputeRecipe(workers=given.workers)), track=given.track)
    capacity.check_satisfiable(compute)  # of all of them, as their number is the same from the first step to the last
    prepared = pretrain(job, compute, Progress("pretraining", quiet=given.quiet))
    if prepared.left_out and not given.quiet:
        print(f"{len(prepared.left_out)} images were left out, such as {prepared.left_out[0]['name']}")
    if not given.quiet:
        print(f"{storage.shown(job.out)}: learned from {prepared.images} images")


if __name__ == "__main__":
    run_job(main)
