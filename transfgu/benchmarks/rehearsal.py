"""Rehearse a full data set: the real number of files at small sizes, to measure the system without the arithmetic.

Thousands of names share a few hundred pictures, and the encoder is one small block. `transfgu train` runs all stages as
a separate command, is killed in the middle of the first stage, and starts again. Meanwhile the memory of all its
processes is measured, and the lines that it prints show when work started and ended.
"""

import datetime
import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from transfgu.benchmarks.arithmetic import Bare, device_name
from transfgu.benchmarks.processes import Command, Line, Memory
from transfgu.datasets.images import encoded
from transfgu.errors import UserError
from transfgu.inference.device import own_device
from transfgu.recipe import Recipe, Size
from transfgu.runtime import parts
from transfgu.store import storage
from transfgu.store.artifacts import Run

PICTURES = 256
"""Number of different training images, and of different labels; each has many names."""
EPOCHS = 2

_SIDE, _PATCH, _WIDTH, _HEADS = 32, 8, 48, 3
_PHOTO = (48, 64)  # height and width, pixels
_AT_ONCE = 1024  # uploads submitted at a time
_UPLOADS = 16
_SAMPLE, _STEPS, _TURNS = 128, 2, 3  # of the arithmetic timed alone: images, training steps, turns
_PROGRESS = re.compile(r"^(\w+): (\d+)/(\d+) \w+")
_DONE = re.compile(r"^(\w+): \d+ \w+ in [\d.]+ s")
_KILLED = "features"  # the stage in which the command is killed


@dataclass(kw_only=True)
class Stage:
    """Measurements of one stage."""

    seconds: float
    """Seconds of both attempts, without the start of Python and Ray."""
    images: int
    beyond_arithmetic: float | None
    """Seconds per image beyond the arithmetic alone; None if that was not timed."""
    requests: float | None
    """S3 requests per image, counted by the server; None if they were not counted."""
    files: int
    bytes: int


@dataclass(kw_only=True)
class Rehearsal:
    """The measurements."""

    preset: str
    concepts: int
    images: int
    validation: int
    root: str
    device: str
    date: str
    wall_seconds: float
    """Seconds of both attempts, including the start of Python and Ray."""
    resume_seconds: float
    """Seconds from the second command, after SIGKILL at half of the features, until it has written another part."""
    parts_at_kill: int
    stages: dict[str, Stage]
    epoch_start_seconds: list[float]
    """Seconds from the start of an epoch until its first batch, by epoch."""
    epoch_seconds: list[float]
    """Seconds of an epoch's steps."""
    score_share: list[float]
    """Duration of the validation scores as a share of steps and scores, by epoch."""
    training_overhead_seconds: float
    """Seconds of training without steps and scores: start of workers, checkpoints, the end."""
    memory: Memory = field(default_factory=Memory)

    def to_json(self) -> str:
        """Return JSON text."""
        return json.dumps(asdict(self), indent=1)

    def to_markdown(self) -> str:
        """Return a Markdown page with three tables."""
        stages = [
            "| stage | seconds | ms per image beyond arithmetic | S3 requests per image | files | MB |",
            "| --- | --- | --- | --- | --- | --- |",
            *(
                f"| {name} | {s.seconds:.1f} | {_number(s.beyond_arithmetic, 1000.0)} | {_number(s.requests)} | "
                f"{s.files} | {s.bytes / 1e6:.1f} |"
                for name, s in self.stages.items()
            ),
        ]
        memory = ["| process | peak, MiB | at most |", "| --- | --- | --- |"]
        for kind, size in sorted(self.memory.by_kind.items(), key=lambda item: -item[1]):
            memory.append(f"| {kind} | {size / 2**20:.0f} | {self.memory.processes[kind]} |")
        memory.append(f"| all processes | {self.memory.together / 2**20:.0f} | |")
        memory.append(f"| object store | {self.memory.object_store / 2**20:.0f} | |")
        times = ["| | |", "| --- | --- |"]
        for name, text in (
            ("both attempts, including start", f"{self.wall_seconds:.0f} s"),
            (f"resume after SIGKILL at {self.parts_at_kill} parts", f"{self.resume_seconds:.1f} s"),
            ("start of an epoch", _seconds(self.epoch_start_seconds)),
            ("steps of an epoch", _seconds(self.epoch_seconds)),
            ("scores, share of an epoch", ", ".join(f"{share:.1%}" for share in self.score_share)),
            ("training besides steps and scores", f"{self.training_overhead_seconds:.1f} s"),
        ):
            times.append(f"| {name} | {text} |")
        about = (
            f"{self.images} training and {self.validation} validation images, K = {self.concepts}, {self.root}, "
            f"{self.device}, {self.date}"
        )
        return "\n\n".join([f"# Rehearsal of {self.preset}", about, *("\n".join(t) for t in (stages, times, memory))])


