"""Pretraining on a real cluster: from a folder of images to weights for the encoder, with one lost attempt."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.refusals import refused
from transfgu.encoder import Encoder
from transfgu.pretraining import stage
from transfgu.pretraining.recipe import PretrainingRecipe
from transfgu.pretraining.stage import PretrainingJob
from transfgu.pretraining.training import Part, Pretraining, PretrainingInputs, read_small_images, rows_of
from transfgu.recipe import ComputeRecipe
from transfgu.runtime.progress import Progress
from transfgu.store import lock
from transfgu.store.weights import read_weights
from transfgu.training.job import Place

TINY = PretrainingRecipe(
    width=12, depth=2, heads=3, patch_size=4, global_size=16, local_size=8, local_views=1, global_mosaic=2,
    local_mosaic=2, prototypes=8, hidden=8, bottleneck=4, batch_size=8, steps=3, warmup=1,
)  # fmt: skip
QUIET = Progress("pretraining", quiet=True)


def folder_of_images(folder: Path, count: int) -> str:
    (folder / "deeper").mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(count):
        pixels = random.integers(0, 255, (20 + i % 3, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / ("deeper" if i % 2 else "") / f"{i:02d}.png")
    (folder / "notes.txt").write_text("no image")
    return str(folder)


@pytest.mark.long
@pytest.mark.ci_long
@pytest.mark.ray
def test_two_workers_learn_from_a_folder(ray_cluster: None, tmp_path: Path) -> None:
    uri = folder_of_images(tmp_path / "images", 20)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    job = PretrainingJob(images=uri, out=str(tmp_path / "vit.safetensors"), recipe=TINY, image_size=16, command="x")
    prepared = stage.pretrain(job, ComputeRecipe(workers=2), QUIET)
    assert prepared.images == 20
    assert [bad["reason"] for bad in prepared.left_out] == ["unreadable image"]

    file = read_weights(job.out)
    assert file.metadata["patch_size"] == "4"
    assert file.metadata["num_heads"] == "3"
    assert file.metadata["position_grid"] == "4 x 4"
    assert file.metadata["command"] == "x"
    encoder = Encoder.from_pretrained("mine", job.out)
    assert (encoder.width, encoder.depth, encoder.patch_size) == (12, 2, 4)


@pytest.mark.ray
@pytest.mark.long
def test_what_was_learned_is_not_learned_again(ray_cluster: None, tmp_path: Path) -> None:
    uri = folder_of_images(tmp_path / "images", 10)
    job = PretrainingJob(images=uri, out=str(tmp_path / "vit.safetensors"), recipe=TINY, image_size=16)
    stage.pretrain(job, ComputeRecipe(workers=1), QUIET)
    first = read_weights(job.out).tensors
    parts = sorted(Path(job.work).glob("images-*/*.parquet"))
    written = [part.stat().st_mtime_ns for part in parts]
    Path(job.out).unlink()
    stage.pretrain(job, ComputeRecipe(workers=1), QUIET)
    again = read_weights(job.out).tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert [part.stat().st_mtime_ns for part in parts] == written

    # With other images there is more to learn.
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(tmp_path / "images" / "new.png")
    assert stage.pretrain(job, ComputeRecipe(workers=1), QUIET).images == 11
    more = read_weights(job.out).tensors
    assert not all(torch.equal(more[name], tensor) for name, tensor in first.items())


@pytest.mark.ray
def test_one_file_of_weights_has_one_writer(ray_cluster: None, tmp_path: Path) -> None:
    uri = folder_of_images(tmp_path / "images", 10)
    job = PretrainingJob(images=uri, out=str(tmp_path / "vit.safetensors"), recipe=TINY, image_size=16)
    with (
        lock.hold(job.work, print),
        refused("run-locked --out"),
    ):
        stage.pretrain(job, ComputeRecipe(workers=1), QUIET)
    assert not list(Path(job.work).glob("images-*"))


def write_part(file: Path, images: np.ndarray, rows_per_group: int) -> Part:
    pixels = pa.array([image.tobytes() for image in images], pa.binary(images[0].size))
    pq.write_table(pa.table({"pixels": pixels}), file, row_group_size=rows_per_group)
    return Part(uri=str(file), images=len(images))


def test_rows_of_parts_are_read_in_any_order(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (9, 4, 4, 3), np.uint8)
    parts = [write_part(tmp_path / "a", images[:5], 2), write_part(tmp_path / "b", images[5:], 100)]
    rows = rows_of(parts)
    assert rows["row"].to_pylist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    order = [7, 0, 4, 4, 8, 2]
    columns = read_small_images(rows.take(order).append_column("slot", pa.array(order)), side=4)
    np.testing.assert_array_equal(columns["image"], images[order].transpose(0, 3, 1, 2))
    assert columns["slot"].tolist() == order
    assert columns["maps"].shape == (6, 0, 0, 0)


def test_the_last_epoch_ends_with_the_last_step(tmp_path: Path) -> None:
    """20 images make two batches of 8 in an epoch: three steps take two epochs."""
    images = np.repeat(np.arange(20, dtype=np.uint8), 16 * 16 * 3).reshape(20, 16, 16, 3)
    part = write_part(tmp_path / "a", images, 1)
    inputs = PretrainingInputs(recipe=TINY, parts=(part,), side=16, resident_gib=1.0)
    training = Pretraining(inputs, Place(device=torch.device("cpu"), rank=0, world=1))
    assert (training.epochs, training.order.steps) == (2, 2)
    first, second = ([set(b.inputs[:, 0, 0, 0].tolist()) for b in training.batches(epoch)] for epoch in range(2))
    assert [len(first), len(second)] == [2, 1]
    assert len(first[0] | first[1]) == 16
    assert first[0] != second[0]


def test_a_loss_that_is_no_number_stops_before_the_weights_change(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8)
    part = write_part(tmp_path / "a", images, 1)
    inputs = PretrainingInputs(recipe=TINY, parts=(part,), side=16, resident_gib=1.0)
    training = Pretraining(inputs, Place(device=torch.device("cpu"), rank=0, world=1))
    training.begin(0)
    with torch.no_grad():
        next(training.state.student.parameters()).fill_(torch.nan)
    before = {name: tensor.clone() for name, tensor in training.state.student.state_dict().items()}
    with pytest.raises(FloatingPointError, match="diverged"):
        training.step(next(training.batches(0)), 0, 0)()
    for name, tensor in training.state.student.state_dict().items():
        torch.testing.assert_close(tensor, before[name], equal_nan=True, rtol=0, atol=0)


def test_the_images_of_a_folder_are_those_of_every_other_job(tmp_path: Path) -> None:
    uri = folder_of_images(tmp_path / "images", 8)
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "images" / "grey.pgm")
    for hidden in (".hidden.png", ".folder/any.png", "__MACOSX/._0.png"):
        (tmp_path / "images" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / hidden).write_bytes(b"no image")
    names = sorted(Path(file).name for file in stage.files(uri))
    assert names == [*(f"{i:02d}.png" for i in range(8)), "grey.pgm"]


def test_an_image_is_cut_square_about_its_centre(tmp_path: Path) -> None:
    """40 x 20, red in the middle 20 columns: the square is red alone."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30, 0] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (small,) = stage.cut_squares(str(tmp_path / "a.png"), 8)
    assert small.shape == (8, 8, 3)
    assert (small == [200, 0, 0]).all()


