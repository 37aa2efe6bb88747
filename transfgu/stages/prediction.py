"""Predict the masks of a folder of images, in parts; images whose mask is up to date are skipped.

A stopped prediction resumes, and images that were added or replaced get their masks.

This process predicts up to 32 images itself, on a machine without GPUs and outside a cluster, because Ray would take
longer to start. For more images, tasks decode, a pool of actors holds the model and grows to its limit while images
wait, and tasks write. Masks are compressed in the actor, so little data is sent even for large photographs; the driver
gets one small row per part.
"""

import hashlib
import io
import json
import struct
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import pyarrow as pa
import ray
from jaxtyping import Int, UInt8
from PIL import Image
from ray.data import Dataset
from ray.exceptions import RayError

from transfgu import formats
from transfgu.datasets import images
from transfgu.datasets.class_lists import index_type
from transfgu.datasets.listing import Images, find_images
from transfgu.datasets.names import output_names
from transfgu.datasets.rasters import rows_of
from transfgu.errors import BadInput, LeftOut, UserError
from transfgu.recipe import MAX_PIXELS, ComputeRecipe, Size, check_pixels
from transfgu.runtime import capacity, connect, parts
from transfgu.runtime.progress import Progress
from transfgu.store import parquet, predicted, storage
from transfgu.store.artifacts import Run, read_json

if TYPE_CHECKING:
    from transfgu.segmenter import Segmenter

Format = Literal["png", "parquet"]

CLAIM = "prediction.json"
"""File with the model of the masks and the meaning of their indices."""
SUMMARY = "summary.json"
"""File with the result of the last complete prediction."""

_FILES_AS = "files"  # in the claim: format of the masks
_TILES = "tiles"  # in the claim: tiles of the images
_AVERAGED = "averaged"  # in the claim: averaging of logits
_ORIENT = "orient"  # in the claim: whether EXIF's orientation was applied
_WRITERS = 8  # files that one task writes at a time
_FEW = 32  # images that this process predicts itself, sooner than Ray would have started
_ANSWER_SECONDS = 2.0  # for which the progress of tiles is waited for
_LEAST = 67  # bytes of the smallest PNG
_SAMPLES = pa.schema(
    [(name, pa.string()) for name in ("name", "image", "mask")]
    + [(name, pa.int64()) for name in ("size", "changed")]
    + [("tag", pa.string())]
)
_SCHEMA = pa.schema([("name", pa.string()), ("height", pa.int32()), ("width", pa.int32()), ("mask", pa.large_binary())])