def _number(value: float | None, factor: float = 1.0) -> str:
    return "" if value is None else f"{value * factor:.2f}"


def _seconds(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.1f} s" for value in values)


def rehearse(
    recipe: Recipe,
    images: int,
    validation: int,
    root: str = "",
    requests: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> Rehearsal:
    """Generate a data set of small images, and run all stages on it, with one kill and restart.

    Args:
        recipe: of the preset: its concepts, groups of windows and batch size; the rehearsal sets sizes and encoder.
        images: number of training images, at least 128.
        validation: number of labelled validation images.
        root: URI of the folder for data and run, which are kept; data of an earlier rehearsal are used again. Empty: a
            temporary folder.
        requests: shell command that prints the number of requests that the S3 server has answered; empty: requests are
            not counted.
        say: called with a line about each step.

    Raises:
        UserError: too few images, an existing run, a command that fails.
    """
    if images < 4 * parts.part_size((_SIDE, _SIDE)):
        raise UserError(
            f"{images} images are too few for a stop in the middle: give --images 128 or more", code="images-few"
        )
    with tempfile.TemporaryDirectory(prefix="rehearsal-", ignore_cleanup_errors=True) as folder:
        root = storage.absolute(root or folder)
        run = Run(storage.join(root, "run"))
        if storage.exists(run.file("recipe.yaml")):
            raise UserError(
                f"{storage.shown(run.uri)} holds a run: delete it, or give another --root", code="run-there"
            )
        recipe = small_recipe(recipe, root, Path(folder))
        say(f"{images} + {validation} images in {storage.shown(root)} ...")
        make_data(recipe, root, images, validation)
        arithmetic = _arithmetic(recipe)
        return _Rehearsing(recipe, run, Path(folder), requests, say).measured(images, validation, arithmetic)


def small_recipe(recipe: Recipe, root: str, folder: Path) -> Recipe:
    """Return the recipe with the rehearsal's sizes, on the data in `root`, and write its encoder there.

    Args:
        recipe: the recipe to change.
        root: URI of the folder of data and encoder.
        folder: a local folder for caches.
    """
    weights = storage.join(root, "encoder.safetensors")
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=_SIDE,
        patch_size=_PATCH,
        embed_dim=_WIDTH,
        depth=1,
        num_heads=_HEADS,
        num_classes=0,
        global_pool="token",
    )
    about = {"patch_size": str(_PATCH), "num_heads": str(_HEADS)}
    storage.write_bytes(weights, safetensors.torch.save(vit.state_dict(), metadata=about))
    return recipe.with_fields(
        {
            "data": storage.join(root, "data"),
            "labels": storage.join(root, "labels"),
            "dataset.layout": "folder",
            "dataset.classes": "auto",
            "dataset.curated": False,
            "encoder.name": "one-block",
            "encoder.weights": weights,
            **{f"dataset.{kind}_size": (_SIDE, _SIDE) for kind in ("image", "training")},
            "dataset.feature_size": (2 * _SIDE, 2 * _SIDE),
            "windows.size": (_SIDE, _SIDE),
            "windows.scales": (0.5,),
            # An untrained encoder's attention is even: these thresholds leave both kinds of windows.
            "windows.min_foreground": 0.5,
            "windows.min_background": 0.5,
            "training.epochs": EPOCHS,
            "training.teacher_start": 1,
            "training.evaluate_every": 1,
            "compute.resident_gib": 0.0,  # nothing stays in a worker's memory, as with full-size images
            "compute.cache_folder": str(folder / "cache"),
            "compute.track": "none",
        }
    )


