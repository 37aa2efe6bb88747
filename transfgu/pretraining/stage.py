"""Pretraining on Ray: tasks make small square images of whatever is there, once; workers train on those alone.

Decoding photographs would take longer than training a small ViT on them, and every epoch would do it again. So images
are first brought to one small size and kept in parts beside the result; a part that exists is complete. Each worker
then streams its own parts in an order that follows from the seed and the epoch, and a lost worker, node or driver
costs the epoch in hand.
"""

import hashlib
import io
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.train
import ray.train.torch
import safetensors.torch
import torch
from jaxtyping import UInt8
from numpy import ndarray
from ray.data import DataContext
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from transfgu.datasets import images as pictures
from transfgu.datasets import shapes
from transfgu.errors import BadInput, UserError
from transfgu.inference.device import use_cores
from transfgu.pretraining.objective import (
    StepSchedule,
    Student,
    Teacher,
    Views,
    apply_schedule,
    encoder_state,
    new_optimizer,
    pretraining_loss,
)
from transfgu.pretraining.recipe import PretrainingRecipe
from transfgu.recipe import ComputeRecipe
from transfgu.runtime import capacity
from transfgu.runtime.progress import Progress
from transfgu.store import parquet, storage
from transfgu.store.lock import hold
from transfgu.training.board import put_up, watched
from transfgu.training.process_group import process_group

SHAPES = "shapes"
"""In place of a folder's URI: the embedded demonstration's pictures of single objects."""

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jp2", ".avif")
_PARTS, _PART_SIZE = 64, 256  # at least so many parts (workers share them), of at most so many images
_MAX_BAD_SHARE = 0.1
_TELL_STEPS = 5
_ATTEMPTS = 5
_REMEDY = "delete it, and run again"  # a damaged part


@dataclass(frozen=True, kw_only=True)
class PretrainingJob:
    """What to pretrain on, and where its results go."""

    images: str
    """URI of a folder, searched at any depth, or `SHAPES`."""
    out: str
    """URI of the weights: a `.safetensors` file. Work in hand lies beside it, in `OUT.work`."""
    recipe: PretrainingRecipe
    count: int = 12_000
    """Pictures drawn, where `images` is `SHAPES`."""
    image_size: int = shapes.OBJECT_SIZE
    """Side to which images are brought, after cutting them square about their centres; px."""
    command: str = ""
    """The command line, to be kept with the weights."""

    def __post_init__(self) -> None:
        if not self.out.endswith(".safetensors"):
            raise UserError(
                f"--out {storage.shown(self.out)} must name a file that ends in .safetensors", code="out-invalid"
            )
        if self.image_size < self.recipe.global_size:
            raise UserError(
                f"--image_size {self.image_size} is less than the views' {self.recipe.global_size} pixels: raise it",
                code="image-size",
            )
        if self.count < self.recipe.batch_size:
            raise UserError(
                f"--count {self.count} does not fill a batch of {self.recipe.batch_size}: raise it, "
                "or lower --batch_size",
                code="images-few",
            )

    @property
    def work(self) -> str:
        """URI of the folder of work in hand; it may be deleted afterwards."""
        return storage.absolute(self.out) + ".work"

    def digest(self) -> str:
        """Of all that the weights depend on."""
        fields = {**asdict(self.recipe), "images": self.images, "count": self.count, "size": self.image_size}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A Parquet file of small images."""

    uri: str
    images: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The images of a job, made small."""

    listing: str
    """Digest of which images were asked for, and of their size."""
    parts: tuple[Part, ...]
    left_out: tuple[dict[str, str], ...]
    """Name and reason of each image that could not be used."""

    @property
    def images(self) -> int:
        """How many there are."""
        return sum(part.images for part in self.parts)


# ---- images


