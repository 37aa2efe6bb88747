"""Time each stage beside the bare bound that it can't beat, or plan a full data set from such measurements.

`python jobs/benchmark.py [features|concepts|pseudo-labels|training|evaluation|all] [--preset P]` measures;
`python jobs/benchmark.py plan PRESET --images N --gpus G` plans. Arithmetic takes no notice of weights, so the encoder
is untrained unless --encoder.weights says otherwise; which windows are kept, and so how many, does depend on them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.cli.command_line import Parser, add_recipe, given_fields, recipe_of, run_job
from transfgu.errors import UserError
from transfgu.planning import cost_plan
from transfgu.planning.measurements import Measurements
from transfgu.store import storage


def main() -> None:
    """Measure, or plan."""
    if sys.argv[1:2] == ["plan"]:
        plan()
    else:
        measure()


def measure() -> None:
    """Parse the command line, measure, print the table, write JSON."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("stage", nargs="?", metavar="STAGE", default="all", help="what to time (default: all); or plan, see above")
    add_recipe(parser, preset_flag="--preset")
    add("--images", metavar="N", type=int, default=4, help="images a turn, and a training batch (default: 4)")
    add("--repeats", metavar="N", type=int, default=5, help="turns, of which the median counts (default: 5)")
    add("--rows", metavar="N", type=int, default=200_000, help="features that K-Means gets (default: 200000)")
    add("--unfused", action="store_true", help="also time maps as published: a backward pass a class; takes gigabytes")
    add("--out", metavar="URI", help="JSON to write (default: ~/transfgu/benchmark-PRESET.json)")
    add("--verbose", action="store_true", help="let Ray's own messages through")
    arguments = parser.parse()
    if min(arguments.images, arguments.repeats, arguments.rows) < 1:
        raise UserError("--images, --repeats and --rows must be positive")
    recipe = recipe_of(arguments)
    if "encoder.weights" not in given_fields(arguments):
        recipe = recipe.with_fields({"encoder.weights": "random"})
    # Only now torch and Ray, which take seconds to import: a mistake on the command line is answered at once.
    from transfgu import pipeline
    from transfgu.benchmarks import stages as benchmarks
    from transfgu.encoder import Encoder
    from transfgu.runtime import connect

    stages = benchmarks.STAGES if arguments.stage == "all" else (arguments.stage,)
    encoder = Encoder.from_pretrained(recipe.encoder.name, recipe.encoder.weights)
    recipe = pipeline.fit_to_patch(recipe, encoder.patch_size)
    connect.connect(verbose=arguments.verbose)
    out = arguments.out or default_file(recipe.preset)
    found = benchmarks.measure(
        recipe,
        stages,
        images=arguments.images,
        repeats=arguments.repeats,
        rows=arguments.rows,
        unfused=arguments.unfused,
        say=lambda text: print(text, file=sys.stderr, flush=True),
        keep=lambda found: storage.write_bytes(out, found.to_json().encode()),
    )
    print(found.table())
    print(f"written to {storage.shown(out)}")


def plan() -> None:
    """Parse the command line, read measurements, print the plan."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("plan")
    add_recipe(parser)
    add("--images", metavar="N", type=int, required=True, help="training images")
    add("--validation", metavar="N", type=int, default=5000, help="labelled validation images (default: 5000)")
    add("--gpus", metavar="N", type=int, required=True, help="devices like the measured one")
    add("--cpus_per_gpu", metavar="X", type=float, default=8.0, help="cores that decode for each (default: 8)")
    add("--store", metavar="X", type=float, default=1.0, help="what the storage delivers in all [GB/s] (default: 1)")
    add("--network", metavar="X", type=float, default=3.0, help="what a machine receives [GB/s] (default: 3)")
    add("--measured", metavar="URI", help="what a measurement wrote (default: ~/transfgu/benchmark-PRESET.json)")
    arguments = parser.parse()
    recipe = recipe_of(arguments)
    file = arguments.measured or default_file(recipe.preset)
    text = storage.read_bytes_or_none(file)
    if text is None:
        raise UserError(
            f"there are no measurements in {storage.shown(file)}: run jobs/benchmark.py all --preset {recipe.preset}"
        )
    site = cost_plan.Site(
        gpus=arguments.gpus,
        cpus_per_gpu=arguments.cpus_per_gpu,
        store=arguments.store,
        network=arguments.network,
    )
    print(cost_plan.shown(recipe, Measurements.from_json(text), site, arguments.images, arguments.validation))


def default_file(preset: str) -> str:
    """Where measurements of a preset lie unless something else is said."""
    return str(Path.home() / "transfgu" / f"benchmark-{preset}.json")


if __name__ == "__main__":
    run_job(main)
