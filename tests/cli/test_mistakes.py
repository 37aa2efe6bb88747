"""The most frequent mistakes at each command line: each ends before Ray starts, in one line with the remedy.

Only the resources of the cluster are unknown before Ray starts; mistakes about them are reported before any work.
"""

import shlex
from pathlib import Path

import pytest
import ray
from PIL import Image

from tests.made_run import MadeRun, make_run
from tests.refusals import refused
from transfgu.cli.main import run_command
from transfgu.runtime import connect as runtime_connect

MISTAKES = {
    "train": {
        "coco": "preset-unknown coco shapes coco-stuff-27",
        "shapes --epohcs 3": "flag-unknown --epohcs --epochs",
        "folder --run OUT": "data-missing folder --data",
        "folder --data /nowhere/photos --run OUT": "file-missing /nowhere/photos",
        "coco-stuff-27 --data VOC --run OUT": "data-layout pascal-voc",
        "folder --data IMAGES --epochs many": "field-type training.epochs many",
        "folder --data IMAGES --things 1 --stuff 0": "concepts-few --things --stuff",
        "folder --data IMAGES --encoder.weights /nowhere/vit.pth --run OUT": "file-missing /nowhere/vit.pth",
        "folder --data IMAGES --track comet --run OUT": "tracker-unknown comet tensorboard",
    },
    "evaluate": {
        "": "flag-missing --run",
        "--run /nowhere/run": "run-missing /nowhere/run --run",
        "shapes --run RUN": "flags-conflict --run",
        "pascal-voc --data VOC --decoder.weights /nowhere/d.pt": "file-missing /nowhere/d.pt",
        "shapes --baselines": "flag-missing --baselines --run",
        "--masks IMAGES": "data-missing shapes --run",
        "--run RUN --masks EMPTY": "masks-missing --masks",
    },
    "predict": {
        "--images IMAGES --out OUT": "flag-missing --run --images --out",
        "--run /nowhere/run --images IMAGES --out OUT": "run-missing /nowhere/run",
        "--run RUN --images /nowhere/photos --out OUT": "file-missing /nowhere/photos",
        "--run RUN --images EMPTY --out OUT": "images-missing --images",
        "--run RUN --images IMAGES --out IMAGES/masks": "folders-nested --images --out",
        "--run RUN --images IMAGES --out OUT --format jpg": "flag-invalid",
        "--run RUN --images IMAGES --out OUT --actors two": "field-type compute.actors two",
    },
    "tune": {
        "shapes": "flag-invalid --trials",
        "shapes --trials 0": "flag-range --trials",
        "--trials 2 --search omega_9=uniform(0,1)": "field-unknown omega_9",
    },
    "benchmark": {
        "plan lip-5 --images 9 --gpus 2 --measured /nowhere/n.json": "measurements-missing n.json lip-5",
    },
    "pretrain": {
        "": "flag-invalid --out",
        "--out OUT/vit.pth": "out-invalid vit.pth .safetensors",
        "--out OUT/v.safetensors --images /nowhere/x": "file-missing /nowhere/x",
        "--out OUT/v.safetensors --patch_size 7": "image-size global_size 48 7",
        "--out OUT/v.safetensors --labels IMAGES": "labels-unsupported --labels --images",
        "--out OUT/v.safetensors --images IMAGES --labels VOC": "labels-missing",
        "--out OUT/v.safetensors --count 10": "images-few 10 64 --count --batch_size",
    },
}
TOO_MUCH = {
    "evaluate": ("--run RUN --cpus_per_actor CPUS", "cluster-too-small --cpus_per_actor"),
    "predict": (
        "--run RUN --images IMAGES --out OUT --cpus_per_actor CPUS",
        "cluster-too-small --cpus_per_actor",
    ),
    "pretrain": (
        "--out OUT/v.safetensors --workers 64",
        "cluster-too-small 64 --workers",
    ),
}
CASES = [
    pytest.param(job, words, m, id=f"{job} {words}") for job, found in MISTAKES.items() for words, m in found.items()
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize(("job", "words", "refusal"), CASES)
def test_a_mistake_ends_in_one_line_before_ray_starts(
    job: str, words: str, refusal: str, made: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    with refused(refusal):
        run_command([job, *shlex.split(words)])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("job", TOO_MUCH)
def test_what_would_wait_for_ever_ends_in_one_line(job: str, made: MadeRun, tmp_path: Path) -> None:
    words, refusal = TOO_MUCH[job]
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "1.jpg")
    for place in ("IMAGES", "OUT"):
        words = words.replace(place, str(tmp_path / place.lower()))
    words = words.replace("RUN", made.run.uri).replace("CPUS", f"{ray.cluster_resources()['CPU']:g}")
    with refused(refusal):
        run_command([job, *shlex.split(words)])
