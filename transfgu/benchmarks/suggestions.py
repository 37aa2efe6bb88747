"""Compare the number of concepts suggested by `transfgu suggest` with the number of kinds in drawn scenes.

Scenes of `shapes` are drawn with all kinds, or with some chosen by the seed. The kinds are known, and the suggestion
does not use them: `python -m transfgu.benchmarks.suggestions SEED ...`
"""

import sys
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from transfgu.cluster_numbers import drawn_images, elbow, measure, suggested
from transfgu.datasets.shapes import STUFF, THINGS, scene
from transfgu.inference.shards import matrix
from transfgu.recipe import SUGGESTION_WINDOWS, preset
from transfgu.stages.features import EncodeWindows

KINDS = ((6, 4), (4, 3), (3, 2))
"""Numbers of things and of stuff in the sets of scenes."""

_AT_ONCE = 50  # scenes encoded at a time


def features(seed: int, things: int, stuff: int, images: int) -> pa.Table:
    """Draw scenes and encode their windows as the stage does; returns rows like `transfgu.stages.features.run`.

    Args:
        seed: seed of the scenes, and of the choice of kinds.
        things: number of kinds of things in them.
        stuff: number of kinds of stuff in them.
        images: number of scenes.
    """
    recipe = preset("shapes")
    generator = np.random.default_rng((seed, things, stuff))
    of_things = sorted(generator.choice(len(THINGS), things, replace=False).tolist())
    of_stuff = sorted(generator.choice(len(STUFF), stuff, replace=False).tolist())
    encode, blocks = EncodeWindows(recipe, processes=1), []
    for first in range(0, images, _AT_ONCE):
        numbers = range(first, min(first + _AT_ONCE, images))
        drawn = [scene(seed, "train", n, things=of_things, stuff=of_stuff)[0] for n in numbers]
        pixels = np.ascontiguousarray(np.stack(drawn).transpose(0, 3, 1, 2))
        block = {
            "part": pa.array([first] * len(numbers), pa.int32()),
            "index": pa.array(numbers, pa.int32()),
            "name": pa.array([str(n) for n in numbers]),
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(pixels),
            "reason": pa.nulls(len(numbers), pa.string()),
        }
        blocks.append(encode(pa.table(block)))
    found = pa.concat_tables(blocks)
    return found.filter(found["group"].is_valid())


def run(seed: int, *, images: int = 200, most: int = 12, say: Callable[[str], None] = print) -> dict[str, list[int]]:
    """Print, for each set of scenes, the number of drawn kinds and the suggested number.

    Args:
        seed: seed of the scenes.
        images: number of scenes in a set.
        most: the largest number to try.
        say: prints a line.

    Returns:
        For each set and group, such as "3 things of 3 + 2", the suggestion, and the elbow of inertia.
    """
    results = {}
    for things, stuff in KINDS:
        table = features(seed, things, stuff, images)
        for name, group, drawn in (("things", "foreground", things), ("stuff", "background", stuff)):
            own = table.filter(pc.equal(table["group"], group))
            kept = np.isin(own["index"].to_numpy(), drawn_images(own["index"].to_numpy(), SUGGESTION_WINDOWS))
            own = own.filter(pa.array(kept))
            measures = measure(
                matrix(own["feature"]),
                own["index"].to_numpy().astype(np.int64),
                range(2, most + 1),
                whiten=preset("shapes").concepts.whitens(group),
            )
            chosen = suggested(measures)
            stability = next(m.stability for m in measures if m.k == chosen)
            peak = max(measures, key=lambda m: m.silhouette).k
            results[f"{drawn} {name} of {things} + {stuff}"] = [chosen, elbow(measures)]
            say(
                f"seed {seed}, {things} + {stuff}: {drawn} {name} drawn, {chosen} suggested (stability "
                f"{stability:.2f}); elbow of inertia {elbow(measures)}, highest silhouette {peak}"
            )
    return results


if __name__ == "__main__":
    for word in sys.argv[1:]:
        run(int(word))