@dataclass(frozen=True, kw_only=True)
class PredictionJob:
    """Settings of a prediction.

    Args:
        run: URI of a trained run's folder.
        images: URI of a folder of images; subfolders are included.
        out: URI of the output folder: `masks/`, `overlays/`, and two JSON files that describe them.
        format: `png`: one indexed PNG with a palette per image, with its name; `parquet`: rows `name`, `height`,
            `width`, `mask` (class indices row by row, uint8 for up to 256 classes, otherwise uint16).
        overlays: also write each image as a JPEG with its classes' colours; requires PNGs.
        orient: apply the orientation in EXIF data, so that a mask matches the image in a viewer; False: use stored
            pixels; None: like existing masks in `out`, or True if there are none.
        max_pixels: maximum size of an image, pixels; a larger one is left out, or with tiles read by rows; None: the
            run's `dataset.max_pixels`.
        tile: height of tiles, pixels (`Segmenter.predict`); 0: images are not divided.
        overlap: minimum number of pixels that neighbouring tiles share.
    """

    run: str
    images: str
    out: str
    format: Format = "png"
    overlays: bool = False
    orient: bool | None = None
    max_pixels: int | None = None
    tile: int = 0
    overlap: int = 64

    @property
    def tiles(self) -> dict[str, int] | None:
        """The tiles as recorded in the claim; None without tiles."""
        return {"tile": self.tile, "overlap": self.overlap} if self.tile else None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Result of a prediction."""

    images: int
    """Images in the folder."""
    found: int
    """Number of images with existing masks."""
    made: int
    """Number of masks made now."""
    left_out: tuple[LeftOut, ...]
    passed: str = field(default="", repr=False)
    """Other files in the folder that are not read, as text, such as `3 .mp4`."""
    orphans: int = field(default=0, repr=False)
    """Masks in `out` without an image in the folder; they are kept."""


def predict(job: PredictionJob, compute: ComputeRecipe, progress: Progress, *, verbose: bool = False) -> Prediction:
    """Write the masks that `job.out` lacks. An image that can't be used is left out and named in the result.

    Args:
        job: the run, the images, and the folder to fill.
        compute: actors, CPUs and GPUs to use.
        progress: reports how many images are done.
        verbose: let Ray's messages through.

    Returns:
        How many masks were there, how many were made now, and which images were left out. `summary.json` in `job.out`
        holds the same.

    Raises:
        UserError: before Ray starts: no model, no images, a folder that can't be written or holds another model's
            masks, images and masks in one place.

    Examples:
        Masks of two scenes, by the run of `make demo`; the second call finds both:

        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from transfgu.datasets.shapes import scene
        >>> from transfgu.runtime.progress import Progress
        >>> from transfgu.recipe import ComputeRecipe
        >>> from transfgu.stages.prediction import PredictionJob, predict
        >>> home = Path.home()
        >>> (home / "scenes").mkdir()
        >>> for index in range(2):
        ...     image, label = scene(seed=7, split="val", index=index)
        ...     Image.fromarray(image).save(home / "scenes" / f"{index}.png")
        >>> run = home / "transfgu" / "shapes"
        >>> job = PredictionJob(run=str(run), images=str(home / "scenes"), out=str(home / "masks"))
        >>> predict(job, ComputeRecipe(), Progress("prediction", quiet=True))
        Prediction(images=2, found=0, made=2, left_out=())
        >>> predict(job, ComputeRecipe(), Progress("prediction", quiet=True)).found
        2
        >>> sorted(path.name for path in (home / "masks" / "masks").iterdir())
        ['0.png', '1.png']
    """
    images = preflight(job)
    most = job.max_pixels or Run(job.run).recipe().dataset.max_pixels
    job = replace(job, orient=resolved_orient(job), max_pixels=most)
    samples = named_samples(images)
    there, bad = earlier_masks(job, samples), known_bad(job)
    size = model_size(job)
    todo = parts_to_make(samples, 1 if job.tile else parts.part_size(size), there.done, bad, whole=job.format == "png")
    asked = {name for table in todo for name in table["name"].to_pylist()}
    found = len(samples) - len(asked)
    few = len(asked) <= (1 if job.tile else _FEW)
    connect.connect(verbose=verbose, single_process=few)
    for uri, flag in ((job.out, "--out"), (job.images, "--images")):
        capacity.check_shared(uri, flag)
    capacity.check_satisfiable(replace(compute, workers=0))  # nothing is trained
    for uri in there.stale:
        storage.delete(uri)
    if found:
        progress.update(found, len(samples), "images")
    made, left_out = 0, list[LeftOut]()
    rows: Iterator[dict[str, Any]] = iter(())
    tiles: Any = None
    if todo:
        here = few and connect.works_here()
        if job.tile:
            tiles = TileCounts() if here else ray.remote(TileCounts).options(num_cpus=0, max_restarts=-1).remote()
        rows = (
            _made_here(job, todo, size, compute, tiles) if here else _rows(plan(job, todo, size, compute, tiles=tiles))
        )

    def handled() -> int:
        return found + made + len(left_out)

    def report() -> None:
        done, total = _tiles_counted(tiles)
        if len(asked) == 1 and total:
            progress.update(done, total, "tiles")
        else:
            more = f", {done}/{total} tiles of the images begun" if total else ""
            progress.update(handled(), len(samples), "images", more)

    with progress.repeated(report):
        for row in rows:
            made += row["made"]
            left_out += [LeftOut(**x) for x in json.loads(row["left_out"])]
            if handled() < len(samples):
                progress.update(handled(), len(samples), "images")
    if todo:  # after the thread's last line, which counts tiles
        progress.update(handled(), len(samples), "images")
    _record(job, samples, {x.name for x in left_out})
    result = Prediction(
        images=len(samples),
        found=found,
        made=made,
        left_out=tuple(sorted(left_out, key=lambda x: x.name)),
        passed=images.passed_text,
        orphans=there.orphans,
    )
    summary = {
        **{"images": result.images, "found": found, "made": made, "orphans": result.orphans},
        "files not read": dict(images.passed),
        "left_out": [vars(x) for x in result.left_out],
    }
    storage.write_bytes(storage.join(job.out, SUMMARY), json.dumps(formats.stamp(summary), indent=1).encode())
    return result


def preflight(job: PredictionJob) -> Images:
    """Find mistakes before Ray starts, and claim the folder of masks for this model.

    Returns:
        The images.

    Raises:
        UserError: the first mistake.
    """
    from transfgu.inference.tiles import Tiling
    from transfgu.segmenter import Segmenter

    if storage.within(job.out, job.images) or storage.within(job.images, job.out):
        raise UserError(
            f"--images {storage.shown(job.images)} and --out {storage.shown(job.out)} contain each other: masks would "
            "be read as images, so choose separate folders",
            code="folders-nested",
        )
    if job.max_pixels is not None:
        check_pixels("--max_pixels", job.max_pixels)
    storage.check_readable(job.images)
    if storage.is_file(job.images):
        raise UserError(f"{storage.shown(job.images)} is a file: give --images its folder", code="folder-expected")
    segmenter = Segmenter.load(job.run, device="cpu")
    if job.tile:
        Tiling(tile=job.tile, overlap=job.overlap)  # raises if tiles cover nothing
    if job.format == "png" and len(segmenter.classes) > 256:
        raise UserError(
            f"an indexed PNG holds 256 classes, but this run has {len(segmenter.classes)}: set --format parquet",
            code="png-classes",
        )
    found = find_images(job.images, recursive=True, tags=True)
    if not found.files:
        but = f", but {found.passed_text}" if found.passed else ""
        raise UserError(
            f"{storage.shown(job.images)} has no images (.jpg, .png, .webp, ...){but}: check --images",
            code="images-missing",
        )
    if any(storage.within(folder, job.out) for folder in {uri.rpartition("/")[0] for uri in found.files.values()}):
        raise UserError(
            f"a link in --images {storage.shown(job.images)} leads to --out {storage.shown(job.out)}: masks would be "
            "read as images, so remove the link",
            code="folders-nested",
        )
    storage.check_writable(job.out)
    claim = {
        "model": hashlib.sha256(storage.read_bytes(Run(job.run).model())).hexdigest(),
        "run": storage.shown(storage.absolute(job.run)),
        _FILES_AS: job.format,
        _AVERAGED: {
            "scales": list(segmenter.recipe.evaluation.scales),
            "flip": segmenter.recipe.evaluation.flip,
        },
        _ORIENT: resolved_orient(job),
        _TILES: job.tiles,
        "classes": [
            {"index": i, "name": name, "colour": list(colour)}
            for i, (name, colour) in enumerate(zip(segmenter.classes, segmenter.colours, strict=True))
        ],
    }
    take_folder(job, claim)
    return found


def resolved_orient(job: PredictionJob) -> bool:
    """Return True if EXIF's orientation is applied: as requested, else as in the folder so far, else True."""
    text = storage.read_bytes_or_none(storage.join(job.out, CLAIM)) if job.orient is None else None
    return job.orient is not False if text is None else bool(_parsed_claim(job.out, text)[_ORIENT])


