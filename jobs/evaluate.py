"""Score a decoder or a folder of masks on labelled images: a run's own, or another's on a benchmark's validation set.

`python jobs/evaluate.py --run URI`, `python jobs/evaluate.py PRESET --data URI --decoder.weights URI`, or either with
`--masks URI` for masks that any program wrote.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from transfgu.cli.command_line import Parser, add_recipe, given_fields, recipe_of, run_job
from transfgu.errors import UserError
from transfgu.store import storage
from transfgu.store.artifacts import Run


def main() -> None:
    """Parse the command line, evaluate, print a table."""
    parser = Parser(__doc__ or "")
    add_recipe(parser)
    parser.add_argument("--run", metavar="URI", help="score this run's decoder on its validation images")
    parser.add_argument(
        "--masks", metavar="URI", help="score this folder of masks, one indexed or grey PNG for each image"
    )
    parser.add_argument("--out", metavar="URI", help="write the scores to this JSON file")
    parser.add_argument("--baselines", action="store_true", help="score what a run is compared with, beside it")
    parser.add_argument("--quiet", action="store_true", help="print the scores alone")
    parser.add_argument("--verbose", action="store_true", help="let Ray's own messages through")
    arguments = parser.parse()
    run = None
    if arguments.run:
        if arguments.preset or arguments.recipe:
            raise UserError("--run brings its own recipe: leave out the PRESET and --recipe", code="flags-conflict")
        run = Run(arguments.run)
        recipe = run.recipe().with_fields(given_fields(arguments))
    else:
        recipe = recipe_of(arguments)
    if arguments.baselines and run is None:
        raise UserError("--baselines compares with a run: give --run", code="flag-missing")
    # Only now torch and Ray, which take seconds to import: a mistake on the command line is answered at once.
    from transfgu import pipeline

    if arguments.masks:
        result = pipeline.evaluate_masks(recipe, run, arguments.masks, quiet=arguments.quiet)
    else:
        result = pipeline.evaluate(recipe, run, quiet=arguments.quiet, verbose=arguments.verbose)
    scored = "masks" if arguments.masks else "method"
    table = {scored: result}
    if arguments.baselines and run is not None:
        table |= pipeline.baselines(recipe, run)
        result["baselines"] = {name: table[name] for name in table if name != scored}
    width = max(map(len, [*(result["iou"] or {}), *table]))
    for name, value in (result["iou"] or {}).items():
        print(f"{name:{width}}  {'absent' if value is None else f'{value:6.2f}'}")
    print(f"{'':{width}}    mIoU  accuracy (percent, {result['images']} images, protocol {result['protocol']})")
    for name, row in table.items():
        print(f"{name:{width}}  {row['mean_iou']:6.2f}  {row['pixel_accuracy']:8.2f}")
    if arguments.out:
        storage.write_bytes(arguments.out, json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    run_job(main)
