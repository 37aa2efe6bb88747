"""A pickle that runs code when it is read, planted wherever a file of a run is read: refused, or never read."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.made_run import MadeRun, make_run
from transfgu import Segmenter
from transfgu.artifacts import Run
from transfgu.encoder import Encoder
from transfgu.errors import UserError
from transfgu.stages import checkpoints, concepts, evaluation, pseudo_labels, samples
from transfgu.stages.training import training_images


class Planted:
    """Unpickled, it leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._canary}",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def run(made: MadeRun, tmp_path: Path) -> Run:
    shutil.copytree(made.run.uri, tmp_path / "run")
    return Run(str(tmp_path / "run"))


def test_it_does_run_code_where_it_is_unpickled(canary: Path) -> None:
    pickle.loads(pickle.dumps(Planted(canary)))
    assert canary.exists()


READERS: dict[str, tuple[str, Callable[[MadeRun, Run, str], object]]] = {
    "decoder, as a model": ("model.safetensors", lambda made, run, _: Segmenter.load(run.uri)),
    "decoder, evaluated": ("model.safetensors", lambda made, run, uri: evaluation.check_decoder(made.recipe, uri)),
    "decoder of another kind": ("decoder.pth", lambda made, run, uri: evaluation.check_decoder(made.recipe, uri)),
    "encoder": ("encoder.pth", lambda made, run, uri: Encoder.from_pretrained("tiny", uri)),
    "list of samples": ("samples/train.parquet", lambda made, run, _: samples.load(run, "train")),
    "features": (
        "features/part-00000000.parquet",
        lambda made, run, uri: concepts._read_parts([uri], concepts._groups(made.recipe)),
    ),
    "concepts": ("concepts/concepts.safetensors", lambda made, run, _: pseudo_labels.load_centroids(run)),
    "pseudo labels": ("pseudo_labels/part-00000000.parquet", lambda made, run, _: training_images(run)),
    "manifest": ("features/manifest.json", lambda made, run, _: run.artifact("features").manifest()),
}


@pytest.mark.parametrize("what", READERS)
@pytest.mark.parametrize("protocol", ["pickle", "torch"])
def test_planted_in_a_file_it_is_refused_in_one_line(
    what: str, protocol: str, made: MadeRun, run: Run, canary: Path
) -> None:
    name, read = READERS[what]
    file = Path(run.file(name))
    file.parent.mkdir(exist_ok=True)
    if protocol == "pickle":
        file.write_bytes(pickle.dumps(Planted(canary)))
    else:
        torch.save({"cls_emb": Planted(canary)}, file)
    with pytest.raises(UserError) as told:
        read(made, run, str(file))
    assert "\n" not in str(told.value)
    assert not canary.exists()


def test_planted_as_a_checkpoint_it_is_passed_over(tmp_path: Path, canary: Path) -> None:
    folder = tmp_path / "checkpoint_1"
    folder.mkdir()
    for name in ("student.safetensors", "history.json", "digests.json", "anything.pkl"):
        (folder / name).write_bytes(pickle.dumps(Planted(canary)))
    assert checkpoints.newest(str(tmp_path)) is None
    assert not canary.exists()


def test_planted_in_rays_folder_it_is_not_read_to_predict(made: MadeRun, run: Run, canary: Path) -> None:
    for name in ("trainer.pkl", "tuner.pkl", "training-0/checkpoint_manager_snapshot.json", "training-0/x/a.pkl"):
        file = Path(run.file("ray")) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(Planted(canary)))
    Path(run.file("ray")).chmod(0)  # for all but root, reading would fail
    segmenter = Segmenter.load(run.uri)
    evaluation.check_decoder(made.recipe, run.file("model.safetensors"))
    assert segmenter.predict(samples.load(run, "validation")["image"][0].as_py()).ndim == 2
    Path(run.file("ray")).chmod(0o700)
    assert not canary.exists()