def take_folder(job: PredictionJob, claim: Mapping[str, Any]) -> None:
    """Write the properties of the masks into the output folder; raise UserError if it has masks of another job."""
    uri = storage.join(job.out, CLAIM)
    text = storage.read_bytes_or_none(uri)
    if text is None:
        if storage.create(uri, json.dumps(formats.stamp(claim), indent=1).encode()):
            return
        text = storage.read_bytes(uri)  # of a prediction that started at the same time
    held = _parsed_claim(job.out, text)
    differing = [n for n in ("model", _FILES_AS, _AVERAGED, _TILES, _ORIENT, "classes") if held[n] != claim[n]]
    if differing:
        other = {
            _FILES_AS: "format",
            _AVERAGED: "evaluation.scales or evaluation.flip",
            _ORIENT: f"--orient ({str(held[_ORIENT]).lower()})",
            _TILES: "--tile or --overlap",
        }.get(differing[0], differing[0])
        if differing == ["classes"]:
            raise UserError(
                f"{storage.shown(job.out)} holds masks from before the run's classes were named: run transfgu name "
                f"{storage.shown(job.run)} --masks {storage.shown(job.out)}, or choose another --out",
                code="masks-named-otherwise",
            )
        theirs = f"masks of {held['run']}" if "model" in differing else f"masks of another {other}"
        raise UserError(
            f"{storage.shown(job.out)} holds {theirs}: choose another --out, or delete its content", code="out-taken"
        )


