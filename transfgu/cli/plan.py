"""Plan a full data set from measurements: seconds of each stage, and what bounds it.

`transfgu plan PRESET --images N --gpus G` reads what `transfgu benchmark all --preset PRESET` measured.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from transfgu.cli.command_line import Parser, add_recipe, print_config, recipe_of
from transfgu.errors import UserError
from transfgu.planning import cost_plan
from transfgu.planning.measurements import Measurements
from transfgu.store import storage


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser; its help shows the defaults of the preset among `words`."""
    made = Parser(__doc__ or "", "plan", "[PRESET] --images N --gpus G")
    add = made.add_argument
    add("--images", metavar="N", type=int, required=True, help="training images")
    add("--validation", metavar="N", type=int, default=5000, help="labelled validation images (default: 5000)")
    add("--gpus", metavar="N", type=int, required=True, help="devices like the measured one")
    add("--cpus_per_gpu", metavar="X", type=float, default=8.0, help="cores that decode for each (default: 8)")
    add("--store", metavar="X", type=float, default=1.0, help="what the storage delivers in all [GB/s] (default: 1)")
    add("--network", metavar="X", type=float, default=3.0, help="what a machine receives [GB/s] (default: 3)")
    add("--measured", metavar="URI", help="what a measurement wrote (default: ~/transfgu/benchmark-PRESET.json)")
    add_recipe(made, words)
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Parse the command line, read measurements, print the plan."""
    words = sys.argv[1:] if words is None else words
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
    )
    print(cost_plan.shown(recipe, Measurements.from_json(text), site, arguments.images, arguments.validation))


def default_file(preset: str) -> str:
    """Return the file of a preset's measurements, unless a flag names another."""
    return str(Path.home() / "transfgu" / f"benchmark-{preset}.json")
