"""Pretrain an encoder on Ray: tasks create small square images once, and workers train on these.

Decoding photographs in every epoch would take longer than training a small ViT. So images are first reduced to one
small size and stored in parts next to the result; an existing part is complete. `transfgu.training.fit` runs the
training, as it runs the training of a decoder.
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import safetensors.torch
import torch
from jaxtyping import UInt8
from numpy import ndarray

from transfgu.datasets import images as pictures
from transfgu.datasets import shapes
from transfgu.datasets.listing import find_images
from transfgu.errors import BadShare, LeftOut, UserError
from transfgu.pretraining.recipe import PretrainingRecipe, compared_fields
from transfgu.pretraining.training import REMEDY, Part, Pretraining, PretrainingInputs, worker_batch
from transfgu.recipe import MAX_PIXELS, ComputeRecipe
from transfgu.runtime import capacity, parts, ray_internals
from transfgu.runtime.failures import raises_user_errors
from transfgu.runtime.progress import Progress
from transfgu.store import parquet, storage
from transfgu.store.lock import hold
from transfgu.training import fit as trainer
from transfgu.training import tracking

SHAPES = "shapes"
"""Value in place of a folder's URI: drawn pictures of single objects, as for the embedded demonstration."""

_PARTS, _PART_SIZE = 64, 256  # minimum number of parts (workers share them), and maximum number of images per part
Draw = Callable[[str], list[UInt8[ndarray, "size size 3"]]]
_BAD_SHARE = BadShare(limit=0.1, flag="")


@dataclass(frozen=True, kw_only=True)
class PretrainingJob:
    """Images of a pretraining, and the place of its results."""

    images: str
    """URI of a folder, searched with its subfolders, or `SHAPES`."""
    out: str
    """URI of the weights: a `.safetensors` file. Work in progress is stored in `OUT.work`."""
    recipe: PretrainingRecipe
    count: int = 12_000
    """Number of drawn pictures, if `images` is `SHAPES`."""
    image_size: int = shapes.OBJECT_SIZE
    """Side of the small square images; px."""
    squares: int = 1
    """Number of squares per image of a folder; see `cut_squares`."""
    command: str = ""
    """The command line, stored with the weights."""

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
        if self.squares < 1:
            raise UserError(f"--squares must be positive, not {self.squares}", code="field-range")
        if self.count < self.recipe.batch_size:
            raise UserError(
                f"--count {self.count} does not fill a batch of {self.recipe.batch_size}: raise it, "
                "or lower --batch_size",
                code="images-few",
            )

    @property
    def work(self) -> str:
        """URI of the folder of work in progress; it may be deleted afterwards."""
        return storage.absolute(self.out) + ".work"

    def digest(self) -> str:
        """Return a digest of everything that the weights depend on."""
        # The number of squares is part of the listing's digest.
        fields = {**compared_fields(self.recipe), "images": self.images, "count": self.count, "size": self.image_size}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The small images of a job."""

    listing: str
    """Digest of the requested images and their size."""
    parts: tuple[Part, ...]
    left_out: tuple[dict[str, str], ...]
    """Name and reason of each unusable image."""

    @property
    def images(self) -> int:
        """Number of images: of squares, if they are cut from a folder's images."""
        return sum(part.images for part in self.parts)


# ---- images