def read_claim(out: str) -> dict[str, Any]:
    """Read the properties of a folder of masks, of this version or an earlier one: `model`, `run`, `classes`, ...

    Args:
        out: URI of the folder.

    Raises:
        UserError: it has no masks of :func:`predict`, or the file is damaged or has a newer format.
    """
    text = storage.read_bytes_or_none(storage.join(out, CLAIM))
    if text is None:
        raise UserError(
            f"{storage.shown(out)} has no {CLAIM}: give --masks the --out of transfgu predict", code="masks-missing"
        )
    return _parsed_claim(out, text)


def mask_names(images: str) -> dict[str, str]:
    """Return the name of the mask of each image in a folder, without an extension, by the image's relative path."""
    table = named_samples(find_images(images, recursive=True))
    return dict(zip(table["name"].to_pylist(), table["mask"].to_pylist(), strict=True))


def _parsed_claim(out: str, text: bytes) -> dict[str, Any]:
    """Return the properties of a folder of masks; raise UserError if they are damaged or have a newer format."""
    uri = storage.shown(storage.join(out, CLAIM))
    remedy = "delete it and the masks next to it, or change --out"
    with formats.damage(uri, remedy):
        first = json.loads(text)
        if first.get(formats.KEY) in get_args(Format):  # format 1 stored the format of masks there
            first[_FILES_AS] = first.pop(formats.KEY)
        text = json.dumps(first).encode()
    held = formats.read_json(text, uri, remedy)
    held.setdefault(_ORIENT, False)
    held.setdefault(_TILES, None)
    held.setdefault(_AVERAGED, {"scales": [1.0], "flip": False})  # the only setting of earlier masks
    with formats.damage(uri, remedy):
        _ = held["model"], held["run"], held[_FILES_AS], [x["colour"] for x in held["classes"]]
    return held


def named_samples(found: Images) -> pa.Table:
    """Return rows of `_SAMPLES`; `mask` is the name of the image's mask without an extension."""
    names = sorted(found.files)
    versions = [found.versions.get(name) for name in names]
    columns = {
        "name": names,
        "image": [found.files[name] for name in names],
        "mask": output_names(names),
        "size": [version and version.size for version in versions],
        "changed": [version and version.changed for version in versions],
        "tag": [version and version.tag for version in versions],
    }
    return pa.table(columns, schema=_SAMPLES)


def model_size(job: PredictionJob) -> Size:
    """Return the (height, width) of the images that the run's model takes, in pixels."""
    return Run(job.run).recipe().dataset.image_size


@dataclass(frozen=True, kw_only=True)
class EarlierMasks:
    """Results of an earlier prediction in the output folder."""

    done: set[str]
    """Names of the images with existing masks (and overlays, if requested)."""
    stale: list[str]
    """Files to remove before work: tables with masks of another version of an image."""
    orphans: int
    """Number of masks without an image."""


def earlier_masks(job: PredictionJob, samples: pa.Table) -> EarlierMasks:
    """Return what an earlier prediction left, by the versions of the images that its masks were made of.

    Args:
        job: says the output folder and the kind of files.
        samples: rows of the images that are there now, as `named_samples` returns them.
    """
    records, recorded = predicted.read(job.out)
    masks = storage.join(job.out, "masks")
    files = storage.list_versions(masks)
    current = {row["name"]: row for row in samples.to_pylist()}

    def fresh(name: str, written: storage.Version | None) -> bool:
        """Return True if a file written at this time belongs to the image's present version."""
        row, record = current[name], records.get(name)
        if written is None or row["size"] is None:
            return False
        if record is None:  # written by a version without records
            return written.changed >= row["changed"] or not written.changed
        moved = job.format == "png" and record.mask != row["mask"]
        return not moved and record.image.is_of(_version(row))

    if job.format == "parquet":
        with ThreadPoolExecutor(16) as pool:
            held = dict(zip(files, pool.map(names_in, files), strict=True))
        stale = [uri for uri, names in held.items() if any(n in current and not fresh(n, files[uri]) for n in names)]
        kept = [name for uri, names in held.items() if uri not in stale for name in names]
        gone = sum(name not in current for names in held.values() for name in names)
        return EarlierMasks(done=current.keys() & kept, stale=stale, orphans=gone)
    here = _relative(masks, files)
    done = {name for name, row in current.items() if fresh(name, here.get(f"{row['mask']}.png"))}
    if job.overlays:
        overlays = storage.join(job.out, "overlays")
        lit = _relative(overlays, storage.list_versions(overlays))
        done = {name for name in done if f"{current[name]['mask']}.jpg" in lit}
    # A mask whose name has changed is removed at the end.
    elsewhere = {record.mask for name, record in records.items() if name not in current}
    known = {row["mask"] for row in current.values()} | (recorded - elsewhere)
    return EarlierMasks(done=done, stale=[], orphans=sum(name.removesuffix(".png") not in known for name in here))


