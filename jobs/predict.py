"""Segment a folder of images with a trained run: a mask for each image, in the same folders, under the same names.

`python jobs/predict.py --run URI --images URI --out URI`; a path or s3://bucket/folder for each. Masks go to OUT/masks;
the same command, run again, makes the masks that are not there yet.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.cli.command_line import Parser, add_compute, compute_of, run_job
from transfgu.errors import UserError
from transfgu.store import storage


def main() -> None:
    """Parse the command line, predict, say what was made."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("--run", metavar="URI", help="a finished run: the --run of jobs/train.py")
    add("--images", metavar="URI", help="folder of images, at any depth")
    add("--out", metavar="URI", help="folder to fill: masks/, overlays/, and prediction.json, which names the classes")
    add(
        "--format",
        metavar="png|parquet",
        default="png",
        help="png: an indexed PNG for each image; parquet: rows name, height, width, mask (default: png)",
    )
    add("--overlays", action="store_true", help="also write each image lit in its classes' colours, as a JPEG")
    add_compute(parser)
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--verbose", action="store_true", help="let Ray's own messages through")
    given = parser.parse()
    for name in ("run", "images", "out"):
        if not getattr(given, name):
            raise UserError(
                f"--{name} is missing: predict needs --run URI, --images URI and --out URI", code="flag-missing"
            )
    if given.format not in ("png", "parquet"):
        raise UserError(f"--format must be png or parquet, not {given.format}", code="flag-invalid")
    if given.overlays and given.format != "png":
        raise UserError(
            "--overlays are pictures, and go with --format png: leave out one of them", code="flags-conflict"
        )
    compute = compute_of(given)
    # Only now torch and Ray, which take seconds to import: a mistake on the command line is answered at once.
    from transfgu.runtime.progress import Progress
    from transfgu.stages.prediction import PredictionJob, predict

    job = PredictionJob(run=given.run, images=given.images, out=given.out, format=given.format, overlays=given.overlays)
    done = predict(job, compute, Progress("prediction", quiet=given.quiet), verbose=given.verbose)
    if given.quiet:
        return
    bad = done.left_out
    if bad:
        named = ", ".join(f"{x.name} ({x.reason})" for x in bad[:3])
        print(f"{len(bad)} of {done.images} images left out: {named}{', ...' if len(bad) > 3 else ''}")
    before = f", {done.found} there already" if done.found else ""
    print(f"{done.made} masks made{before}: {storage.join(storage.shown(job.out), 'masks')}")


if __name__ == "__main__":
    run_job(main)
