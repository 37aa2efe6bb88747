import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.made_run import SIDE, TRAIN, MadeRun, make_run
from tests.refusals import refused
from transfgu.benchmarks.processes import descendants, kind_of
from transfgu.datasets.packed_maps import maps_of_planes, unpack_planes
from transfgu.datasets.rows import read_training_rows
from transfgu.decoder import MaskDecoder
from transfgu.encoder import Encoder, normalise
from transfgu.recipe import Recipe
from transfgu.runtime.progress import Progress
from transfgu.stages import samples, training
from transfgu.stages.training import training_images
from transfgu.store import parquet, storage
from transfgu.training import schedule
from transfgu.training.order import Order
from transfgu.training.state import State
from transfgu.training.step import make_optimiser, start_step
from transfgu.views import apply_views, draw_views

pytestmark = pytest.mark.ray

COMMON = {
    "epochs": 3,
    "teacher_start": 1,
    "teacher_every": (1,),
    "training.batch_size": 4,
    "decoder.depth": 1,
    "decoder.dropout": 0.0,
    "omega_1": 1.0,
    "omega_2": 0.3,
    "certain_share": 0.5,
    "lr": 1e-4,
    "compute.workers": 2,
    "seed": 5,
}


class Listener(Progress):
    """Records notes."""

    def __init__(self) -> None:
        super().__init__("training", quiet=True)
        self.notes: list[str] = []
        self.steps: tuple[int, int | None] = (0, 0)

    def update(self, done: int, total: int | None, unit: str, more: str = "") -> None:
        assert unit == "steps"
        self.steps = (done, total)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Killer(Listener):
    """Kills a training worker after the first epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.killed_after = -1

    def note(self, text: str) -> None:
        super().note(text)
        if self.killed_after < 0:
            workers: list[psutil.Process] = []
            with contextlib.suppress(psutil.NoSuchProcess):  # one may end meanwhile: look again
                workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name()]
            if workers:
                workers[-1].send_signal(signal.SIGKILL)
                self.killed_after = len(self.notes)


def one_process(recipe: Recipe, made: MadeRun) -> tuple[dict[str, Tensor], list[float]]:
    """Run the same training as one loop without workers; returns the last student, and each epoch's mean loss."""
    encoder = Encoder.from_pretrained(recipe.encoder.name, recipe.encoder.weights)
    torch.manual_seed(recipe.seed)
    student = MaskDecoder(
        encoder.width, recipe.classes, num_heads=encoder.num_heads, depth=recipe.decoder.depth, dropout=0.0
    )
    initial = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    optimiser = make_optimiser(student, recipe.training.lr, recipe.training.weight_decay)
    columns = read_training_rows(training_images(made.run), size=(SIDE, SIDE))
    images, planes = torch.from_numpy(columns["image"]), unpack_planes(torch.from_numpy(columns["maps"]))
    order = Order(images=TRAIN, passes=recipe.training.passes, batch_size=4, seed=recipe.seed)
    teacher, losses = None, []
    for epoch in range(recipe.training.epochs):
        plan = schedule.plan(recipe.training, epoch)
        if plan.updates_teacher:
            teacher = MaskDecoder.from_state_dict(student.state_dict(), num_heads=encoder.num_heads)
            student.load_state_dict(initial)
        totals = []
        for step, slots in enumerate(order.epoch(epoch)):
            places = torch.from_numpy(slots % TRAIN)
            if recipe.training.views:
                views = draw_views(slots.tolist(), (SIDE, SIDE), seed=recipe.seed, epoch=epoch)
                pixels, seen = apply_views(images[places], planes[places], views, encoder.patch_size)
            else:
                pixels, seen = normalise(images[places]), planes[places]
            result = start_step(
                student,
                optimiser,
                encoder.patch_tokens(pixels),
                maps_of_planes(seen),
                teacher,
                omega_1=recipe.training.omega_1,
                omega_2=recipe.training.omega_2,
                alpha=plan.alpha,
                permutation=np.random.default_rng([recipe.seed, epoch, step]).permutation(recipe.classes),
                background_threshold=0.1 if recipe.background else None,
                certain_share=recipe.training.certain_share,
            ).result()
            totals.append(result.total)
        losses.append(float(np.mean(totals)))
    return student.state_dict(), losses