def _version(row: Mapping[str, Any]) -> storage.Version:
    return storage.Version(size=row["size"], changed=row["changed"], tag=row["tag"] or "")


def _relative(folder: str, files: Mapping[str, storage.Version]) -> dict[str, storage.Version]:
    """Return the files that can be pictures, by path below the folder."""
    below = len(storage.absolute(folder)) + 1
    return {uri[below:]: version for uri, version in files.items() if version.size >= _LEAST}


def _record(job: PredictionJob, samples: pa.Table, bad: Collection[str]) -> None:
    """Record the images of the masks; remove masks whose name has changed, or whose image became unusable."""
    records, gone = predicted.read(job.out)
    for row in samples.to_pylist():
        if row["name"] in bad:
            records.pop(row["name"], None)
            gone.add(row["mask"])
        else:
            records[row["name"]] = predicted.Made(mask=row["mask"], image=_version(row))
    if job.format == "png":
        for mask in gone - {made.mask for made in records.values()}:
            for kind, suffix in (("masks", ".png"), ("overlays", ".jpg")):
                storage.delete(storage.join(job.out, kind, mask + suffix))
    predicted.write(job.out, records)


def names_in(uri: str) -> list[str]:
    """Return the names of the images whose masks a Parquet file holds."""
    remedy = "delete it, and run again"
    with parquet.opened(uri, remedy=remedy) as file, parquet.damage(uri, remedy):
        names: list[str] = file.read(columns=["name"])["name"].to_pylist()
    return names


def known_bad(job: PredictionJob) -> dict[str, str]:
    """Return images that an earlier prediction could not use, with the reason."""
    uri, remedy = storage.join(job.out, SUMMARY), "delete it, and run again"
    summary = read_json(uri, remedy)
    if summary is None:
        return {}
    with formats.damage(storage.shown(uri), remedy):
        return {x["name"]: x["reason"] for x in summary["left_out"]}


def parts_to_make(
    samples: pa.Table, size: int, done: set[str], bad: Mapping[str, str], *, whole: bool
) -> list[pa.Table]:
    """Return the parts of images that are still to be predicted.

    Images of a part share batches, and another batch may round differently. So a part of PNGs that was interrupted is
    predicted again as a whole, and the result of an interrupted prediction is the same. Images that were bad the last
    time are tried again separately, because they may have been corrected.
    """
    todo = []
    for part in parts.split(samples, size):
        names = part["name"].to_pylist()
        missing = [i for i, name in enumerate(names) if name not in done]
        if not missing:
            continue
        mended_only = all(names[i] in bad for i in missing)
        todo.append(part if whole and not mended_only else part.take(missing))
    return todo


def plan(
    job: PredictionJob, tables: Sequence[pa.Table], size: Size, compute: ComputeRecipe, tiles: Any = None
) -> Dataset:
    """Return the plan from parts of the image list to masks in `job.out`, with a row of counts per part.

    With tiles, `tiles` is the handle of an actor of `TileCounts`.
    """
    pool = capacity.encoder_pool(compute)
    if job.tile:
        return parts.handled(tables, PredictTiles, _tiles_arguments(job, compute, tiles), pool)
    return _work(job, size, compute).plan(tables, pool)


