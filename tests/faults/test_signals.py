"""SIGINT and SIGTERM to every job, at any moment: one line, exit code 130 or 143, soon, and nothing left behind.

The same holds, with exit code 2, for a job whose Ray is killed.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import safetensors.torch

from tests.faults.harness import row, write_data
from tests.made_run import make_run
from transfgu.decoder import MaskDecoder
from transfgu.encoder import Encoder
from transfgu.runtime.stopping import LINE

ROOT = Path(__file__).parents[2]
SECONDS = 15
TERM, INT = signal.SIGTERM, signal.SIGINT
KINDS = {
    "TERM": ([TERM], False),
    "INT": ([INT], False),
    "INT, INT": ([INT, INT], False),
    "TERM, INT ignored": ([TERM], True),
}
"""The signals sent, and True if the job inherits SIGINT as ignored, as from a shell script that starts it with `&`."""

JOBS = {
    "train": "--recipe RECIPE --run OUT",
    "tune": "--recipe RECIPE --run OUT --trials 2",
    "evaluate": "--recipe RECIPE --decoder.weights DECODER",  # a run's few images would be scored without Ray
    "predict": "--run MADE --images IMAGES --out OUT",
    "pretrain": "--images IMAGES --out OUT/vit.safetensors --width 48 --depth 2 --heads 3 --batch_size 16",
    "benchmark": "features --recipe RECIPE --encoder.weights ENCODER --images 4 --out OUT/found.json",
}
COMPLETE = ["shapes", "--limit", "12", "--epochs", "1"]
"""The command of the golden run, whose stages are complete: only its report is written again."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Paths in the command lines of the jobs: a recipe, its images, and a made run."""
    folder = tmp_path_factory.mktemp("jobs")
    recipe = folder / "recipe.yaml"
    (folder / "data").mkdir()
    data = write_data(folder / "data", images=40)
    recipe.write_text(data.to_yaml())
    encoder = Encoder.from_pretrained(data.encoder.name, data.encoder.weights)
    decoder = MaskDecoder(encoder.width, data.classes, num_heads=encoder.num_heads)
    safetensors.torch.save_file(decoder.state_dict(), folder / "decoder.safetensors")
    (folder / "made").mkdir()
    made = make_run(folder / "made")
    return {
        "RECIPE": str(recipe),
        "MADE": made.run.uri,
        "IMAGES": str(folder / "data" / "images"),
        "ENCODER": data.encoder.weights,
        "DECODER": str(folder / "decoder.safetensors"),
    }


@pytest.fixture
def words(places: Mapping[str, str], tmp_path: Path, ray_folder: Path) -> Iterator[dict[str, list[str]]]:
    """Return the command line of each job, with output in a folder of the test."""
    shutil.copytree(places["MADE"], tmp_path / "made")
    own = {"MADE": str(tmp_path / "made"), "OUT": str(tmp_path / "out")}
    found = {}
    for job, text in JOBS.items():
        for name, path in {**places, **own}.items():
            text = text.replace(name, path)
        found[job] = [str(ROOT / "jobs" / f"{job}.py"), *text.split()]
    yield found
    assert not list(ray_folder.iterdir())  # Ray's folder went with the job


def started(job: psutil.Process, name: str) -> bool:
    """Return True if a descendant's command line contains `name`."""
    for process in job.children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                return True
        except psutil.Error:
            continue
    return False


def catches_term(job: psutil.Process) -> bool:
    """Return True if the job has a handler for SIGTERM, which Python sets after a while, later on a busy machine."""
    status = Path(f"/proc/{job.pid}/status").read_text()
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(caught, 16) >> (TERM - 1) & 1)


def at_a_task(job: psutil.Process) -> bool:
    """Return True if a worker of Ray is at a task or an actor, which none is before Ray has started completely."""
    for process in job.children(recursive=True):
        try:
            if re.match(r"ray::(?!IDLE|\w+Agent\b)", " ".join(process.cmdline())):
                return True
        except psutil.Error:
            continue
    return False


def has_metrics(job: psutil.Process) -> bool:
    """Return True if the training whose folder is its last word has written `metrics.json`, just before its report."""
    return Path(job.cmdline()[-1], "metrics.json").exists()


MOMENTS: dict[str, Callable[[psutil.Process], bool]] = {
    "before Ray": catches_term,
    "during its start": lambda job: started(job, "gcs_server"),
    "in work": at_a_task,
    "while it writes its report": has_metrics,
}