def assert_same_weights(uri: str, wanted: dict[str, Tensor]) -> None:
    found = safetensors.torch.load(storage.read_bytes(uri))
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=f"{name} differs")


def history_of(made: MadeRun) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = json.loads(storage.read_bytes(made.run.file("training/history.json")))
    return history


def test_two_workers_train_as_one_process_does(tmp_path: Path, ray_cluster: None) -> None:
    made, handler = make_run(tmp_path), signal.getsignal(signal.SIGINT)
    recipe = made.recipe.with_fields({**COMMON, "passes": 2, "views": False, "lr": 1e-3})
    listener = Listener()
    outcome = training.run(recipe, made.run, listener)
    assert signal.getsignal(signal.SIGINT) is handler
    weights, losses = one_process(recipe, made)
    history = history_of(made)
    assert_same_weights(made.run.file("training/last.safetensors"), weights)
    assert [row["total"] for row in history] == pytest.approx(losses, abs=1e-4)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert [row["teacher_updated"] for row in history] == [False, True, True]
    assert [row["alpha"] for row in history] == [None, 0.03, 0.03]
    merits = [row["mean_iou"] + row["pixel_accuracy"] for row in history]
    assert outcome.details["model of epoch"] == 1 + int(np.argmax(merits))
    assert outcome.items == TRAIN
    model = storage.read_bytes(made.run.file("model.safetensors"))
    best, last = (
        safetensors.torch.load(model),
        safetensors.torch.load(storage.read_bytes(made.run.file("training/last.safetensors"))),
    )
    assert all(torch.equal(best[n], last[n]) for n in last) == (outcome.details["model of epoch"] == 3)
    metadata = json.loads(model[8 : 8 + int.from_bytes(model[:8], "little")])["__metadata__"]
    assert metadata == {
        "transfgu_format": "2",
        "classes": "10",
        "num_heads": "3",
        "patch_size": "8",
        "encoder": "tiny",
        "recipe": recipe.digest("training"),
    }
    assert [note.split(":")[0] for note in listener.notes] == ["epoch 1 of 3", "epoch 2 of 3", "epoch 3 of 3"]
    assert listener.steps[1] == 9

    # A training leaves no process behind. Ray kills an actor that does not end after 30 s.
    of_training = {"TrainController", "DatasetManager", "ProgressBoard", "RayTrainWorker"}
    deadline = time.monotonic() + 60
    while (left := of_training & {*map(kind_of, descendants(os.getpid()))}) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


@pytest.mark.long
def test_a_training_that_ended_is_published_again_and_of_other_images_begins_again(
    tmp_path: Path, ray_cluster: None
) -> None:
    made = make_run(tmp_path)
    recipe = made.recipe.with_fields({**COMMON, "compute.workers": 1})
    outcome = training.run(recipe, made.run, Listener())
    model = storage.read_bytes(made.run.file("model.safetensors"))

    # The command given again, as after a driver that died at the end, trains nothing and publishes the same.
    Path(made.run.file("model.safetensors")).unlink()
    again = Listener()
    assert training.run(recipe, made.run, again) == outcome
    assert storage.read_bytes(made.run.file("model.safetensors")) == model
    assert again.notes == []

    # Of other images it goes on from nothing.
    table = samples.load(made.run, "train")
    parquet.write_table(made.run.file("samples/train.parquet"), rotated(table))
    training.run(recipe, made.run, again)
    assert [note.split(":")[0] for note in again.notes] == ["epoch 1 of 3", "epoch 2 of 3", "epoch 3 of 3"]


def rotated(table: pa.Table) -> pa.Table:
    """Return the same images, each in the place of the next."""
    images = table["image"].to_pylist()
    return table.set_column(table.column_names.index("image"), "image", pa.array(images[1:] + images[:1]))


