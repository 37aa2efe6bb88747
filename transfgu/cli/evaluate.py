"""Score a decoder or a folder of masks on labelled images.

`transfgu evaluate --run URI` scores a run's own decoder, `transfgu evaluate PRESET --data URI --decoder.weights URI`
another decoder on a benchmark's validation set; both take `--masks URI` for masks from any program.
"""

import json
from collections.abc import Sequence

from transfgu.cli.command_line import (
    EVALUATED,
    UNTRAINED,
    Parser,
    add_output,
    add_recipe,
    given_fields,
    print_config,
    recipe_of,
)
from transfgu.errors import UserError, counted
from transfgu.store import storage
from transfgu.store.artifacts import Run


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser; its help shows the defaults of the preset among `words`."""
    made = Parser(__doc__ or "", "evaluate", "[PRESET]")
    made.add_argument("--run", metavar="URI", help="score this run's decoder on its validation images")
    made.add_argument("--masks", metavar="URI", help="score this folder of masks, one indexed or grey PNG per image")
    made.add_argument("--out", metavar="URI", help="write the scores to this JSON file")
    made.add_argument("--baselines", action="store_true", help="also score baselines on the same images")
    add_output(made, quiet="print only the scores")
    add_recipe(made, words, shown=(*EVALUATED, "evaluation", *UNTRAINED))
    return made


def main(words: Sequence[str]) -> None:
    """Parse the command line, evaluate, print a table."""
    arguments = parser(words).parse(words)
    run = None
    if arguments.run:
        if arguments.preset or arguments.recipe:
            raise UserError("--run has its own recipe: leave out the PRESET and --recipe", code="flags-conflict")
        run = Run(arguments.run)
        recipe = run.recipe().with_fields(given_fields(arguments))
    else:
        recipe = recipe_of(arguments)
    if arguments.baselines and run is None:
        raise UserError("--baselines requires a run: give --run", code="flag-missing")
    if arguments.print_config:
        print_config(recipe)
        return
    # Import torch and Ray only now, because they take seconds: mistakes on the command line are reported at once.
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
    images = counted(result["images"], "image")
    print(f"{'':{width}}    mIoU  accuracy (percent, {images}, protocol {result['protocol']})")
    for name, row in table.items():
        print(f"{name:{width}}  {row['mean_iou']:6.2f}  {row['pixel_accuracy']:8.2f}")
    if arguments.out:
        storage.write_bytes(arguments.out, json.dumps(result, indent=1).encode())