def make_data(recipe: Recipe, root: str, images: int, validation: int) -> None:
    """Write training and validation images and labels to `root`, unless a rehearsal of this size has written them."""
    marker, content = storage.join(root, "data.json"), json.dumps([images, validation, recipe.classes]).encode()
    if storage.read_bytes_or_none(marker) == content:
        return
    generator = np.random.default_rng(0)
    photos, labels = [], []
    for _ in range(PICTURES):
        small = generator.integers(0, 256, (_PHOTO[0] // 8, _PHOTO[1] // 8, 3), np.uint8)
        photos.append(encoded(Image.fromarray(small).resize(_PHOTO[::-1], Image.Resampling.BICUBIC), "JPEG"))
        classes = generator.integers(0, recipe.classes, (_PHOTO[0] // 16, _PHOTO[1] // 16), np.uint8)
        labels.append(encoded(Image.fromarray(classes.repeat(16, 0).repeat(16, 1)), "PNG"))
    kinds = (("data/train", "jpg", photos, images), ("data/val", "jpg", photos, validation))
    for below, suffix, files, count in (*kinds, ("labels/val", "png", labels, validation)):
        _write_all(storage.join(root, below), suffix, files, count)
    storage.write_bytes(marker, content)


def _write_all(folder: str, suffix: str, files: list[bytes], count: int) -> None:
    """Write `count` files with names like COCO's; local files are links to the first file with the same content."""
    names = (storage.join(folder, f"{i:012d}.{suffix}") for i in range(count))
    if storage.is_local(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        firsts: list[Path] = []
        for i, name in enumerate(map(Path, names)):
            name.unlink(missing_ok=True)
            if i < len(files):
                name.write_bytes(files[i])
                firsts.append(name)
            else:
                name.hardlink_to(firsts[i % len(files)])
        return
    pending = iter(enumerate(names))
    with ThreadPoolExecutor(_UPLOADS) as pool:
        while some := list(islice(pending, _AT_ONCE)):
            list(pool.map(lambda item: storage.write_bytes(item[1], files[item[0] % len(files)]), some))


def _arithmetic(recipe: Recipe) -> dict[str, float]:
    """Return seconds per image of each stage's arithmetic, the minimum of several turns; for features in two parts."""
    bare, batch = Bare(recipe), recipe.training.batch_size

    def forward(size: Size) -> float:
        return min(bare.forwards({size: _SAMPLE})[0] for _ in range(_TURNS)) / _SAMPLE

    image = forward(recipe.dataset.image_size)
    step = min(bare.training_loop(batch, _STEPS) for _ in range(_TURNS)) / _STEPS
    return {
        "saliency": forward(recipe.dataset.feature_size),
        "window": forward(recipe.windows.size),
        "pseudo_labels": image,
        "training": step / batch,
        "evaluation": image,
    }


class _Rehearsing:
    """A rehearsal that is running."""

    def __init__(self, recipe: Recipe, run: Run, folder: Path, requests: str, say: Callable[[str], None]) -> None:
        self._recipe, self._run, self._requests, self._say = recipe, run, requests, say
        file = folder / "recipe.yaml"
        file.write_text(recipe.to_yaml())
        self._command = [sys.executable, "-m", "transfgu", "train", "--recipe", str(file), "--run", run.uri]
        self._environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "RAY_TMPDIR": str(folder)}
        self._memory = Memory()
        self._counts: list[tuple[str, float]] = []  # finished stages, with the number of requests by then
        self._half = threading.Event()

    def measured(self, images: int, validation: int, arithmetic: Mapping[str, float]) -> Rehearsal:
        """Run, kill, run again, and read the measurements from the run's files and the printed lines."""
        self._count("")
        first = Command(self._command, self._memory, self._heard, self._environment)
        killed_after = self._kill_at_half(first)
        folder = self._run.artifact(_KILLED).uri
        there = sum(uri.endswith(".parquet") for uri in storage.list_files(folder))
        self._say(f"killed at {there} parts, starting again ...")
        second = Command(self._command, self._memory, self._heard, self._environment)
        status = second.wait()
        if status:
            raise UserError(
                f"transfgu train failed with status {status}: {second.lines[-1].text if second.lines else ''}",
                code="rehearsal-failed",
            )
        metrics = json.loads(storage.read_bytes(self._run.file("metrics.json")))["stages"]
        began = ended_at(first.lines, "samples")
        at_kill = there * parts.part_size(self._recipe.dataset.feature_size)
        history = self._run.history()
        steps, scores = ([row[name] for row in history] for name in ("seconds", "score_seconds"))
        stages = self._stages(metrics, killed_after - began, arithmetic, images, validation)
        return Rehearsal(
            preset=self._recipe.preset,
            concepts=self._recipe.concepts.count,
            images=images,
            validation=validation,
            root=storage.shown(self._run.uri.rpartition("/")[0]),
            device=device_name(own_device()),
            date=datetime.date.today().isoformat(),
            wall_seconds=killed_after + second.seconds,
            resume_seconds=worked_at(second.lines, at_kill),
            parts_at_kill=there,
            stages=stages,
            epoch_start_seconds=[row["start_seconds"] for row in history],
            epoch_seconds=steps,
            score_share=[score / (score + step) for score, step in zip(scores, steps, strict=True)],
            training_overhead_seconds=metrics["training"]["seconds"] - sum(steps) - sum(scores),
            memory=self._memory,
        )

    def _kill_at_half(self, command: Command) -> float:
        """Kill the command in the middle of its first stage; returns the seconds until then."""
        while not self._half.wait(0.1):
            if command.ended:
                command.wait()
                last = command.lines[-1].text if command.lines else ""
                raise UserError(f"transfgu train ended too early: {last}", code="rehearsal-failed")
        return command.kill()

    def _heard(self, line: Line) -> None:
        if (found := _PROGRESS.match(line.text)) and found[1] == _KILLED and 2 * int(found[2]) >= int(found[3]):
            self._half.set()
        if found := _DONE.match(line.text):
            self._say(line.text)
            self._count(found[1])

    def _count(self, stage: str) -> None:
        if not self._requests:
            return
        done = subprocess.run(self._requests, shell=True, capture_output=True, text=True, check=False)
        try:
            self._counts.append((stage, float(done.stdout)))
        except ValueError:
            last = (done.stderr or done.stdout).strip().rpartition("\n")[2]
            self._say(f"--requests printed no number: {last}")
            self._requests = ""
            self._counts.clear()

    def _stages(
        self,
        metrics: Mapping[str, Any],
        killed_seconds: float,
        arithmetic: Mapping[str, float],
        images: int,
        validation: int,
    ) -> dict[str, Stage]:
        windows = sum(metrics["features"]["windows"].values()) / images
        alone = {
            **arithmetic,
            "features": arithmetic["saliency"] + windows * arithmetic["window"],
            "training": EPOCHS * arithmetic["training"],
        }
        before = dict(zip((s for s, _ in self._counts[1:]), (n for _, n in self._counts), strict=False))
        asked = {stage: count - before[stage] for stage, count in self._counts[1:]}
        sizes = storage.list_versions(self._run.uri)
        found = {}
        for stage, row in metrics.items():
            count = {"evaluation": validation, "samples": images + validation}.get(stage, images)
            seconds = row["seconds"] + (killed_seconds if stage == _KILLED else 0.0)
            own = [v.size for uri, v in sizes.items() if uri.startswith(self._run.artifact(stage).uri + "/")]
            found[stage] = Stage(
                seconds=seconds,
                images=count,
                beyond_arithmetic=seconds / count - alone[stage] if stage in alone else None,
                requests=asked[stage] / count if stage in asked else None,
                files=len(own),
                bytes=sum(own),
            )
        return found


def ended_at(lines: Iterable[Line], stage: str) -> float:
    """Return when a stage ended, in seconds since the command's start; 0 if it did not end."""
    return next((x.seconds for x in lines if (found := _DONE.match(x.text)) and found[1] == stage), 0.0)


def worked_at(lines: Iterable[Line], already: int) -> float:
    """Return when the killed stage had done more than `already` images, in seconds since the command's start."""
    for line in lines:
        found = _PROGRESS.match(line.text)
        if (found and found[1] == _KILLED and int(found[2]) > already) or _DONE.match(line.text):
            return line.seconds
    return float("nan")
