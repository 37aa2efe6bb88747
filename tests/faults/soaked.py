"""Run the stages, a prediction and a search in this one process, on one cluster of Ray, and measure them meanwhile.

`python soaked.py ROOT IMAGES VALIDATION TRIALS`, with the folder of Ray in the environment. ROOT is an empty folder for
data, run, masks and search. ROOT/soak.jsonl gets a line of JSON per measurement, and one per phase that has ended.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
from ray._private.internal_api import get_memory_info_reply
from ray._private.state import state

from tests.faults.harness import write_data
from transfgu import pipeline
from transfgu.benchmarks import rehearsal
from transfgu.benchmarks.processes import descendants, kind_of, own_memory
from transfgu.methods import STAGES
from transfgu.recipe import preset
from transfgu.runtime import connect
from transfgu.runtime.progress import Progress
from transfgu.search import space
from transfgu.search.stage import run_search
from transfgu.search.trials import Search
from transfgu.stages.prediction import PredictionJob, predict
from transfgu.store.artifacts import Run

SECONDS = 1.0  # between two measurements


class Meter(threading.Thread):
    """Measures this process, its descendants, Ray's folder and Ray's object store, until the program ends."""

    def __init__(self, file: Path, scratch: Path) -> None:
        """Append to `file`; measure the content of the folder `scratch`."""
        super().__init__(name="meter", daemon=True)
        self._file, self._scratch, self._began = file, scratch, time.monotonic()
        self._over, self._writing = threading.Event(), threading.Lock()

    def run(self) -> None:
        """Measure again and again."""
        while not self._over.wait(SECONDS):
            self._write(self._measured())

    @contextlib.contextmanager
    def phase(self, name: str, count: int) -> Iterator[None]:
        """Record the block as a phase that handles `count` images or trials."""
        began = self._seconds()
        yield
        self._write({"phase": name, "count": count, "began": began, "ended": self._seconds()})

    def end(self) -> None:
        """Stop measuring."""
        self._over.set()
        self.join()

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _measured(self) -> dict[str, Any]:
        processes = {}
        for process in descendants(os.getpid()):
            with contextlib.suppress(psutil.Error):
                about = psutil.Process(process)
                kind = "driver" if process == os.getpid() else kind_of(process)
                processes[process] = [kind, own_memory(process), about.num_fds(), about.num_threads()]
        files, size = 0, 0
        for folder, _, names in os.walk(self._scratch):
            for name in names:
                with contextlib.suppress(OSError):
                    size += (Path(folder) / name).lstat().st_size
                    files += 1
        store = get_memory_info_reply(state).store_stats.object_store_bytes_used
        return {"seconds": self._seconds(), "processes": processes, "files": files, "bytes": size, "store": store}

    def _write(self, row: dict[str, Any]) -> None:
        with self._writing, self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main(root: str, images: int, validation: int, trials: int) -> None:
    """Make the data, and run phase by phase."""
    folder = Path(root)
    fields = {"things": 3, "stuff": 3, "passes": 1, "training.batch_size": 64}
    recipe = rehearsal.small_recipe(preset("folder").with_fields(fields), root, folder)
    rehearsal.make_data(recipe, root, images, validation)
    (folder / "searched").mkdir()
    searched = write_data(folder / "searched", images=32).with_fields({"epochs": 1, "passes": 1})
    run = Run(str(folder / "run"))
    connect.connect()
    meter = Meter(folder / "soak.jsonl", Path(os.environ["RAY_TMPDIR"]))
    meter.start()
    for stage in STAGES:
        with meter.phase(stage, validation if stage == "evaluation" else images):
            pipeline.run_stages(recipe, run, until=stage, quiet=True)
    with meter.phase("prediction", images):
        job = PredictionJob(run=run.uri, images=str(folder / "data" / "train"), out=str(folder / "masks"))
        assert predict(job, recipe.compute, Progress("prediction", quiet=True)).made == images
    with meter.phase("search", trials):
        search = Search(
            recipe=searched,
            uri=str(folder / "search"),
            space=space.parse(["omega_1=uniform(0.5,2)"], searched),
            trials=trials,
            scheduler="none",
        )
        run_search(search, quiet=True)
    with meter.phase("rest", 1):
        time.sleep(10 * SECONDS)  # for actors to end
    meter.end()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