def test_several_squares_of_an_image_are_parts_of_it(tmp_path: Path) -> None:
    """A ramp of one level per column, 40 rows: a square of side s around column x has s levels, x in their middle."""
    ramp = np.repeat(np.arange(120, dtype=np.uint8)[None, :, None], 40, axis=0).repeat(3, axis=2)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    first, *others = stage.cut_squares(str(tmp_path / "a.png"), 4, 30)
    np.testing.assert_allclose(first[0, :, 0], [44.5, 54.5, 64.5, 74.5], atol=1)  # of columns 40 to 79
    sides = np.array([(square[0, 3, 0] - float(square[0, 0, 0])) * 4 / 3 for square in others])
    assert (sides >= 20 - 2).all()
    assert (sides <= 40 + 2).all()
    assert len({square.tobytes() for square in others}) > 20
    again = stage.cut_squares(str(tmp_path / "a.png"), 4, 30)
    assert [square.tobytes() for square in again] == [square.tobytes() for square in (first, *others)]


def test_an_older_pretraining_goes_on_under_its_name() -> None:
    """Its name is the digest of its fields at that time; a newer field counts only if it differs."""
    job = PretrainingJob(images="photos", out="vit.safetensors", recipe=PretrainingRecipe(orient=False))
    assert job.digest() == "13a6eed86cde"
    blue = PretrainingJob(images="photos", out="vit.safetensors", recipe=PretrainingRecipe(orient=False, hue=36.0))
    assert blue.digest() != job.digest()


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"out": "vit.pth"}, "out-invalid vit.pth"),
        ({"image_size": 8}, "image-size --image_size"),
        ({"count": 3}, "images-few --count"),
        ({"squares": 0}, "field-range --squares"),
    ],
)
def test_a_job_that_cannot_work_is_refused(changes: dict[str, str | int], refusal: str) -> None:
    fields = {"images": "shapes", "out": "vit.safetensors", "image_size": 16, **changes}
    with refused(refusal):
        PretrainingJob(recipe=TINY, **fields)  # type: ignore[arg-type]


def test_folders_without_enough_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    few = folder_of_images(tmp_path / "few", 4)
    for uri, refusal in ((str(tmp_path / "none"), "images-missing"), (few, "images-few")):
        job = PretrainingJob(images=uri, out=str(tmp_path / "vit.safetensors"), recipe=TINY, image_size=16)
        with refused(refusal):  # before any work
            stage.pretrain(job, ComputeRecipe(workers=1), QUIET)
