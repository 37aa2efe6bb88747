"""Estimate time and cost of a full data set from measurements: hours and dollars of each stage, and its bottleneck.

`transfgu plan PRESET --images N --gpus G` reads the measurements of `transfgu benchmark all --preset PRESET`.
"""

from collections.abc import Sequence
from pathlib import Path

from transfgu.cli.command_line import Parser, add_recipe, print_config, recipe_of
from transfgu.errors import UserError
from transfgu.planning import cost_plan
from transfgu.planning.measurements import Ingest, Measurements
from transfgu.store import storage


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser; its help shows the defaults of the preset among `words`."""
    made = Parser(__doc__ or "", "plan", "[PRESET] --images N --gpus G")
    add = made.add_argument
    add("--images", metavar="N", type=int, required=True, help="training images")
    add("--validation", metavar="N", type=int, default=5000, help="labelled validation images (default: 5000)")
    add("--gpus", metavar="N", type=int, required=True, help="number of devices like the measured one")
    add("--cpus_per_gpu", metavar="X", type=float, default=8.0, help="cores per device for decoding (default: 8)")
    add("--store", metavar="X", type=float, default=1.0, help="total throughput of the storage [GB/s] (default: 1)")
    add("--network", metavar="X", type=float, default=3.0, help="network throughput per machine [GB/s] (default: 3)")
    add("--gpu_hour", metavar="X", type=float, default=0.8, help="price of a GPU with its cores [$/h] (default: 0.8)")
    add("--get", metavar="X", type=float, default=0.0004, help="price of 1,000 reading requests [$] (default: 0.0004)")
    add("--put", metavar="X", type=float, default=0.005, help="price of 1,000 writing requests [$] (default: 0.005)")
    add("--gigabyte", metavar="X", type=float, default=0.0, help="price of a GB from the storage [$] (default: 0)")
    add("--measured", metavar="URI", help="JSON file of measurements (default: ~/transfgu/benchmark-PRESET.json)")
    add(
        "--ingest",
        metavar="URI",
        help="JSON file of `transfgu benchmark ingest`; without it, images are read again in every epoch",
    )
    add_recipe(made, words)
    return made


def main(words: Sequence[str]) -> None:
    """Parse the command line, read measurements, print the plan."""
    arguments = parser(words).parse(words)
    recipe = recipe_of(arguments)
    if arguments.print_config:
        print_config(recipe)
        return
    file = arguments.measured or default_file(recipe.preset)
    text = storage.read_bytes_or_none(file)
    if text is None:
        raise UserError(
            f"there are no measurements in {storage.shown(file)}: run transfgu benchmark all --preset {recipe.preset}",
            code="measurements-missing",
        )
    site = cost_plan.Site(
        gpus=arguments.gpus,
        cpus_per_gpu=arguments.cpus_per_gpu,
        store=arguments.store,
        network=arguments.network,
        gpu_hour=arguments.gpu_hour,
        get=arguments.get,
        put=arguments.put,
        gigabyte=arguments.gigabyte,
    )
    ingest = None
    if arguments.ingest:
        ingest = Ingest.from_json(storage.read_bytes(arguments.ingest), storage.shown(arguments.ingest))
    rates = cost_plan.measured_rates(recipe, Measurements.from_json(text), ingest)
    print(cost_plan.shown(recipe, rates, site, arguments.images, arguments.validation))


def default_file(preset: str) -> str:
    """Return the default file of a preset's measurements."""
    return str(Path.home() / "transfgu" / f"benchmark-{preset}.json")
