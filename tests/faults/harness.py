"""Compare runs with faults to an undisturbed run: the same pictures, the same recipe, the same artefacts.

Each case prints a row of the table in `docs/reliability.md`: pytest -m long -s tests/faults
"""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import safetensors.numpy
from PIL import Image

from tests.folder_run import small
from tests.stages.small_run import picture
from transfgu import pipeline
from transfgu.methods import STAGES
from transfgu.recipe import Recipe
from transfgu.store.artifacts import Run

IMAGES = 128  # four parts
EPOCHS = 4


def write_data(folder: Path, images: int = IMAGES) -> Recipe:
    """Write pictures with labels to a folder; returns a recipe for them that takes seconds."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for number in range(images):
        pixels = picture(number)
        Image.fromarray(pixels).save(folder / "images" / f"{number:03d}.png")
        Image.fromarray((pixels.mean(-1) > 110).astype(np.uint8)).save(folder / "labels" / f"{number:03d}.png")
    return small(
        folder,
        stuff=3,
        epochs=EPOCHS,
        passes=4,
        views=False,
        **{"decoder.dropout": 0.0, "training.batch_size": 16},
    )


def timed_run(recipe: Recipe, run: Run, until: str) -> float:
    """Return the seconds of a run up to a stage."""
    started = time.monotonic()
    pipeline.run_stages(recipe, run, until=until, quiet=True)
    return time.monotonic() - started


def copy_until(source: Run, target: Path, stage: str) -> Run:
    """Restore a run's folder to its state before `stage`."""
    for before in STAGES[: STAGES.index(stage)]:
        shutil.copytree(source.file(before), target / before)
    if stage == "evaluation":
        shutil.copy(source.file("model.safetensors"), target / "model.safetensors")
    return Run(str(target))


def part_hashes(run: Run, stage: str) -> dict[str, str]:
    """Return the exact content of the part files of features or pseudo labels."""
    found = sorted(Path(run.file(stage)).glob("part-*.parquet"))
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def assert_same(run: Run, undisturbed: Run, stage: str) -> None:
    """Check that the artefact of `stage` equals that of the undisturbed run: exactly, or to 1e-5 for reduced sums."""
    if stage in ("features", "pseudo_labels"):
        hashes = part_hashes(run, stage)
        assert hashes
        assert hashes == part_hashes(undisturbed, stage)
        return
    if stage == "samples":
        assert run.artifact(stage).manifest() is not None
        return
    name = {
        "concepts": "concepts/concepts.safetensors",
        "training": "training/last.safetensors",
        "evaluation": "evaluation/confusion.safetensors",
    }[stage]
    found, wanted = (safetensors.numpy.load(Path(r.file(name)).read_bytes()) for r in (run, undisturbed))
    assert sorted(found) == sorted(wanted)
    for tensor, values in wanted.items():
        if stage == "evaluation":  # pixels on a border between two classes may fall to either
            assert np.abs(found[tensor] - values).sum() <= 1e-3 * values.sum()
        else:
            np.testing.assert_allclose(found[tensor], values, rtol=0, atol=1e-5, err_msg=tensor)


def history(run: Run, column: str = "epoch") -> list[int]:
    """Return a column of the training's epochs, in the order in which they ended."""
    return [row[column] for row in json.loads(Path(run.file("training/history.json")).read_text())]


class Reaper(threading.Thread):
    """Kills the first process with `pattern` in its command line, once `ready` returns True.

    It is a descendant of this test's process, or of the process `among`.
    """

    def __init__(self, pattern: str, ready: Callable[[], bool] = lambda: True, among: int | None = None) -> None:
        super().__init__(name="reaper", daemon=True)
        self.killed = ""
        self._pattern, self._ready, self._root = pattern, ready, psutil.Process(among)
        self._over = threading.Event()

    def run(self) -> None:
        """Search until there is one."""
        while not self._over.wait(0.02):
            for process in self._descendants() if self._ready() else ():
                try:
                    line = " ".join(process.cmdline())
                    if self._pattern in line:
                        process.kill()
                        self.killed = line
                        return
                except psutil.Error:
                    continue

    def _descendants(self) -> list[psutil.Process]:
        try:
            return list(self._root.children(recursive=True))
        except psutil.Error:  # it has ended
            return []

    def __enter__(self) -> "Reaper":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def row(fault: str, stage: str, outcome: str, lost: float | None, repeated: str) -> None:
    """Print a row of the table."""
    seconds = "–" if lost is None else f"{max(0.0, lost):.0f}"
    print(f"\n| {fault} | {stage} | {outcome} | {seconds} | {repeated} |", flush=True)