def prepare(job: PretrainingJob, progress: Progress) -> Prepared:
    """Bring all images to one small size, in parts; parts that are there already are kept.

    Raises:
        UserError: no image, too few for a batch, or more than a tenth of them unusable.
    """
    names = [str(i) for i in range(job.count)] if job.images == SHAPES else _files(job.images)
    if len(names) < job.recipe.batch_size:
        raise UserError(
            f"{len(names)} images are too few for a batch of {job.recipe.batch_size}: give more, or lower --batch_size",
            code="images-few",
        )
    size = max(1, min(_PART_SIZE, len(names) // _PARTS))
    seed = job.recipe.seed if job.images == SHAPES else 0
    listing = hashlib.sha256(json.dumps([job.image_size, seed, names]).encode()).hexdigest()[:12]
    folder = storage.join(job.work, f"images-{listing}")
    rows = [
        {
            "part": storage.join(folder, f"part-{first:08d}.parquet"),
            "names": names[first : first + size],
        }
        for first in range(0, len(names), size)
    ]
    DataContext.get_current().enable_progress_bars = False
    make = partial(_make_part, images=job.images, size=job.image_size, seed=seed)
    made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(make)
    parts, left_out, done = [], [], 0
    for row in made.iter_rows():
        bad = json.loads(row["left_out"])
        parts.append(Part(uri=row["part"], images=row["images"]))
        left_out += bad
        done += row["images"] + len(bad)
        progress.update(done, len(names), "images")
    if len(left_out) > _MAX_BAD_SHARE * len(names):
        raise UserError(
            f"{len(left_out)} of {len(names)} images can't be used, such as {left_out[0]['name']} "
            f"({left_out[0]['reason']}): mend or remove them",
            code="images-bad",
        )
    parts.sort(key=lambda part: part.uri)
    return Prepared(listing=listing, parts=tuple(parts), left_out=tuple(left_out))


def _files(uri: str) -> list[str]:
    storage.check_readable(uri)
    files = [file for file in storage.list_files(uri) if file.lower().endswith(_SUFFIXES)]
    if not files:
        raise UserError(
            f"no image lies in {storage.shown(uri)} (looked for {' '.join(_SUFFIXES)}): check --images",
            code="images-missing",
        )
    return files


def _make_part(row: dict[str, Any], images: str, size: int, seed: int) -> dict[str, Any]:
    """A task: makes one part, unless it is there, and says what it holds."""
    if not storage.is_file(row["part"]):
        storage.write_bytes(row["part"], _draw_part(list(row["names"]), images, size, seed))
    metadata = parquet.opened(row["part"], remedy=_REMEDY).metadata
    return {
        "part": row["part"],
        "images": metadata.num_rows,
        "left_out": (metadata.metadata or {})[b"left_out"].decode(),
    }


def _draw_part(names: list[str], images: str, size: int, seed: int) -> bytes:
    good, left_out = [], []
    for name in names:
        try:
            pixels = shapes.object_image(seed, int(name), size) if images == SHAPES else small_square(name, size)
            good.append(pixels.tobytes())
        except BadInput as error:
            left_out.append({"name": name, "reason": str(error)})
    table = pa.table({"pixels": pa.array(good, pa.binary(3 * size**2))})
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"left_out": json.dumps(left_out)}), sink)
    return sink.getvalue()


