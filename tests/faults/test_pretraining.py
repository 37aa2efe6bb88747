"""Pretraining survives the same faults as training, because it uses the same trainer."""

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.faults.commands import job, output_of
from tests.faults.harness import Reaper, row
from tests.pretraining.test_stage import TINY, folder_of_images
from tests.refusals import refused
from transfgu.errors import UserError
from transfgu.pretraining import stage
from transfgu.pretraining.stage import PretrainingJob
from transfgu.recipe import ComputeRecipe
from transfgu.runtime.progress import Progress
from transfgu.store.weights import read_weights

pytestmark = [pytest.mark.long, pytest.mark.ray]

EPOCHS = 4
RECIPE = dataclasses.replace(TINY, steps=5 * EPOCHS)  # of 40 images, eight a batch
ONE = ComputeRecipe(workers=1)


class Listener(Progress):
    """Records notes."""

    def __init__(self) -> None:
        super().__init__("pretraining", quiet=True)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Undisturbed(NamedTuple):
    images: str
    folder: Path
    """Holds the weights of an undisturbed pretraining with one worker, and its work in progress."""

    def job(self, out: Path) -> PretrainingJob:
        return PretrainingJob(images=self.images, out=str(out / "vit.safetensors"), recipe=RECIPE, image_size=16)

    def copy(self, target: Path) -> PretrainingJob:
        """Return a job with complete work in progress, but without weights."""
        shutil.copytree(self.folder, target)
        (target / "vit.safetensors").unlink()
        return self.job(target)


@pytest.fixture(scope="module")
def pretrained(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("pretrained")
    made = Undisturbed(folder_of_images(folder / "images", 40), folder / "one")
    stage.pretrain(made.job(made.folder), ONE, Listener())
    return made


def assert_same(out: str, wanted: Path) -> None:
    found, expected = read_weights(out).tensors, read_weights(str(wanted / "vit.safetensors")).tensors
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=f"{name} differs")


def checkpoints(pretraining: PretrainingJob) -> list[Path]:
    return sorted(Path(pretraining.work).glob("ray/*/checkpoint_*/digests.json"))


def test_one_of_two_workers_killed(pretrained: Undisturbed, tmp_path: Path) -> None:
    two = ComputeRecipe(workers=2)
    stage.pretrain(pretrained.job(tmp_path / "undisturbed"), two, Listener())
    disturbed, listener = pretrained.job(tmp_path / "disturbed"), Listener()
    with Reaper("ray::RayTrainWorker", lambda: bool(checkpoints(disturbed))) as reaper:
        stage.pretrain(disturbed, two, listener)
    assert "ray::RayTrainWorker" in reaper.killed
    assert_same(disturbed.out, tmp_path / "undisturbed")
    assert listener.notes[-1].startswith("step 20 of 20")
    row("one of two workers killed", "pretraining", "continues by itself", None, "its epoch in hand")


def test_the_driver_killed_and_run_again(pretrained: Undisturbed, tmp_path: Path, ray_folder: Path) -> None:
    # Of so many epochs that the first one's checkpoint is seen long before the last one's.
    recipe = dataclasses.replace(RECIPE, steps=5 * 16)
    undisturbed, killed = (
        dataclasses.replace(pretrained.job(tmp_path / name), recipe=recipe) for name in ("undisturbed", "killed")
    )
    stage.pretrain(undisturbed, ONE, Listener())
    fields = [f"--{name}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in vars(recipe).items()]
    arguments = ["--images", pretrained.images, "--out", killed.out, "--image_size", "16", "--workers", "1", *fields]
    started = time.monotonic()
    driver = job("pretrain", arguments, ray_folder)
    while not checkpoints(killed) and driver.poll() is None and time.monotonic() - started < 200:
        time.sleep(0.01)
    assert driver.poll() is None, driver.communicate()[0]
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    told = output_of(job("pretrain", arguments, ray_folder))
    assert "took over the lock of a run that died" in told
    assert "step 5 of 80" not in told
    assert "step 80 of 80" in told
    assert_same(killed.out, tmp_path / "undisturbed")
    row("driver killed (SIGKILL), run again", "pretraining", "goes on", None, "its epoch in hand")


def test_the_last_checkpoint_cut_short(pretrained: Undisturbed, tmp_path: Path) -> None:
    cut, listener = pretrained.copy(tmp_path / "run"), Listener()
    newest = checkpoints(cut)[-1].parent
    student = newest / "student.safetensors"
    student.write_bytes(student.read_bytes()[:-50])
    account = newest.parent / "checkpoint_manager_snapshot.json"  # Ray's own
    account.write_text(account.read_text()[:-100])
    stage.pretrain(cut, ONE, listener)
    assert f"checkpoint {newest.name} is damaged: continuing from the previous one" in listener.notes
    assert [note for note in listener.notes if note.startswith("step")] == [listener.notes[-1]]
    assert listener.notes[-1].startswith("step 20 of 20")
    assert_same(cut.out, pretrained.folder)
    row("checkpoint cut short", "pretraining", "continues from the previous checkpoint", None, f"one epoch of {EPOCHS}")


def test_a_loss_that_is_no_number_is_one_line_and_not_tried_again(pretrained: Undisturbed, tmp_path: Path) -> None:
    wild = dataclasses.replace(
        pretrained.job(tmp_path), recipe=dataclasses.replace(RECIPE, learning_rate=1e30, clip=1e30)
    )
    with pytest.raises(UserError) as told:
        stage.pretrain(wild, ONE, Listener())
    assert told.value.code == "loss-not-finite"
    assert "--learning_rate" in str(told.value)
    assert "\n" not in str(told.value)
    row("loss is not a number", "pretraining", "one line says what to lower", None, "nothing")


def test_a_part_that_is_damaged_in_the_meantime_is_one_line(pretrained: Undisturbed, tmp_path: Path) -> None:
    damaged = pretrained.copy(tmp_path / "run")
    shutil.rmtree(Path(damaged.work) / "ray")
    part = sorted(Path(damaged.work).glob("images-*/part-*"))[3]
    part.write_bytes(part.read_bytes()[:-50])
    with refused(f"file-damaged {part.name}"):
        stage.pretrain(damaged, ONE, Listener())
    part.unlink()
    stage.pretrain(damaged, ONE, Listener())
    assert_same(damaged.out, pretrained.folder)


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    gone = PretrainingJob(images=str(tmp_path / "gone"), out=str(tmp_path / "vit.safetensors"), recipe=RECIPE)
    with refused("file-missing gone"):
        stage.pretrain(gone, ONE, Listener())


def test_each_epoch_is_tracked(pretrained: Undisturbed) -> None:
    events = sorted((pretrained.folder / "vit.safetensors.work" / "tensorboard").iterdir())
    assert len(events) == EPOCHS
    history = json.loads((checkpoints(pretrained.job(pretrained.folder))[-1].parent / "history.json").read_text())
    assert [h["step"] for h in history] == [5, 10, 15, 20]