def _made_here(
    job: PredictionJob, tables: Sequence[pa.Table], size: Size, compute: ComputeRecipe, tiles: "TileCounts | None"
) -> Iterator[dict[str, Any]]:
    """As :func:`plan`, in this process, one part after the other."""
    if job.tile:
        handle = PredictTiles(**_tiles_arguments(job, compute, tiles))
        for table in tables:
            yield from handle(table).to_pylist()
        return
    work = _work(job, size, compute)
    predict_masks = work.actor(**work.arguments)
    for table in tables:
        yield from work.write(predict_masks(work.read(table))).to_pylist()


def _tiles_arguments(job: PredictionJob, compute: ComputeRecipe, tiles: Any) -> dict[str, Any]:
    return {"job": job, "processes": capacity.actors_per_node(compute), "counts": tiles}


def _work(job: PredictionJob, size: Size, compute: ComputeRecipe) -> parts.Work:
    read = ReadPhotos(
        size=size,
        interpolation="bilinear",
        orient=job.orient is not False,
        max_pixels=job.max_pixels or MAX_PIXELS,
        keep_files=job.overlays,
    )
    arguments = {"run": job.run, "processes": capacity.actors_per_node(compute)}
    return parts.Work(read=read, actor=PredictMasks, arguments=arguments, write=WriteMasks(job=job))


def _rows(data: Dataset) -> Iterator[dict[str, Any]]:
    for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from cast(pa.Table, batch).to_pylist()


@dataclass(frozen=True, kw_only=True)
class ReadPhotos(parts.ReadImages):
    """A task that decodes and resizes a part of the image list.

    It returns rows name, mask, size and changed (of the image's file), image (3, H, W) uint8, height and width
    (pixels), file (its bytes, or null), reason (null, or why the image can't be used).
    """

    keep_files: bool

    def __call__(self, samples: pa.Table) -> pa.Table:
        """Raise UserError if the storage fails."""
        pixels = np.zeros((len(samples), 3, *self.size), np.uint8)

        def read(uri: str) -> tuple[dict[str, Any], UInt8[np.ndarray, "3 H W"]]:
            data = storage.read_bytes_or_none(uri)
            image = self.decode(data)
            row = {"height": image.shape[0], "width": image.shape[1], "file": data if self.keep_files else None}
            return {**row, "reason": None}, images.resize(image, self.size, self.interpolation)

        rows: list[dict[str, Any]] = []
        for place, (found, reason) in zip(pixels, images.read_rows(samples["image"].to_pylist(), read), strict=True):
            row: dict[str, Any] = {"height": 0, "width": 0, "file": None, "reason": reason}
            if found is not None:
                row, place[:] = found
            rows.append(row)
        kinds = {"height": pa.int32(), "width": pa.int32(), "file": pa.large_binary(), "reason": pa.string()}
        return pa.table(
            {
                **{name: samples[name] for name in ("name", "mask", "size", "changed", "tag")},
                "image": pa.FixedShapeTensorArray.from_numpy_ndarray(pixels),
                **{name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()},
            }
        )


def _own_segmenter(run: str, processes: int) -> "Segmenter":
    """Load a run on this actor's device; without a GPU, `processes` actors share the node's cores."""
    # Imported here, because the reading and writing tasks need no torch, which takes seconds.
    from transfgu.inference.device import own_device, use_cores
    from transfgu.segmenter import Segmenter

    device = own_device()
    if device.type == "cpu":
        use_cores(processes)
    return Segmenter.load(run, device=device.type)


class PredictMasks:
    """An actor that predicts class indices of images at their own size.

    It returns blocks of `ReadPhotos` without images and with `indices`: class indices row by row, zlib-compressed,
    uint8 or uint16; empty without an image.
    """

    def __init__(self, run: str, processes: int) -> None:
        self._segmenter = _own_segmenter(run, processes)

    def __call__(self, block: pa.Table) -> pa.Table:
        """See the class."""
        rows, pixels = parts.usable(block)
        sizes = list(zip(rows["height"].to_pylist(), rows["width"].to_pylist(), strict=True))
        kind = index_type(len(self._segmenter.classes))
        found = {
            name: zlib.compress(mask.astype(kind).tobytes(), 1)
            for name, mask in zip(rows["name"].to_pylist(), self._segmenter.predict_resized(pixels, sizes), strict=True)
        }
        indices = [found.get(name, b"") for name in block["name"].to_pylist()]
        return block.drop_columns("image").append_column("indices", pa.array(indices, pa.large_binary()))


