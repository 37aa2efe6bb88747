"""Predict masks for a folder of images with a trained run, in the same subfolders and with the same names.

`transfgu predict --run URI --images URI --out URI`; each URI is a path or s3://bucket/folder. Masks go to OUT/masks;
the same command, run again, adds the missing masks.
"""

from collections.abc import Sequence

from transfgu.cli import export
from transfgu.cli.command_line import Parser, add_compute, add_output, compute_of
from transfgu.errors import UserError, counted
from transfgu.fields import convert
from transfgu.runtime.progress import Progress
from transfgu.sharing.exports import NAMES, check_format
from transfgu.store import storage


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser."""
    made = Parser(__doc__ or "", "predict", "--run URI --images URI --out URI")
    add = made.add_argument
    add("--run", metavar="URI", help="a finished run: the --run of `transfgu train`")
    add("--images", metavar="URI", help="folder of images; subfolders are included")
    add(
        "--out",
        metavar="URI",
        help="output folder: masks/, overlays/, and prediction.json with the names of the classes",
    )
    add(
        "--format",
        metavar="png|parquet",
        default="png",
        help="png: one indexed PNG per image; parquet: rows name, height, width, mask (default: png)",
    )
    add("--overlays", action="store_true", help="also write each image with its classes in colour, as JPEG")
    add(
        "--tile",
        metavar="N",
        type=int,
        default=0,
        help="predict large images in overlapping tiles of this height [pixels]; 0: no tiles (default: 0)",
    )
    add("--overlap", metavar="N", type=int, default=64, help="overlap of neighbouring tiles [pixels] (default: 64)")
    add("--export", metavar="FORMAT", help=f"also export the masks, as one of {', '.join(NAMES)}")
    export.add_outlines(made)
    add(
        "--orient",
        metavar="true|false",
        help="true: apply the orientation in EXIF data, so that masks match the image as viewers show it; false: masks "
        "match the stored pixels (default: true; if OUT has masks, their setting)",
    )
    add(
        "--max_pixels",
        metavar="N",
        type=int,
        help="maximum size of an image [pixels]; a larger one is left out, or with --tile read by rows (default: the "
        "run's dataset.max_pixels)",
    )
    add_output(made)
    add_compute(made)
    return made


def main(words: Sequence[str]) -> None:
    """Parse the command line, predict, print a summary."""
    given = parser(words).parse(words)
    for name in ("run", "images", "out"):
        if not getattr(given, name):
            raise UserError(
                f"--{name} is missing: predict needs --run URI, --images URI and --out URI", code="flag-missing"
            )
    if given.format not in ("png", "parquet"):
        raise UserError(f"--format must be png or parquet, not {given.format}", code="flag-invalid")
    if given.overlays and given.format != "png":
        raise UserError("--overlays requires --format png: leave out one of them", code="flags-conflict")
    orient = None if given.orient is None else convert("--orient", bool, given.orient)
    if given.overlays and given.tile:
        raise UserError(
            "--overlays requires images without tiles: leave out --overlays or --tile", code="flags-conflict"
        )
    if given.export:
        check_format(given.export)
        if given.format != "png":
            raise UserError("--export requires masks as PNGs: leave out --format parquet", code="flags-conflict")
    compute = compute_of(given)
    # Import torch and Ray only now, because they take seconds: mistakes on the command line are reported at once.
    from transfgu.stages.prediction import PredictionJob, predict

    own = ("run", "images", "out", "format", "overlays", "tile", "overlap", "max_pixels")
    job = PredictionJob(**{name: getattr(given, name) for name in own}, orient=orient)
    done = predict(job, compute, Progress("prediction", quiet=given.quiet), verbose=given.verbose)
    exported = ""
    if given.export:
        exported = export.write(job.out, job.images, given.export, "", given.classes, given.tolerance, given.least)
    if given.quiet:
        return
    bad = done.left_out
    if bad:
        named = ", ".join(f"{x.name} ({x.reason})" for x in bad[:3])
        print(f"{len(bad)} of {counted(done.images, 'image')} left out: {named}{', ...' if len(bad) > 3 else ''}")
    if done.passed:
        print(f"not read: {done.passed}")
    if done.orphans:
        print(f"{counted(done.orphans, 'mask')} without an image in {storage.shown(job.images)}: kept")
    before = f", {done.found} there already" if done.found else ""
    print(f"{counted(done.made, 'mask')} made{before}: {storage.join(storage.shown(job.out), 'masks')}")
    if exported:
        print(f"exported: {storage.shown(exported)}")