def small_square(uri: str, size: int) -> UInt8[ndarray, "size size 3"]:
    """The square about an image's centre, brought to `size` pixels a side.

    Raises:
        BadInput: the image can't be read.
    """
    image = pictures.read_image(uri)
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    square = torch.from_numpy(image[top : top + side, left : left + side]).permute(2, 0, 1)[None].float()
    # With antialias: these images are shrunk a lot, and what is learned should not be of aliases.
    small = torch.nn.functional.interpolate(square, (size, size), mode="bilinear", antialias=True)
    pixels: UInt8[ndarray, "size size 3"] = small[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return pixels


def worker_parts(parts: tuple[Part, ...], seed: int, epoch: int, rank: int, world: int) -> list[Part]:
    """One worker's parts of an epoch, in its order: every `world`-th of a permutation of them all."""
    order = np.random.default_rng((seed, epoch)).permutation(len(parts))
    return [parts[i] for i in order[rank::world]]


def steps_of_epoch(parts: tuple[Part, ...], seed: int, epoch: int, world: int, batch: int) -> int:
    """Batches of `batch` images that every worker can fill from its own parts."""
    return min(
        sum(part.images for part in worker_parts(parts, seed, epoch, rank, world)) // batch for rank in range(world)
    )


def _stream(parts: list[Part], size: int, batch: int, seed: int) -> Iterator[UInt8[Tensor, "B 3 size size"]]:
    """Images in an order that depends on nothing but the arguments, `batch` at a time."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    rows = [{"uri": part.uri} for part in parts]
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).flat_map(_read_part)
    batches = data.iter_batches(
        batch_size=batch,
        batch_format="numpy",
        drop_last=True,
        local_shuffle_buffer_size=max(batch, 8 * _PART_SIZE),
        local_shuffle_seed=seed,
    )
    for columns in batches:
        pixels = np.frombuffer(b"".join(columns["pixels"]), np.uint8).reshape(-1, size, size, 3)
        yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def _read_part(row: dict[str, Any]) -> list[dict[str, Any]]:
    table = parquet.read(row["uri"], remedy=_REMEDY)
    return [{"pixels": pixels} for pixels in table["pixels"].to_pylist()]


# ---- training


def pretrain(job: PretrainingJob, compute: ComputeRecipe, progress: Progress) -> Prepared:
    """Pretrain an encoder and write its weights to `job.out`; run again, it goes on from what is done.

    Raises:
        UserError: see `prepare`; or a batch that does not divide among the workers, or another run that writes `out`.
    """
    world = capacity.training_workers(compute)
    local = _worker_batch(job.recipe, world)
    with hold(job.work, progress.note, "--out") as lock:
        prepared = prepare(job, progress)
        if steps_of_epoch(prepared.parts, job.recipe.seed, 0, world, local) == 0:
            raise UserError(
                f"{prepared.images} images are too few for {world} workers and a batch of {job.recipe.batch_size}: "
                "give more, or lower --batch_size",
                code="images-few",
            )
        checkpoint = _fit(job, prepared, compute, progress)
        with checkpoint.as_directory() as folder:
            tensors = safetensors.torch.load_file(Path(folder) / "encoder.safetensors")
        lock.check()
        storage.write_bytes(job.out, safetensors.torch.save(tensors, _metadata(job, prepared)))
    return prepared


def _worker_batch(recipe: PretrainingRecipe, world: int) -> int:
    tiles = math.lcm(recipe.global_mosaic, recipe.local_mosaic) ** 2
    local, rest = divmod(recipe.batch_size, world)
    if rest or local % tiles:
        raise UserError(
            f"a batch of {recipe.batch_size} images does not give {world} workers whole mosaics of {tiles} tiles: "
            f"use a multiple of {world * tiles}",
            code="batch-size",
        )
    return local


def _metadata(job: PretrainingJob, prepared: Prepared) -> dict[str, str]:
    recipe = job.recipe
    side = recipe.global_size // recipe.patch_size
    return {
        "patch_size": str(recipe.patch_size),
        "num_heads": str(recipe.heads),
        "position_grid": f"{side} x {side}",
        "images": f"{prepared.images} from {storage.shown(job.images)}",
        "recipe": json.dumps(asdict(recipe)),
        "command": job.command,
    }


def _fit(job: PretrainingJob, prepared: Prepared, compute: ComputeRecipe, progress: Progress) -> Checkpoint:
    fs, root = storage.travelling(storage.join(job.work, "ray"))
    board = put_up()
    resources, workers = capacity.actor_resources(compute), capacity.training_workers(compute)
    trainer = TorchTrainer(
        # Bound, not a config: Ray Train's controller would unpickle that, and import all that training needs.
        partial(_work, job, prepared.parts, board),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=resources["num_gpus"] > 0,
            resources_per_worker={"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]},
        ),
        torch_config=process_group(resources["num_gpus"], workers),  # type: ignore[arg-type]  # any backend's will do
        run_config=RunConfig(
            # Another recipe or other images must not go on from these weights.
            name=f"pretraining-{job.digest()}-{prepared.listing}",
            storage_path=root,
            storage_filesystem=fs,
            failure_config=FailureConfig(max_failures=_ATTEMPTS),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    with watched(board, progress):
        checkpoint: Checkpoint | None = trainer.fit().checkpoint
    ray.kill(board)
    assert checkpoint is not None
    return checkpoint


@dataclass(kw_only=True)
class _State:
    """What a checkpoint holds, as safetensors and JSON."""

    student: Student
    teacher: Teacher
    optimizer: torch.optim.AdamW
    step: int = 0
    epoch: int = 0

    def save(self, folder: Path) -> None:
        moments = {
            f"{name}:{moment}": value
            for name, parameter in self.student.named_parameters()
            for moment, value in self.optimizer.state.get(parameter, {}).items()
        }
        files = {
            "student": self.student.state_dict(),
            "teacher": self.teacher.average.state_dict(),
            "moments": moments,
            "encoder": encoder_state(self.teacher),
        }
        for name, tensors in files.items():
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
        (folder / "counters.json").write_text(json.dumps({"step": self.step, "epoch": self.epoch}))

    def load(self, folder: Path, device: torch.device) -> None:
        def tensors(name: str) -> dict[str, Tensor]:
            return safetensors.torch.load_file(folder / f"{name}.safetensors", device=str(device))

        self.student.load_state_dict(tensors("student"))
        self.teacher.average.load_state_dict(tensors("teacher"))
        parameters = dict(self.student.named_parameters())
        for key, value in tensors("moments").items():
            name, _, moment = key.rpartition(":")
            # AdamW keeps its counter of steps on the CPU.
            self.optimizer.state[parameters[name]][moment] = value.cpu() if moment == "step" else value
        counters = json.loads((folder / "counters.json").read_text())
        self.step, self.epoch = counters["step"], counters["epoch"]


def _work(job: PretrainingJob, parts: tuple[Part, ...], board: Any) -> None:
    """One worker: run, epoch, step."""
    recipe, context = job.recipe, ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        use_cores(context.get_local_world_size())
    torch.manual_seed(recipe.seed)  # initial weights, the same on every worker
    student = Student(recipe).to(device)
    state = _State(student=student, teacher=Teacher(student).to(device), optimizer=new_optimizer(student))
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state.load(Path(folder), device)
    parallel = DistributedDataParallel(student) if world > 1 else student
    local = _worker_batch(recipe, world)
    while state.step < recipe.steps:
        # Crops, colours and mosaics follow from these numbers, so an epoch that is begun again is the same.
        generator = torch.Generator().manual_seed(_seed(recipe.seed, state.epoch, rank))
        mine = worker_parts(parts, recipe.seed, state.epoch, rank, world)
        steps = min(steps_of_epoch(parts, recipe.seed, state.epoch, world, local), recipe.steps - state.step)
        stream = _stream(mine, job.image_size, local, _seed(recipe.seed, state.epoch, rank))
        losses = []
        for _, images in zip(range(steps), stream, strict=False):
            losses.append(_step(state, parallel, images.to(device).float() / 255, recipe, generator))
            if rank == 0 and (state.step % _TELL_STEPS == 0 or state.step == recipe.steps):
                board.step.remote(state.step, recipe.steps)
        state.epoch += 1
        mean = {name: float(np.mean([loss[name] for loss in losses])) for name in losses[0]}
        if rank == 0:
            terms = ", ".join(f"{name} {value:.3f}" for name, value in mean.items())
            board.note.remote(f"step {state.step} of {recipe.steps}: {terms}")
        _report(state, mean, rank)


def _step(
    state: _State, parallel: Any, images: Tensor, recipe: PretrainingRecipe, generator: torch.Generator
) -> dict[str, float]:
    now = StepSchedule.at(state.step, recipe)
    apply_schedule(state.optimizer, now)
    views = Views.draw(images, recipe, generator)
    unit, cosines = parallel(views, generator)
    loss = pretraining_loss(unit, cosines, state.teacher(views), now.clustering_weight, recipe)
    state.optimizer.zero_grad()
    loss.total.backward()  # type: ignore[no-untyped-call]
    if not now.train_prototypes:
        state.student.head.prototypes.grad = None
    torch.nn.utils.clip_grad_norm_(state.student.parameters(), recipe.clip)
    state.optimizer.step()
    state.teacher.follow(state.student, now.teacher_momentum)
    state.step += 1
    return {"contrast": loss.contrast.item(), "clustering": loss.clustering.item()}


def _report(state: _State, losses: dict[str, float], rank: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            state.save(Path(folder))
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report({**losses, "step": state.step}, checkpoint=checkpoint)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
