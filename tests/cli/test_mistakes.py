"""The commonest mistakes at each job's command line: each ends before Ray starts, in one line with the remedy.

What can't be known before is what the cluster has room for: that is told before any work.
"""

import runpy
import shlex
import sys
from pathlib import Path

import pytest
import ray
from PIL import Image

from tests.made_run import MadeRun, make_run
from transfgu.errors import UserError
from transfgu.runtime import connect as runtime_connect

ROOT = Path(__file__).resolve().parents[2]

MISTAKES = {
    "train": {
        "coco": r"unknown preset coco; choose one of shapes, coco-stuff-27, ",
        "shapes --epohcs 3": r"there is no flag --epohcs; near ones: --epochs",
        "folder --run OUT": r"preset folder needs --data, a folder with images",
        "folder --data /nowhere/photos --run OUT": r"there is no file or folder /nowhere/photos: check the path",
        "coco-stuff-27 --data VOC --run OUT": r"has no .* looks like the data of preset pascal-voc",
        "folder --data IMAGES --epochs many": r"training\.epochs must be a whole number, not 'many'",
        "folder --data IMAGES --things 1 --stuff 0": r"a run needs at least two concepts: set --things and --stuff",
        "folder --data IMAGES --encoder.weights /nowhere/vit.pth --run OUT": r"there is no file /nowhere/vit\.pth",
        "folder --data IMAGES --track comet --run OUT": r"--track knows no comet: choose of tensorboard",
    },
    "evaluate": {
        "": r"what should be evaluated\? give --run URI, or a PRESET",
        "--run /nowhere/run": r"/nowhere/run is no run's folder, as it holds no recipe\.yaml: give what --run named",
        "shapes --run RUN": r"--run brings its own recipe: leave out the PRESET",
        "pascal-voc --data VOC --decoder.weights /nowhere/d.pt": r"there is no file /nowhere/d\.pt: check the path",
        "shapes --baselines": r"--baselines compares with a run: give --run",
        "--masks IMAGES": r"the images of shapes are drawn by a run: give --run URI in place of the PRESET",
        "--run RUN --masks EMPTY": r"holds no masks: give --masks a folder of indexed or grey PNGs",
    },
    "predict": {
        "--images IMAGES --out OUT": r"--run is missing: predict needs --run URI, --images URI and --out URI",
        "--run /nowhere/run --images IMAGES --out OUT": r"/nowhere/run is no run's folder",
        "--run RUN --images /nowhere/photos --out OUT": r"there is no file or folder /nowhere/photos: check the path",
        "--run RUN --images EMPTY --out OUT": r"holds no image \(\.jpg, \.png, \.webp, \.\.\.\): check --images",
        "--run RUN --images IMAGES --out IMAGES/masks": r"lie in each other: .* choose two folders",
    },
    "pretrain": {
        "": r"required: --out",
        "--out OUT/vit.pth": r"vit\.pth must name a file that ends in \.safetensors",
        "--out OUT/v.safetensors --images /nowhere/x": r"there is no file or folder /nowhere/x: check the path",
        "--out OUT/v.safetensors --patch_size 7": r"global_size 48 is not a multiple of patch_size 7",
        "--out OUT/v.safetensors --count 10": r"--count 10 does not fill a batch of 64: raise it, or lower",
    },
}
TOO_MUCH = {
    "evaluate": ("--run RUN --cpus_per_actor CPUS", r"CPUs, and \d+ are needed, one of them to read images"),
    "predict": (
        "--run RUN --images IMAGES --out OUT --cpus_per_actor CPUS",
        r"CPUs, and \d+ are needed, one of them to read images",
    ),
    "pretrain": (
        "--out OUT/v.safetensors --workers 64",
        r"room for \d+ training workers of 1 CPUs and 0 GPUs, and 64 are asked for: lower --workers",
    ),
}
CASES = [
    pytest.param(job, words, m, id=f"{job} {words}") for job, found in MISTAKES.items() for words, m in found.items()
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize(("job", "words", "message"), CASES)
def test_a_mistake_ends_in_one_line_before_ray_starts(
    job: str, words: str, message: str, made: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("voc/JPEGImages", "voc/SegmentationClass", "voc/ImageSets/Segmentation", "images", "empty"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("voc/JPEGImages", "images"):
        Image.new("RGB", (32, 32)).save(tmp_path / folder / "1.jpg")
    Image.new("L", (32, 32)).save(tmp_path / "voc" / "SegmentationClass" / "1.png")
    for split in ("train", "trainaug", "val"):
        (tmp_path / "voc" / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("1\n")
    for place in ("VOC", "IMAGES", "EMPTY", "OUT"):
        words = words.replace(place, str(tmp_path / place.lower()))
    words = words.replace("RUN", made.run.uri)

    def connect(**_: object) -> None:
        pytest.fail("Ray was started")

    monkeypatch.setattr(runtime_connect, "connect", connect)
    monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", *shlex.split(words)])
    monkeypatch.setattr(sys, "path", [*sys.path])  # jobs put their clone in front
    with pytest.raises(UserError, match=message) as caught:
        runpy.run_path(str(ROOT / "jobs" / f"{job}.py"))["main"]()
    assert "\n" not in str(caught.value)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("job", TOO_MUCH)
def test_what_would_wait_for_ever_ends_in_one_line(
    job: str, made: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, message = TOO_MUCH[job]
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "1.jpg")
    for place in ("IMAGES", "OUT"):
        words = words.replace(place, str(tmp_path / place.lower()))
    words = words.replace("RUN", made.run.uri).replace("CPUS", f"{ray.cluster_resources()['CPU']:g}")
    monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", *shlex.split(words)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(UserError, match=message) as caught:
        runpy.run_path(str(ROOT / "jobs" / f"{job}.py"))["main"]()
    assert "\n" not in str(caught.value)