def prepare(job: PretrainingJob, progress: Progress) -> Prepared:
    """Resize all images to one small size, in parts; existing parts are kept.

    Raises:
        UserError: no image, too few for a batch, or more than a tenth of them unusable.
    """
    names = [str(i) for i in range(job.count)] if job.images == SHAPES else files(job.images, progress.note)
    each = 1 if job.images == SHAPES else job.squares
    if len(names) * each < job.recipe.batch_size:
        raise _too_few(job, len(names) * each)
    size = max(1, min(_PART_SIZE, len(names) // _PARTS))
    seed = job.recipe.seed if job.images == SHAPES else 0
    orient = job.recipe.orient and job.images != SHAPES
    most = job.recipe.max_pixels
    asked: list[Any] = [job.image_size, seed, names, *([True] if orient else []), *([each] if each > 1 else [])]
    if most != MAX_PIXELS:
        asked.append({"max_pixels": most})
    listing = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    folder = storage.join(job.work, f"images-{listing}")
    rows = [
        {
            "part": storage.join(folder, f"part-{first:08d}.parquet"),
            "names": names[first : first + size],
        }
        for first in range(0, len(names), size)
    ]
    cut = partial(cut_squares, size=job.image_size, count=each, orient=orient, max_pixels=most)
    draw = partial(_draw_shape, size=job.image_size, seed=seed) if job.images == SHAPES else cut
    make = partial(make_part, draw=draw, size=job.image_size)
    memory = parts.read_memory(4 if job.images == SHAPES else most)
    with ray_internals.data_context():
        made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(make, memory=memory)
    made_parts, left_out, done = [], [], 0
    with raises_user_errors():
        for row in made.iter_rows():
            bad = json.loads(row["left_out"])
            made_parts.append(Part(uri=row["part"], images=row["images"]))
            left_out += bad
            done += row["images"] // each + len(bad)
            progress.update(done, len(names), "images")
    _BAD_SHARE.check([LeftOut(**x) for x in left_out], len(names), "images")
    made_parts.sort(key=lambda part: part.uri)
    return Prepared(listing=listing, parts=tuple(made_parts), left_out=tuple(left_out))


def files(uri: str, note: Callable[[str], None] = lambda _: None) -> list[str]:
    """Return the URIs of the images in a folder, listed as in every job.

    Args:
        uri: URI of the folder.
        note: called with a line about files that are not read, if there are any.

    Raises:
        UserError: the folder can't be read, or has no image.
    """
    storage.check_readable(uri)
    found = find_images(uri, recursive=True)
    if found.passed:
        note(f"not read: {found.passed_text}")
    if not found.files:
        raise UserError(
            f"{storage.shown(uri)} has no images (.jpg, .png, .webp, ...): check --images", code="images-missing"
        )
    return list(found.files.values())


def make_part(row: dict[str, Any], draw: Draw, size: int) -> dict[str, Any]:
    """Create one part, unless it exists, and return the description of its content; runs as a task.

    Args:
        row: URI of the part, and the names of its images.
        draw: returns one or more squares for a name, or raises BadInput.
        size: side of a square, pixels.
    """
    if not storage.is_file(row["part"]):
        storage.write_bytes(row["part"], _draw_part(list(row["names"]), draw, size))
    metadata = parquet.opened(row["part"], remedy=REMEDY).metadata
    return {
        "part": row["part"],
        "images": metadata.num_rows,
        "left_out": (metadata.metadata or {})[b"left_out"].decode(),
    }


def _draw_shape(name: str, size: int, seed: int) -> list[UInt8[ndarray, "size size 3"]]:
    return [shapes.object_image(seed, int(name), size)]


def _draw_part(names: list[str], draw: Draw, size: int) -> bytes:
    good, left_out = list[bytes](), []
    for name, (drawn, reason) in zip(names, pictures.read_rows(names, draw), strict=True):
        if drawn is None:
            left_out.append({"name": name, "reason": reason})
        else:
            good += [square.tobytes() for square in drawn]
    table = pa.table({"pixels": pa.array(good, pa.binary(3 * size**2))})
    # One row per row group: training reads rows in any order, and each costs one request.
    return parquet.encoded(table.replace_schema_metadata({"left_out": json.dumps(left_out)}), row_group_size=1)


def cut_squares(
    uri: str, size: int, count: int = 1, orient: bool = False, max_pixels: int = MAX_PIXELS
) -> list[UInt8[ndarray, "size size 3"]]:
    """Cut squares from an image and resize each to `size` pixels a side.

    The first is the largest one around the centre. The others have sides between half of that (at least `size`, if the
    image has as many pixels) and all of it, at random positions that follow from the file's name.

    Raises:
        BadInput: the image can't be read.
    """
    image = pictures.read_image(uri, orient=orient, max_pixels=max_pixels)
    height, width = image.shape[:2]
    most = min(height, width)
    random = np.random.default_rng(zlib.crc32(uri.rsplit("/", 1)[-1].encode(errors="surrogateescape")))
    places = [(most, (height - most) // 2, (width - most) // 2)]
    for _ in range(count - 1):
        side = int(random.integers(min(most, max(size, (most + 1) // 2)), most + 1))
        places.append((side, int(random.integers(height - side + 1)), int(random.integers(width - side + 1))))
    return [_small(image[top : top + side, left : left + side], size) for side, top, left in places]


def _small(square: UInt8[ndarray, "side side 3"], size: int) -> UInt8[ndarray, "size size 3"]:
    planes = torch.from_numpy(square).permute(2, 0, 1)[None].float()
    # Use antialias, because these images are reduced a lot and aliasing must not be learned.
    small = torch.nn.functional.interpolate(planes, (size, size), mode="bilinear", antialias=True)
    pixels: UInt8[ndarray, "size size 3"] = small[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return pixels


# ---- training


def pretrain(job: PretrainingJob, compute: ComputeRecipe, progress: Progress) -> Prepared:
    """Pretrain an encoder and write its weights to `job.out`; a repeated call continues.

    Raises:
        UserError: see `prepare`; a batch that does not divide among the workers; another run that writes `out`; a loss
            that is not a number.
    """
    workers = capacity.training_workers(compute)
    worker_batch(job.recipe, workers)
    with hold(job.work, progress.note, "--out") as lock:
        prepared = prepare(job, progress)
        if prepared.images < job.recipe.batch_size:
            raise _too_few(job, prepared.images)
        inputs = PretrainingInputs(
            recipe=job.recipe, parts=prepared.parts, side=job.image_size, resident_gib=compute.resident_gib
        )
        trackers = tracking.Trackers(
            tracking.Subject(
                track=compute.track,
                uri=job.work,
                title=f"pretraining, seed {job.recipe.seed}",
                fields={**asdict(job.recipe), "images": job.images},
            ),
            progress.note,
        )
        found = trainer.fit(
            partial(Pretraining, inputs),
            # Another recipe or other images must not continue from these weights.
            name=f"pretraining-{job.digest()}-{prepared.listing}",
            folder=storage.join(job.work, "ray"),
            compute=compute,
            workers=workers,
            progress=progress,
            on_epoch=lambda row: trackers.epoch(row, None),
        )
        trackers.close()
        tensors = safetensors.torch.load(storage.read_bytes(storage.join(found.uri, "encoder.safetensors")))
        lock.check()
        storage.write_bytes(job.out, safetensors.torch.save(tensors, _metadata(job, prepared)))
    return prepared


def _too_few(job: PretrainingJob, count: int) -> UserError:
    return UserError(
        f"{count} images are too few for a batch of {job.recipe.batch_size}: give more, raise --squares, or lower "
        "--batch_size",
        code="images-few",
    )


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