def test_what_a_training_goes_on_from(tmp_path: Path) -> None:
    """Other images, labels or concepts change it; the division of pseudo labels into parts does not."""
    made = make_run(tmp_path)
    images, validation = training_images(made.run), samples.labelled(made.recipe, made.run)

    def digest() -> str:
        return training.inputs_digest(
            made.recipe, made.run, training_images(made.run), samples.labelled(made.recipe, made.run)
        )

    first = digest()
    parts = sorted(Path(made.run.file("pseudo_labels")).glob("part-*"))
    whole = pa.concat_tables(pq.read_table(part) for part in parts)
    parts[1].unlink()
    pq.write_table(whole, parts[0])
    assert training_images(made.run) != images
    assert digest() == first
    others = {
        training.inputs_digest(made.recipe, made.run, rotated(images), validation),
        training.inputs_digest(made.recipe, made.run, images.slice(1), validation),
        training.inputs_digest(made.recipe, made.run, images, rotated(validation)),
        training.inputs_digest(made.recipe, made.run, images, validation.slice(1)),
    }
    concepts = Path(made.run.file("concepts/concepts.safetensors"))
    tensors = safetensors.torch.load(concepts.read_bytes())
    tensors["centroids"][0, 0] += 1e-3
    safetensors.torch.save_file(tensors, concepts)
    assert len({first, *others, digest()}) == 6


@pytest.mark.long
def test_a_worker_that_dies_costs_its_epoch_alone(tmp_path: Path, ray_cluster: None) -> None:
    made = make_run(tmp_path, labels=False, things=5, stuff=0)  # with a background, without labels
    recipe = made.recipe.with_fields({**COMMON, "passes": 20, "training.views": True})
    assert recipe.background
    killer = Killer()
    outcome = training.run(recipe, made.run, killer)
    assert 1 <= killer.killed_after < 3  # it died before the last epoch's end
    assert killer.notes[-1].startswith("epoch 3 of 3")
    weights, _ = one_process(recipe, made)
    assert_same_weights(made.run.file("training/last.safetensors"), weights)
    assert [row["mean_iou"] for row in history_of(made)] == [None] * 3
    assert outcome.details["model of epoch"] == 3


@pytest.mark.long
@pytest.mark.ci_long
def test_what_trying_again_cannot_mend_is_one_line(tmp_path: Path, ray_cluster: None) -> None:
    made = make_run(tmp_path)
    rows = training_images(made.run)
    gone = Path(rows["image"][2].as_py())
    gone.unlink()
    recipe = made.recipe.with_fields({**COMMON, "compute.workers": 1})
    with refused(f"image-changed {gone.name}"):
        training.run(recipe, made.run, Listener())


def test_a_run_without_pseudo_labels_is_refused(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    for part in Path(made.run.file("pseudo_labels")).iterdir():
        part.unlink()
    with refused("pseudo-labels-missing"):
        training.run(made.recipe, made.run, Listener())


def state(seed: int) -> State:
    torch.manual_seed(seed)
    student = MaskDecoder(12, 4, num_heads=3, dropout=0.0)
    return State(student=student, optimiser=make_optimiser(student, 1e-2))


def train(state: State, steps: int) -> None:
    assert state.optimiser
    for step in range(steps):
        torch.manual_seed(100 + step)
        start_step(
            state.student,
            state.optimiser,
            torch.randn(2, 9, 12),
            torch.rand(2, 4, 3, 3),
            state.teacher,
            omega_1=1.0,
            omega_2=0.3,
            alpha=0.05,
            permutation=[1, 0, 3, 2],
        ).result()


def test_a_state_that_was_saved_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    first = state(0)
    train(first, 2)
    first.promote()
    first.best = {name: tensor.clone() for name, tensor in first.student.state_dict().items()}
    train(first, 2)
    first.history = [{"epoch": 1, "mean_iou": None}]
    first.snapshot({"classes": "4"}).save(tmp_path)
    second = state(1)
    second.load(tmp_path, torch.device("cpu"))
    assert second.history == first.history
    assert first.best is not None
    assert second.best is not None
    train(first, 3)
    train(second, 3)
    for a, b in ((first.student.state_dict(), second.student.state_dict()), (first.best, second.best)):
        for name in a:
            assert torch.equal(a[name], b[name]), name
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json"}