class TileCounts:
    """Counts the tiles of images that were begun; an actor, if other processes predict."""

    def __init__(self) -> None:
        """Start without images."""
        self._counts: dict[str, tuple[int, int]] = {}

    def report(self, name: str, done: int, total: int) -> None:
        """Report that `done` of the `total` tiles of an image are done."""
        self._counts[name] = done, total

    def read(self) -> tuple[int, int]:
        """Return the number of tiles done, and that of all tiles of these images."""
        counts = list(self._counts.values())
        return sum(done for done, _ in counts), sum(total for _, total in counts)


def _tiles_counted(tiles: Any) -> tuple[int, int]:
    """Return `TileCounts.read` of an object or of an actor; zeros for None, and if the actor does not answer."""
    if tiles is None or isinstance(tiles, TileCounts):
        return tiles.read() if tiles else (0, 0)
    try:
        done, total = ray.get(tiles.read.remote(), timeout=_ANSWER_SECONDS)
    except RayError:  # it is starting, or was lost with its node
        return 0, 0
    return done, total


class PredictTiles:
    """An actor that predicts masks of images of any size in tiles, and writes them strip by strip.

    It turns a block of the image list into the row of `WriteMasks` for the driver. Tiles are reported to `counts`, a
    `TileCounts` or the handle of an actor of that class.
    """

    def __init__(self, job: PredictionJob, processes: int, counts: Any) -> None:
        self._job = job
        self._report = getattr(counts.report, "remote", counts.report)
        self._segmenter = _own_segmenter(job.run, processes)

    def __call__(self, block: pa.Table) -> pa.Table:
        """See the class. Raises UserError if the storage fails."""
        left_out = []
        rows = block.select(["name", "image", "mask"]).to_pylist()
        good = []
        for row in rows:
            try:
                self._write(row["name"], row["image"], row["mask"])
                good.append(True)
            except BadInput as error:
                left_out.append({"name": row["name"], "reason": str(error)})
                good.append(False)
        predicted.write_part(self._job.out, block.filter(pa.array(good, pa.bool_())))
        return pa.table({"made": [len(rows) - len(left_out)], "left_out": [json.dumps(left_out)]})

    def _write(self, name: str, uri: str, mask: str) -> None:
        from transfgu.inference.tiles import Tiling

        if not storage.exists(uri):
            raise BadInput("missing image")
        rows = rows_of(uri, orient=self._job.orient is not False, max_pixels=self._job.max_pixels or MAX_PIXELS)
        size, kind = (rows.height, rows.width), index_type(len(self._segmenter.classes))
        tiling = Tiling(tile=self._job.tile, overlap=self._job.overlap)
        found = self._segmenter.strips(rows, tiling, report=lambda done, total: self._report(name, done, total))
        strips = (strip.astype(kind, copy=False) for strip in found)
        if self._job.format == "png":
            data = png_of_strips(strips, size, np.array(self._segmenter.colours, np.uint8))
            storage.write_bytes(storage.join(self._job.out, "masks", f"{mask}.png"), data)
        else:
            _write_rows(self._job, [name], [(name, *size, b"".join(strip.tobytes() for strip in strips))])


