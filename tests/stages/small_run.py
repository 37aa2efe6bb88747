"""Create the inputs of a stage: a run's folder with small pictures, some of them bad, and a tiny random encoder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.made_run import write_encoder
from transfgu import datasets
from transfgu.recipe import Recipe, preset
from transfgu.store.artifacts import Run

SIDE = 64
IMAGES = 70  # three parts: 32, 32 and 6
BAD = {3: "truncated image", 40: "missing image", 69: "unreadable image"}


def write_run(folder: Path, indices: Sequence[int] = range(IMAGES), *, bad: bool = True, split: str = "train") -> Run:
    """Create a run of the pictures with these numbers; those in `BAD` are damaged."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for index, number in enumerate(indices):
        path = folder / "images" / f"{number:03d}.png"
        Image.fromarray(picture(number)).save(path)
        if bad and number in BAD:
            spoil(path, BAD[number])
        name = f"picture {number:03d}"
        rows.append({"index": index, "name": name, "image": str(path), "label": None, "curated": number % 2 == 0})
    run = Run(str(folder / "run"))
    samples = Path(run.artifact("samples").uri)
    samples.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, datasets.SCHEMA), samples / f"{split}.parquet")
    write_encoder(folder / "encoder.safetensors")
    return run


def recipe_of(folder: Path, **fields: object) -> Recipe:
    """Return a recipe for that run: windows of both groups, and the fields in `fields`, by short names."""
    return preset("folder").with_fields(
        {
            "encoder.name": "tiny",
            "encoder.weights": str(folder / "encoder.safetensors"),
            "things": 3,
            "stuff": 2,
            "image_size": (SIDE, SIDE),
            "feature_size": (SIDE, SIDE),
            "windows.size": (32, 32),
            "min_background": 0.55,
            "max_bad_share": 0.2,
            **fields,
        }
    )


def picture(number: int) -> np.ndarray:
    """Draw a disc on a noisy background, 64 x 64 or, every fifth, 48 x 80."""
    random = np.random.default_rng(number)
    height, width = (48, 80) if number % 5 == 4 else (SIDE, SIDE)
    y, x = np.mgrid[:height, :width]
    disc = (y - random.uniform(16, 32)) ** 2 + (x - random.uniform(16, 48)) ** 2 < random.uniform(6, 16) ** 2
    pixels = random.integers(0, 90, (height, width, 3)) + disc[..., None] * random.integers(60, 160, 3)
    return np.asarray(pixels, np.uint8)


def spoil(path: Path, how: str) -> None:
    """Damage an image, for the reason `how`."""
    if how == "missing image":
        path.unlink()
    elif how == "truncated image":
        path.write_bytes(path.read_bytes()[:900])
    else:
        path.write_text("no picture")
