"""Time each stage and compare it with a lower bound, or plan a full data set from such measurements.

`transfgu benchmark [features|concepts|pseudo-labels|training|evaluation|all] [--preset P]` measures;
`transfgu benchmark ingest --preset P --images N` measures how fast a training worker reads its samples;
`transfgu benchmark rehearse --preset P --images N` runs all stages on N small images, with one kill and resume;
`transfgu benchmark many-rows --rows N` clusters N x 384 features in one process, on disk if they don't fit in memory;
`transfgu benchmark plan PRESET --images N --gpus G` plans.

The encoder is untrained unless --encoder.weights is given, because the speed of arithmetic does not depend on the
weights; the number of windows that are kept does.
"""

import argparse
import functools
import sys
from collections.abc import Sequence

from transfgu.cli import plan
from transfgu.cli.command_line import Parser, add_recipe, given_fields, print_config, recipe_of
from transfgu.errors import UserError
from transfgu.recipe import Recipe
from transfgu.store import storage


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser; its help shows the defaults of the preset among `words`."""
    made = Parser(__doc__ or "", "benchmark", "[STAGE]")
    add = made.add_argument
    add(
        "stage",
        nargs="?",
        metavar="STAGE",
        default="all",
        help="what to time (default: all); or ingest, rehearse, many-rows, plan: see above",
    )
    add("--images", metavar="N", type=int, default=4, help="images per repeat, and per training batch (default: 4)")
    add("--repeats", metavar="N", type=int, default=5, help="number of repeats; the median is reported (default: 5)")
    add("--rows", metavar="N", type=int, default=200_000, help="number of features for K-Means (default: 200000)")
    add(
        "--unfused",
        action="store_true",
        help="also time maps as published: one backward pass per class; takes gigabytes",
    )
    add("--validation", metavar="N", type=int, default=5000, help="rehearse: validation images (default: 5000)")
    add("--root", metavar="URI", help="rehearse, many-rows: folder for generated data (default: a temporary one)")
    add("--on-disk", action="store_true", help="many-rows: keep the rows on disk however few they are")
    add(
        "--requests",
        metavar="COMMAND",
        help="rehearse: shell command that prints the number of requests to the S3 server",
    )
    add("--out", metavar="URI", help="JSON file to write (default: ~/transfgu/benchmark-PRESET.json)")
    add("--verbose", action="store_true", help="show Ray's own messages")
    add_recipe(made, words, preset_flag="--preset")
    return made


def main(words: Sequence[str]) -> None:
    """Parse the command line, measure, print the table and write JSON; or plan."""
    if list(words[:1]) == ["plan"]:
        plan.main(words[1:])
        return
    arguments = parser(words).parse(words)
    if min(arguments.images, arguments.repeats, arguments.rows) < 1:
        raise UserError("--images, --repeats and --rows must be positive", code="flag-range")
    recipe = recipe_of(arguments)
    if "encoder.weights" not in given_fields(arguments):
        recipe = recipe.with_fields({"encoder.weights": "random"})
    if arguments.print_config:
        print_config(recipe)
        return
    if arguments.stage == "ingest":
        _ingest(recipe, arguments.images, arguments.out)
        return
    if arguments.stage == "rehearse":
        _rehearse(recipe, arguments)
        return
    if arguments.stage == "many-rows":
        _many_rows(recipe, arguments)
        return
    # Import torch and Ray only now, because they take seconds: mistakes on the command line are reported at once.
    from transfgu import pipeline
    from transfgu.benchmarks import stages as benchmarks
    from transfgu.encoder import Encoder
    from transfgu.runtime import connect

    stages = benchmarks.STAGES if arguments.stage == "all" else (arguments.stage,)
    encoder = Encoder.from_pretrained(recipe.encoder.name, recipe.encoder.weights)
    recipe = pipeline.fit_to_patch(recipe, encoder.patch_size)
    connect.connect(verbose=arguments.verbose)
    out = arguments.out or plan.default_file(recipe.preset)
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


def _ingest(recipe: Recipe, images: int, out: str | None) -> None:
    """Measure the ingest of training, which uses no encoder and no Ray."""
    from transfgu.benchmarks import ingest

    found = ingest.measure(recipe, images)
    print(found.to_json())
    out = out or plan.default_file(f"{recipe.preset}-ingest")
    storage.write_bytes(out, found.to_json().encode())
    print(f"written to {storage.shown(out)}", file=sys.stderr)


def _rehearse(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Run all stages on many small images, and write JSON and Markdown."""
    from transfgu.benchmarks import rehearsal

    found = rehearsal.rehearse(
        recipe,
        arguments.images,
        arguments.validation,
        root=arguments.root or "",
        requests=arguments.requests or "",
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    out = arguments.out or plan.default_file(f"{recipe.preset}-rehearsal")
    page = f"{out.removesuffix('.json')}.md"
    storage.write_bytes(out, found.to_json().encode())
    storage.write_bytes(page, found.to_markdown().encode())
    print(found.to_markdown())
    print(f"written to {storage.shown(out)} and {storage.shown(page)}", file=sys.stderr)


def _many_rows(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Measure K-Means of more rows than fit in memory."""
    from transfgu.benchmarks import many_rows

    say = functools.partial(print, file=sys.stderr, flush=True)
    found = many_rows.measure(recipe, arguments.rows, arguments.root or "", say, on_disk=arguments.on_disk)
    print(found.to_json())
    out = arguments.out or plan.default_file(f"{recipe.preset}-many-rows")
    storage.write_bytes(out, found.to_json().encode())
    say(f"written to {storage.shown(out)}")
