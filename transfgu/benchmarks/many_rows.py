"""Time K-Means of more rows than fit in memory: from part files, with the code of one actor, in its own process.

`python -m transfgu.benchmarks.many_rows FOLDER K ITERATIONS` is that process. FAISS clusters as many of the rows as
fit, with the same number of iterations, and seconds per row are compared.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from transfgu.benchmarks.arithmetic import KMEANS_SEED, device_name, faiss_kmeans, kmeans_start, made_features, peak_of
from transfgu.benchmarks.processes import own_memory
from transfgu.errors import UserError
from transfgu.inference.device import own_device
from transfgu.kmeans import cluster
from transfgu.recipe import Recipe
from transfgu.runtime import parts
from transfgu.stages import concepts
from transfgu.store.scratch import available_memory

WIDTH = 384
_PART_ROWS = 1440  # windows in a part of 16 images
_SHARE = 0.2  # of the free memory, for the rows given to FAISS, which copies them


@dataclass(frozen=True, kw_only=True)
class ManyRows:
    """The measurements."""

    rows: int
    k: int
    iterations: int
    """Iterations of both."""
    seconds: float
    """Duration of our clustering, including the choice of initial centroids."""
    reading_seconds: float
    """Duration of reading the rows from local part files."""
    peak_bytes: int
    """Peak memory of the process, including mapped files."""
    peak_own_bytes: int
    """Peak memory without mapped files."""
    on_disk: bool
    """True if the rows were on disk."""
    faiss_rows: int
    faiss_seconds: float
    device: str

    @property
    def ratio(self) -> float:
        """Seconds per row and iteration, ours divided by FAISS's."""
        return (self.seconds / self.rows) / (self.faiss_seconds / self.faiss_rows)

    def to_json(self) -> str:
        """Return JSON text."""
        return json.dumps({**asdict(self), "ratio": self.ratio}, indent=1)


def measure(
    recipe: Recipe, rows: int, folder: str = "", say: Callable[[str], None] = lambda _: None, on_disk: bool = False
) -> ManyRows:
    """Write features of `rows` windows as the features stage does, cluster them in one process, and compare with FAISS.

    Args:
        recipe: number of concepts, and iterations.
        rows: number of rows; each takes 1.5 KB on disk, or twice that if they don't fit into memory.
        folder: folder for the rows; empty: a temporary one.
        say: called with a line about each step.
        on_disk: keep the rows on disk, however few they are.

    Raises:
        UserError: fewer rows than concepts; the process failed.
    """
    k, iterations = recipe.concepts.count, recipe.concepts.iterations
    if rows < max(k, 1000):
        raise UserError(f"{rows} rows are too few: give --rows {max(k, 1000)} or more", code="flag-range")
    with tempfile.TemporaryDirectory(dir=folder or None, ignore_cleanup_errors=True) as here:
        say(f"{rows} x {WIDTH} features in {here} ...")
        sample = write_parts(Path(here) / "features", rows)
        say(f"FAISS, {len(sample)} rows, {iterations} iterations ...")
        start = kmeans_start(sample, k)
        faiss_seconds, _ = faiss_kmeans(sample, start, iterations)
        faiss_rows = len(sample)
        del sample
        say("ours ...")
        words = [str(Path(here) / "features"), str(k), str(iterations), str(int(on_disk))]
        command = [sys.executable, "-m", "transfgu.benchmarks.many_rows", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise UserError(f"K-Means ended with status {done.returncode}", code="benchmark-failed")
        found = json.loads(done.stdout.splitlines()[-1])
    return ManyRows(k=k, faiss_rows=faiss_rows, faiss_seconds=faiss_seconds, device=device_name(own_device()), **found)


def write_parts(folder: Path, rows: int) -> np.ndarray:
    """Write part files of generated features; returns as many of the first rows as FAISS can have.

    Args:
        folder: folder for the files; it is created.
        rows: number of rows of `WIDTH` values.
    """
    folder.mkdir()
    wanted = min(rows, int(_SHARE * available_memory() / (4 * WIDTH)))
    kept, count = [], 0
    block = made_features(min(rows, 100 * _PART_ROWS), WIDTH)
    generator = np.random.default_rng(2)
    for first in range(0, rows, len(block)):
        features = block[: rows - first]
        if first:  # repeated rows would be too easy: add a little of another row to each
            features = features + np.float32(0.3) * block[generator.permutation(len(block))[: len(features)]]
        if count < wanted:
            kept.append(features[: wanted - count])
            count += len(kept[-1])
        for start in range(0, len(features), _PART_ROWS):
            _write_part(folder, first + start, features[start : start + _PART_ROWS])
    return np.concatenate(kept)


def _write_part(folder: Path, first: int, features: np.ndarray) -> None:
    n = len(features)
    columns: dict[str, Any] = {"index": pa.array(range(first, first + n), pa.int32())}
    columns |= {name: pa.array(np.zeros(n, np.int16)) for name in ("y0", "y1", "x0", "x1")}
    columns["group"] = pa.array(["all"] * n)
    columns["feature"] = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), WIDTH)
    summary = parts.Summary(part=first, images=n)
    parts.write_part(str(folder), summary, pa.table(columns), "", compression="none", use_dictionary=["group"])


class _Peak(threading.Thread):
    """Measures the peak memory of this process without mapped files, in a thread."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.ended = threading.Event()

    def run(self) -> None:
        """Measure several times per second."""
        while not self.ended.wait(0.1):
            self.bytes = max(self.bytes, own_memory(os.getpid()))


def main(words: list[str]) -> None:
    """Cluster the parts of a folder and print the measurements as JSON."""
    folder, k, iterations, on_disk = words[0], int(words[1]), int(words[2]), bool(int(words[3]))
    peak = _Peak()
    peak.start()
    uris = sorted(str(file) for file in Path(folder).glob("*.parquet"))
    started = time.perf_counter()
    shard, lies_on_disk = concepts.rows_of_parts(uris, str(Path(folder).parent), 0 if on_disk else concepts.RESIDENT)
    ready = time.perf_counter()
    result = cluster(shard, k, iterations=iterations, seed=KMEANS_SEED)
    ended = time.perf_counter()
    peak.ended.set()
    found = {
        "rows": shard.rows,
        "iterations": result.iterations,
        "seconds": ended - ready,
        "reading_seconds": ready - started,
        "peak_bytes": peak_of(os.getpid()),
        "peak_own_bytes": peak.bytes,
        "on_disk": lies_on_disk,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
