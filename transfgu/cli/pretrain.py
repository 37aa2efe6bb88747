"""Train a small ViT by self-supervision on a folder of images, for domains without a pretrained encoder.

`transfgu pretrain --out vit.safetensors` trains the encoder of the embedded demonstration again. With --labels a linear
probe shows whether the encoder learned more than colour and texture. Use the result with `transfgu train folder --data
URI --encoder.weights vit.safetensors`.
"""

import shlex
from collections.abc import Sequence

import yaml

from transfgu.cli.command_line import Parser, add_output, add_pretraining_recipe, pretraining_recipe_of, program
from transfgu.errors import UserError, counted
from transfgu.fields import listed
from transfgu.pretraining.recipe import VIEWS
from transfgu.recipe import FIELDS, ComputeRecipe, Recipe, preset
from transfgu.runtime.progress import Progress
from transfgu.store import storage


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser."""
    made = Parser(__doc__ or "", "pretrain", "--out URI")
    add = made.add_argument
    add("--out", metavar="URI", required=True, help="file for the weights (.safetensors)")
    add(
        "--images",
        metavar="URI",
        default="shapes",
        help="folder of images, or shapes for drawn images (default: shapes)",
    )
    add(
        "--count",
        metavar="N",
        type=int,
        default=12_000,
        help="number of drawn images, for shapes [images] (default: 12000)",
    )
    add("--image_size", metavar="N", type=int, default=72, help="side of the stored images [pixels] (default: 72)")
    add("--squares", metavar="N", type=int, default=1, help="squares cut from each image of a folder (default: 1)")
    add("--labels", metavar="URI", help="folder of label PNGs of the images, for a linear probe at the end")
    add(
        "--views",
        choices=tuple(VIEWS),
        help="colour changes of views (default: drawn for shapes, otherwise photographs)",
    )
    add("--workers", metavar="N", type=int, default=0, help="training workers (default: one per GPU; one without)")
    add("--track", metavar="TEXT", default="tensorboard", help=f"{FIELDS['compute.track'].doc} (default: tensorboard)")
    add("--print-config", action="store_true", help="print the settings below as YAML and exit")
    add_output(made)
    add_pretraining_recipe(made)
    return made


def main(words: Sequence[str]) -> None:
    """Parse the command line and pretrain."""
    given = parser(words).parse(words)
    recipe = pretraining_recipe_of(given, given.views or ("drawn" if given.images == "shapes" else "photographs"))
    if given.print_config:
        settings = {name: listed(value) for name, value in vars(recipe).items()}
        print(yaml.safe_dump(settings, sort_keys=False), end="")
        return
    # Import torch and Ray only now, because they take seconds: mistakes on the command line are reported at once.
    from transfgu.pretraining.stage import SHAPES, PretrainingJob, pretrain
    from transfgu.runtime import capacity, connect
    from transfgu.training import tracking

    job = PretrainingJob(
        images=given.images,
        out=given.out,
        recipe=recipe,
        count=given.count,
        squares=given.squares,
        image_size=given.image_size,
        command=f"{program('pretrain')} {shlex.join(words)}",
    )
    if job.images != SHAPES:
        storage.check_readable(job.images)
    if given.labels:
        _check_labels(given.images, given.labels)
    storage.check_writable(job.work)
    tracking.names(given.track)
    connect.connect(verbose=given.verbose)
    compute = ComputeRecipe(workers=capacity.training_workers(ComputeRecipe(workers=given.workers)), track=given.track)
    capacity.check_satisfiable(compute)  # all workers at once, because their number never changes
    prepared = pretrain(job, compute, Progress("pretraining", quiet=given.quiet))
    if prepared.left_out and not given.quiet:
        print(f"{counted(len(prepared.left_out), 'image')} left out, such as {prepared.left_out[0]['name']}")
    if not given.quiet:
        print(f"{storage.shown(job.out)}: learned from {counted(prepared.images, 'image')}")
    if given.labels:
        print(_probe(given.images, given.labels, job.out))


_PROBED = 120  # labelled images; the probe is trained on half of them


def _labelled(images: str, labels: str, weights: str) -> Recipe:
    """Return the recipe of a probe, for any number of classes."""
    return preset("folder").with_fields(
        {"data": images, "labels": labels, "limit": _PROBED, "encoder.weights": weights}
    )


def _check_labels(images: str, labels: str) -> None:
    """Raise UserError if no label belongs to an image, before hours of training."""
    from transfgu import datasets

    if images == "shapes":
        raise UserError("--labels belong to a folder of images: give --images URI", code="labels-unsupported")
    datasets.list_samples(_labelled(images, labels, ""), "train")


def _probe(images: str, labels: str, weights: str) -> str:
    """Return the results of the probe, in one line or two."""
    from transfgu.baselines.tokens import ENCODER, PIXELS, probe
    from transfgu.pipeline import fit_to_encoder, fit_to_small_encoder

    recipe = fit_to_encoder(fit_to_small_encoder(_labelled(images, labels, weights)))
    count, found = probe(recipe)
    encoder, pixels = found[ENCODER], found[PIXELS]
    text = (
        f"linear probe on {count} labelled images, trained on half of them: mIoU {encoder.mean_iou:.1f}, "
        f"accuracy {encoder.pixel_accuracy:.1f}; {PIXELS} alone: {pixels.mean_iou:.1f}, {pixels.pixel_accuracy:.1f}"
    )
    if encoder.mean_iou > pixels.mean_iou:
        return text
    return f"{text}\nthe encoder separates classes no better than these: train longer (--steps), or on more images"
