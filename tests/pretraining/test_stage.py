"""Pretraining on a real cluster: a folder of images to weights that the encoder reads, through a lost attempt."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.refusals import refused
from transfgu.encoder import Encoder
from transfgu.pretraining import stage
from transfgu.pretraining.recipe import PretrainingRecipe
from transfgu.pretraining.stage import Part, PretrainingJob
from transfgu.recipe import ComputeRecipe
from transfgu.runtime.progress import Progress
from transfgu.store import lock
from transfgu.store.weights import read_weights

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


def test_the_same_parts_go_to_each_worker_once_an_epoch() -> None:
    parts = tuple(Part(uri=str(i), images=10 + i) for i in range(7))
    dealt = [stage.worker_parts(parts, 3, 1, rank, 2) for rank in range(2)]
    assert sorted(part.uri for mine in dealt for part in mine) == [str(i) for i in range(7)]
    assert dealt[0] != stage.worker_parts(parts, 3, 2, 0, 2)
    fewest = min(sum(part.images for part in mine) for mine in dealt)
    assert stage.steps_of_epoch(parts, 3, 1, 2, 4) == fewest // 4


def test_an_image_is_cut_square_about_its_centre(tmp_path: Path) -> None:
    """40 x 20, red in the middle 20 columns: the square is red alone."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30, 0] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    small = stage.small_square(str(tmp_path / "a.png"), 8)
    assert small.shape == (8, 8, 3)
    assert (small == [200, 0, 0]).all()


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"out": "vit.pth"}, "out-invalid vit.pth"),
        ({"image_size": 8}, "image-size --image_size"),
        ({"count": 3}, "images-few --count"),
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