def start(
    is_moment: Callable[[psutil.Process], bool], words: list[str], folder: Path, *, ignored: bool = False
) -> "subprocess.Popen[str]":
    """Start the job and wait for the moment; with `ignored`, it inherits SIGINT as ignored."""
    # Measured for coverage, a process handles SIGTERM from its start, before the job does.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    running = subprocess.Popen(
        [sys.executable, *words],
        env={**environment, "RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=(lambda: signal.signal(INT, signal.SIG_IGN)) if ignored else None,
    )
    process, deadline = psutil.Process(running.pid), time.monotonic() + 120
    while not is_moment(process) and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running.poll() is None, running.communicate()
    return running


def is_zombie(process: psutil.Process) -> bool:
    """Return True if a process has ended, and is only to be collected by the system's first process."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def end(running: "subprocess.Popen[str]", disturb: Callable[[], None]) -> tuple[str, float, int]:
    """Disturb the job, and check how it ends; return its last line, its seconds to end, and its former descendants."""
    others = psutil.Process(running.pid).children(recursive=True)
    sent = time.monotonic()
    disturb()
    try:
        _, told = running.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        running.kill()
        pytest.fail(f"still running after a minute: {running.communicate()[1]}")
    seconds = time.monotonic() - sent
    _, left = psutil.wait_procs(others, timeout=1)
    left = [process for process in left if not is_zombie(process)]
    assert "Traceback" not in told
    assert "***" not in told
    assert seconds < SECONDS
    assert not left
    return [line for line in told.splitlines() if line][-1], seconds, len(others)


def check(job: str, kind: str, moment: str, words: list[str], folder: Path) -> None:
    """Start the job, send it the signals at the moment, and check how it ends."""
    signals, ignored = KINDS[kind]
    running = start(MOMENTS[moment], words, folder, ignored=ignored)

    def send() -> None:
        for number in signals:
            running.send_signal(number)
            time.sleep(0.3 * (len(signals) > 1))

    line, seconds, ended = end(running, send)
    assert line == LINE
    assert running.returncode == 128 + signals[0]
    row(f"{kind}: exit code {running.returncode}, {ended} processes ended", f"{job}, {moment}", LINE, seconds, "")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("job", "kind"),
    [
        # All jobs install the same handlers: one of them is sent every kind here.
        pytest.param(job, kind, marks=() if job == "train" or kind == "TERM" else pytest.mark.long)
        for job in JOBS
        for kind in KINDS
    ],
)
def test_a_job_that_has_not_started_ray(job: str, kind: str, words: dict[str, list[str]], ray_folder: Path) -> None:
    check(job, kind, "before Ray", words[job], ray_folder)


@pytest.mark.processes
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "TERM" else pytest.mark.long) for kind in KINDS]
)
def test_a_training_that_writes_its_report(kind: str, ray_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(ROOT / "tests" / "golden" / "run", run)
    (run / "metrics.json").unlink()  # written again just before the report
    command = [str(ROOT / "jobs" / "train.py"), *COMPLETE, "--run", str(run)]
    check("train", kind, "while it writes its report", command, ray_folder)
    assert not (run / "run.lock").exists()
    assert not (run / "report.html").exists()
    done = subprocess.run([sys.executable, *command], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0
    assert (run / "report.html").exists()


@pytest.mark.long
@pytest.mark.ci_long
@pytest.mark.ray
def test_a_training_on_ray(words: dict[str, list[str]], ray_folder: Path, tmp_path: Path) -> None:
    check("train", "TERM, INT ignored", "in work", words["train"], ray_folder)
    assert not (tmp_path / "out" / "run.lock").exists()


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.parametrize("moment", ["during its start", "in work"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("job", JOBS)
def test_a_job_on_ray(
    job: str, kind: str, moment: str, words: dict[str, list[str]], ray_folder: Path, tmp_path: Path
) -> None:
    check(job, kind, moment, words[job], ray_folder)
    assert not list(tmp_path.rglob("run.lock"))


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
@pytest.mark.parametrize("job", ["train", "tune", "predict", "pretrain"])
def test_a_job_whose_ray_is_killed(
    job: str, name: str, words: dict[str, list[str]], ray_folder: Path, tmp_path: Path
) -> None:
    running = start(at_a_task, words[job], ray_folder)
    (process,) = [p for p in psutil.Process(running.pid).children() if p.name() == name]
    line, seconds, ended = end(running, process.kill)
    assert line.startswith(f"Ray's process {name} was killed by SIGKILL")
    assert line.endswith("[ray-died]")
    assert running.returncode == 2
    assert not list(tmp_path.rglob("run.lock"))
    row(f"{name} killed: exit code 2, {ended} processes ended", job, line, seconds, "")