@dataclass(frozen=True, kw_only=True)
class WriteMasks:
    """A task that writes a part's masks, and overlays, to files."""

    job: PredictionJob

    def __call__(self, block: pa.Table) -> pa.Table:
        """Write a block of `PredictMasks`; returns the part's row for the driver: `made`, and `left_out` as JSON."""
        claim = read_claim(self.job.out)
        colours = np.array([c["colour"] for c in claim["classes"]], np.uint8)
        rows = block.filter(block["reason"].is_null())
        kind = index_type(len(colours))
        # Only one image's mask, overlay and files are in memory at a time, and those that are being sent.
        masks = (
            (row, np.frombuffer(zlib.decompress(row["indices"]), kind).reshape(row["height"], row["width"]))
            for row in _one_by_one(rows)
        )
        if self.job.format == "png":
            with ThreadPoolExecutor(_WRITERS) as pool:
                sent: deque[Future[None]] = deque()
                for row, mask in masks:
                    sent.append(pool.submit(self._send, row["mask"], *self._files(row["file"], mask, colours)))
                    if len(sent) >= _WRITERS:
                        sent.popleft().result()
                for future in sent:
                    future.result()
        elif len(rows):
            named = ((row["name"], row["height"], row["width"], mask.tobytes()) for row, mask in masks)
            _write_rows(self.job, block["name"].to_pylist(), named)
        predicted.write_part(self.job.out, rows)
        left_out = [vars(x) for x in parts.left_out(block)]
        return pa.table({"made": [len(rows)], "left_out": [json.dumps(left_out)]})

    def _files(
        self, file: bytes | None, mask: UInt8[np.ndarray, "H W"], colours: UInt8[np.ndarray, "C 3"]
    ) -> tuple[bytes, bytes | None]:
        """Return an image's mask as a PNG, and its overlay where its file was kept for one."""
        shown = None if file is None else overlay(file, mask, colours, orient=self.job.orient is not False)
        return png(mask, colours), shown

    def _send(self, name: str, mask: bytes, shown: bytes | None) -> None:
        if shown is not None:  # the overlay first: a mask is what says that an image is done
            storage.write_bytes(storage.join(self.job.out, "overlays", f"{name}.jpg"), shown)
        storage.write_bytes(storage.join(self.job.out, "masks", f"{name}.png"), mask)


def _one_by_one(rows: pa.Table) -> Iterator[dict[str, Any]]:
    for index in range(len(rows)):
        yield rows.slice(index, 1).to_pylist()[0]


def _write_rows(job: PredictionJob, part: Sequence[str], masks: Iterable[tuple[str, int, int, bytes]]) -> None:
    """Write masks as a Parquet file.

    Args:
        job: whose masks they are.
        part: names of all images of the part, those that can't be used, too.
        masks: name of the image, height, width, and class indices row by row.
    """
    # Each set of images has its own file name, so a repeated task replaces its own file.
    digest = hashlib.sha256("\n".join(part).encode()).hexdigest()[:16]
    storage.write_bytes(storage.join(job.out, "masks", f"part-{digest}.parquet"), masks_file(masks))


def png_of_strips(
    strips: Iterable[UInt8[np.ndarray, "rows W"]], size: Size, colours: UInt8[np.ndarray, "C 3"]
) -> bytes:
    """Yield the same as :func:`png` for a mask of `size` that is never in memory as a whole, from strips of rows."""
    packed, out = zlib.compressobj(6), io.BytesIO()

    def chunk(kind: bytes, data: bytes) -> None:
        out.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))

    out.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], 8, 3, 0, 0, 0))  # 8 bits, indices of a palette
    chunk(b"PLTE", colours.tobytes())
    for strip in strips:
        rows = np.concatenate((np.zeros((len(strip), 1), np.uint8), strip), axis=1)  # 0: the row is not filtered
        if data := packed.compress(rows.tobytes()):
            chunk(b"IDAT", data)
    chunk(b"IDAT", packed.flush())
    chunk(b"IEND", b"")
    return out.getvalue()


def png(mask: UInt8[np.ndarray, "H W"], colours: UInt8[np.ndarray, "C 3"]) -> bytes:
    """Return class indices as an indexed PNG with the classes' colours."""
    picture = Image.fromarray(mask)
    picture.putpalette(colours.tobytes(), "RGB")
    return images.encoded(picture, "PNG")


def overlay(
    file: bytes,
    mask: Int[np.ndarray, "H W"] | UInt8[np.ndarray, "H W"],
    colours: UInt8[np.ndarray, "C 3"],
    *,
    orient: bool = False,
) -> bytes:
    """Return an image, from its file's bytes, blended with its classes' colours, with dark outlines, as a JPEG."""
    image = images.decode_image(file, orient=orient)
    lit = ((image.astype(np.uint16) + colours[mask]) // 2).astype(np.uint8)
    lit[:, 1:][mask[:, 1:] != mask[:, :-1]] = 20
    lit[1:][mask[1:] != mask[:-1]] = 20
    return images.encoded(Image.fromarray(lit), "JPEG", quality=88)


def masks_file(masks: Iterable[tuple[str, int, int, bytes]]) -> bytes:
    """Return the bytes of a Parquet file of masks, each of which is written, and can be read, without the others."""
    tables = (pa.table([[value] for value in row], schema=_SCHEMA) for row in masks)
    return parquet.encoded_groups(tables, _SCHEMA, compression="zstd", use_dictionary=False)
