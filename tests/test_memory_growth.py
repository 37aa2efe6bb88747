"""Ten times the images take no more memory, locally and through S3; and the memory of a very long list."""

import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.made_run import write_encoder
from transfgu.store import storage

ROOT = Path(__file__).parents[1]
FEW, MANY = 200, 2000
NAMES = 200_000
PICTURES = 20  # sample photographs, repeated under other names


class Used(NamedTuple):
    """Time and memory of a command."""

    peak: int  # bytes of memory of the process and all its descendants, shared pages counted once
    seconds: float


def measured(*command: str) -> Used:
    """Run a command to its end."""
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, sum(map(proportional_set_size, [watched, *watched.children(recursive=True)])))
            time.sleep(0.3)
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read()
    return Used(peak, time.monotonic() - started)


def proportional_set_size(process: psutil.Process) -> int:
    """Return the memory in bytes; 0 for a process that has just ended."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def write_all(files: Iterable[tuple[str, bytes]]) -> None:
    """Files by URI, sixteen at a time."""
    pending = iter(files)
    with ThreadPoolExecutor(16) as pool:
        while some := list(islice(pending, 1000)):
            for _ in pool.map(lambda file: storage.write_bytes(*file), some):
                pass


def photographs(samples: Path, uri: str, count: int) -> str:
    """A folder of `count` images."""
    originals = [p.read_bytes() for p in sorted((samples / "voc/JPEGImages").glob("*.jpg"))[:PICTURES]]
    write_all((storage.join(uri, f"{i:06d}.jpg"), originals[i % len(originals)]) for i in range(count))
    return uri


@pytest.mark.long
@pytest.mark.parametrize("where", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_ten_times_the_images_take_no_more_memory(
    where: str, samples: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path) if where == "local" else str(request.getfixturevalue("s3"))
    write_encoder(tmp_path / "encoder.safetensors")
    used = {}
    for count in (FEW, MANY):
        data = photographs(samples, f"{root}/{count}", count)
        used[count] = measured(
            *(sys.executable, "jobs/train.py", "folder", "--data", data, "--run", f"{root}/run-{count}", "--quiet"),
            *("--until", "pseudo_labels", "--things", "4", "--stuff", "2", "--windows.groups", "all"),
            *("--encoder.name", "tiny", "--encoder.weights", str(tmp_path / "encoder.safetensors")),
            *("--image_size", "64x64", "--feature_size", "128x128", "--training_size", "64x64"),
            *("--windows.size", "32x32", "--windows.scales", "0.5"),
        )
        print(f"{where}, {count} images: peak {used[count].peak / 2**20:.0f} MiB, {used[count].seconds:.0f} s")
    assert used[MANY].peak <= 1.1 * used[FEW].peak


LIST = """
import sys
from transfgu import datasets
from transfgu.recipe import preset
assert datasets.list_samples(preset("folder").with_fields({"data": sys.argv[1]}), "train").num_rows == int(sys.argv[2])
"""


@pytest.mark.long
@pytest.mark.s3
@pytest.mark.s3_server
@pytest.mark.timeout(1800)  # most of it to write them
def test_a_list_of_200_000_names(s3: str) -> None:
    data = f"{s3}/many"
    write_all((storage.join(data, f"{i:06d}.jpg"), b"") for i in range(NAMES))
    used = measured(sys.executable, "-c", LIST, data, str(NAMES))
    print(f"{NAMES} names on S3: peak {used.peak / 2**20:.0f} MiB, {used.seconds:.0f} s")
    assert used.peak < 1 << 30
