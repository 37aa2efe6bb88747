"""Time the arithmetic of each stage and compare it with a lower bound: the same work in PyTorch or FAISS alone.

Both do the same work on the same pixels in one run and take turns, so that other load of the machine affects both;
medians are compared. The bound runs in one process on data in memory, without reading, sending or storing.
"""

import copy
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from jaxtyping import Float, Float32
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from transfgu.decoder import MaskDecoder, all_winners, winners
from transfgu.device_kmeans import DeviceShard
from transfgu.encoder import patch_grid
from transfgu.inference.device import allow_tf32, in_bfloat16, own_device, use_cores
from transfgu.inference.frozen_encoder import FrozenEncoder
from transfgu.inference.tokens import PatchTokens
from transfgu.kmeans import Shard, cluster, cores, sample_rows
from transfgu.metrics import batch_confusion, confusion_matrix
from transfgu.planning.measurements import Timing, in_turns
from transfgu.recipe import Recipe, Size
from transfgu.training.step import PendingStep, make_optimiser, start_step
from transfgu.views import apply_views, draw_views

_MATMUL = {"cpu": 1024, "cuda": 8192}  # side of a matrix product that reaches the full speed
_SALIENT = 0.3  # share of patches above zero in a generated map

KMEANS_SEED = 1
"""Seed of the timed K-Means."""


def device_name(device: torch.device) -> str:
    """Return the name of the device; for a CPU, also the number of cores."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    models = [s for s in _lines("/proc/cpuinfo") if s.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.machine()
    return f"{cores()} cores of {name}"


def _lines(file: str) -> list[str]:
    path = Path(file)
    return path.read_text(errors="replace").splitlines() if path.exists() else []


class Bare:
    """Encoder and decoder in one process, on all its cores or its GPU: measures the bounds, and whatever needs no Ray.

    Pixels are noise, because the speed of arithmetic does not depend on them.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Raise UserError if the encoder or its weights are not available."""
        self.recipe = recipe
        self.device = own_device()
        self._use_cores()
        self.frozen = FrozenEncoder(recipe, self.device)
        self._tokens = PatchTokens(recipe.encoder, self.device)

    def _use_cores(self) -> None:
        torch.set_float32_matmul_precision("highest")
        allow_tf32(self.recipe.training, self.device)  # a recipe with another setting may have been measured before
        # Ray or another library may change the number of threads between calls of an actor.
        if self.device.type == "cpu":
            use_cores(1)
            faiss.omp_set_num_threads(cores())

    def about(self) -> dict[str, Any]:
        """Return the description of the machine: fields of `Measurements`."""
        self._use_cores()
        half = self.frozen.half
        return {
            "device": device_name(self.device),
            "precision": "bfloat16" if half else "float32",
            "date": datetime.date.today().isoformat(),
            "cores": cores(),
            "matmul_flops": matmul_flops(self.device, torch.bfloat16 if half else torch.float32),
        }

    def shape(self) -> tuple[int, int, int]:
        """Width, number of heads and patch size of the encoder."""
        encoder = self.frozen.encoder
        return encoder.width, encoder.num_heads, encoder.patch_size

    def forwards(self, work: Mapping[Size, int]) -> tuple[float, float]:
        """Time bare forwards of so many images of each size, one batch at a time; on CPUs one batch per core.

        Returns:
            Seconds, and floating-point operations.
        """
        self._use_cores()
        done = [self._forwards(size, count) for size, count in work.items()]
        return sum(took for took, _ in done), sum(flops for _, flops in done)

    def _forwards(self, size: Size, count: int) -> tuple[float, float]:
        rows = max(1, min(count, self.frozen.rows(size)))
        batch = torch.randn(rows, 3, *size, device=self.device)

        def all_of_them() -> None:
            self.frozen.each(lambda start: self._bare_forward(batch[: count - start]), range(0, count, rows))

        flops = _flops(lambda: self._bare_forward(batch[:1])) * count  # this also warms up
        return self._seconds(all_of_them), flops

    @torch.no_grad()
    def _bare_forward(self, batch: Float[Tensor, "B 3 H W"]) -> None:
        with self.frozen.precision():
            self.frozen.encoder.vit.forward_features(batch)

    def forward_pace(self, images: int, repeats: int) -> Timing:
        """Time patch tokens of decoded images at evaluation's size; the bound is a bare forward of a batch."""
        self._use_cores()
        size = self.recipe.dataset.image_size
        batch = torch.randn(images, 3, *size, device=self.device)
        pixels = torch.randint(0, 256, batch.shape, dtype=torch.uint8)
        found = self._timing(
            "encoder forward",
            f"a bare forward of {'x'.join(map(str, size))}",
            images,
            lambda: self._tokens(pixels),
            lambda: self._bare_forward(batch),
            repeats,
        )
        return replace(found, flops=_flops(lambda: self._bare_forward(batch[:1])) * images)

    def counting(self, images: int) -> float:
        """Return images per second that are resized, classified and counted into a confusion matrix on the device."""
        return images / self.counting_pace(images, 1).seconds

    def counting_pace(self, images: int, repeats: int) -> Timing:
        """Time the counting of a batch's confusion matrix; the bound counts one image at a time.

        Logits and labels are on the device; both include resizing the logits and taking the maximum.
        """
        self._use_cores()
        size, classes = self.recipe.dataset.image_size, self.recipe.classes
        grid = patch_grid(size, self.frozen.encoder.patch_size)
        logits = torch.randn(images, classes, *grid, device=self.device)
        labels = all_winners(logits.roll(1, 0), size)

        def one_by_one() -> None:
            for label, image in zip(labels.cpu().numpy(), logits, strict=True):
                confusion_matrix(label, winners(image, size).cpu().numpy(), classes)

        return self._timing(
            "counting",
            "one image at a time, counted on the CPU",
            images,
            lambda: batch_confusion(labels, all_winners(logits, size), classes),
            one_by_one,
            repeats,
        )

    def concept_maps(self, repeats: int, *, unfused: bool = False) -> Timing:
        """Time the maps of all concepts; the bound is a bare forward of the same batch.

        `unfused` also times the published method on one image: one backward pass per class through a network that keeps
        its attention matrices. It takes gigabytes of memory, so one class is timed, alternating with ours, and
        multiplied by the number of classes.
        """
        self._use_cores()
        size, count = self.recipe.dataset.image_size, self.recipe.concepts.count
        encoder = self.frozen.encoder
        rows = self.frozen.rows(size)
        batch = torch.randn(rows, 3, *size, device=self.device)
        concepts = torch.randn(count, encoder.width, device=self.device)

        def maps() -> None:
            with torch.no_grad(), self.frozen.precision():
                encoder.concept_maps(batch, concepts)

        found = self._timing(
            "concept maps",
            f"a bare forward of the same batch; {count} concepts",
            rows,
            maps,
            lambda: self._bare_forward(batch),
            repeats,
        )
        details = {}
        if unfused:
            published, beside = self._backward_a_class(batch[:1], concepts, lambda: self._seconds(maps), repeats)
            details = {
                "one backward pass per class through an unfused network [s]": published * rows,
                "times as long as ours": published * rows / beside,
            }
        return replace(found, flops=_flops(lambda: self._bare_forward(batch)), details=details)

    def _backward_a_class(
        self, image: Float[Tensor, "1 3 H W"], concepts: Float[Tensor, "K d"], ours: Callable[[], float], repeats: int
    ) -> tuple[float, float]:
        """Return the seconds per image of the published method and of `ours`, timed alternately: medians."""
        vit = copy.deepcopy(self.frozen.encoder.vit).requires_grad_(True)
        for block in vit.blocks:
            block.attn.fused_attn = False
        made: list[Tensor] = []
        forward = self._seconds(lambda: made.append(vit.forward_features(image)[:, 0]))
        loss = 1 - F.cosine_similarity(made[0], concepts[:1]).sum()

        def backward() -> float:
            vit.zero_grad()
            return self._seconds(lambda: torch.autograd.backward(loss, retain_graph=True))

        beside, taken = in_turns(ours, backward, repeats)
        return forward + len(concepts) * statistics.median(taken), statistics.median(beside)

    def training_step(self, batch: int, repeats: int) -> Timing:
        """Time a step with a teacher, including the encoder's forward, which is the bound. Images are in memory."""
        self._use_cores()
        loop = self._loop(batch)
        images, maps = loop.views(0)
        tokens = self._tokens(images)
        found = self._timing(
            "training step",
            f"a bare forward of {'x'.join(map(str, images.shape[2:]))}",
            batch,
            lambda: loop.step(self._tokens(images), loop.views(0)[1]),
            lambda: self._bare_forward(images),
            repeats,
        )
        # FLOPs are counted in this thread only, and on CPUs the encoder uses others, so the bare forward is counted
        # instead.
        flops = _flops(lambda: self._bare_forward(images)) + _flops(lambda: loop.step(tokens, maps))
        return replace(found, flops=flops)

    def training_loop(self, batch: int, steps: int) -> float:
        """Return the seconds of so many steps with a teacher, as a bare loop over images and maps in memory."""
        self._use_cores()
        loop = self._loop(batch)

        def run() -> None:
            before: PendingStep | None = None
            for step in range(steps):
                images, maps = loop.views(step)
                # An image without random crops has the same tokens in every epoch, so its tokens are in memory.
                queued = loop.step(self._tokens(images) if self.recipe.training.views else known, maps)
                if before:
                    before.result()  # read one step late, as the training worker does
                before = queued

        images, maps = loop.views(0)
        known = self._tokens(images)
        loop.step(known, maps)
        return self._seconds(run)

    def _loop(self, batch: int) -> "_Loop":
        return _Loop(self.recipe, self._tokens, batch)

    def concepts(self, count: int, iterations: int, repeats: int) -> Timing:
        """Time K-Means on one worker, in this process; the bound is FAISS's K-Means."""
        self._use_cores()
        features, k = made_features(count, self.frozen.encoder.width), self.recipe.concepts.count
        gpu = self.device.type == "cuda"
        start = kmeans_start(features, k)
        with _Peak(torch.device("cpu")) as peak:
            inertia: dict[str, float] = {}

            def ours() -> float:
                started = time.perf_counter()
                rows = DeviceShard([features], self.device) if gpu else Shard([features])
                inertia["ours"] = cluster(rows, k, iterations=iterations, seed=KMEANS_SEED).inertia
                return time.perf_counter() - started

            def bound() -> float:
                took, inertia["FAISS"] = faiss_kmeans(features, start, iterations, gpu=gpu)
                return took

            turns = in_turns(ours, bound, repeats)
        return concepts_timing("concepts, one worker", features, iterations, turns, inertia, peak.bytes)

    def faiss(
        self, features: Float32[ndarray, "n d"], start: Float32[ndarray, "k d"], iterations: int, *, gpu: bool
    ) -> tuple[float, float]:
        """Call `faiss_kmeans`; `gpu` has no effect if this process has no GPU."""
        self._use_cores()
        return faiss_kmeans(features, start, iterations, gpu=gpu and self.device.type == "cuda")

    def _timing(
        self, stage: str, bound_is: str, images: int, ours: Callable[[], Any], bound: Callable[[], Any], repeats: int
    ) -> Timing:
        """Time `ours` and `bound` alternately, each on so many images."""
        with _Peak(self.device) as peak:
            turns = in_turns(lambda: self._seconds(ours), lambda: self._seconds(bound), repeats)
        return Timing(
            stage=stage,
            bound_is=bound_is,
            items=images,
            unit="images",
            ours=turns[0],
            bound=turns[1],
            peak_bytes=peak.bytes,
        )

    def _seconds(self, work: Callable[[], Any]) -> float:
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Loop:
    """Student, teacher and a batch in memory."""

    def __init__(self, recipe: Recipe, tokens: PatchTokens, batch: int) -> None:
        self._recipe, self._patch = recipe, tokens.encoder.patch_size
        size, how, device = recipe.dataset.training_size, recipe.decoder, tokens.device
        width, heads = tokens.encoder.width, tokens.encoder.num_heads
        self._student, self._teacher = (
            MaskDecoder(width, recipe.classes, num_heads=heads, depth=how.depth, dropout=how.dropout).to(device)
            for _ in range(2)
        )
        self._optimiser = make_optimiser(self._student, recipe.training.scaled_lr, recipe.training.weight_decay)
        self._images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, device=device)
        grid = tuple(side // self._patch for side in recipe.dataset.image_size)
        maps = torch.rand(batch, recipe.concepts.count, *grid, device=device)
        self._maps = maps * (maps < _SALIENT)
        self._permutation = np.random.default_rng(0).permutation(recipe.classes)
        self._half = in_bfloat16(recipe.training, device)

    def views(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the encoder's input, and the maps."""
        size = self._recipe.dataset.training_size
        if self._recipe.training.views:
            views = draw_views(range(len(self._images)), size, seed=0, epoch=step)
            return apply_views(self._images, self._maps, views, self._patch)
        grid = patch_grid(size, self._patch)
        return self._images.float() / 255, F.interpolate(self._maps, grid, mode="bilinear")

    def step(self, patches: Tensor, maps: Tensor) -> PendingStep:
        """Queue one step with the teacher."""
        how = self._recipe.training
        return start_step(
            self._student,
            self._optimiser,
            patches,
            maps,
            self._teacher,
            omega_1=how.omega_1,
            omega_2=how.omega_2,
            alpha=how.alpha_start,
            permutation=self._permutation,
            background_threshold=how.background_threshold if self._recipe.background else None,
            half=self._half,
        )


def made_features(rows: int, width: int) -> Float32[ndarray, "n d"]:
    """Return rows around 200 overlapping centres, so that K-Means has work in every iteration."""
    generator = np.random.default_rng(0)
    features = generator.standard_normal((rows, width), np.float32)
    centres = generator.standard_normal((200, width), np.float32)
    features += centres[generator.integers(0, len(centres), rows)]
    return features


def kmeans_start(features: Float32[ndarray, "n d"], k: int) -> Float32[ndarray, "k d"]:
    """Return the initial centroids of our K-Means with `KMEANS_SEED`."""
    return Shard([features]).best_start(sample_rows(len(features), k, KMEANS_SEED), k, KMEANS_SEED)


def faiss_kmeans(
    features: Float32[ndarray, "n d"], start: Float32[ndarray, "k d"], iterations: int, *, gpu: bool = False
) -> tuple[float, float]:
    """Return seconds of FAISS's own K-Means in this process, on all rows, and its inertia.

    With `gpu` it runs on the first GPU if this FAISS supports it. It starts from our initial centroids, whose search is
    part of our time; from others it would end in another local optimum, and the inertias could not be compared.
    """
    started = time.perf_counter()
    k, width = start.shape
    clustering = faiss.Kmeans(width, k, niter=iterations, max_points_per_centroid=len(features))
    if gpu and hasattr(faiss, "StandardGpuResources"):  # FAISS's own argument uses all GPUs, even with the value 1
        resources = faiss.StandardGpuResources()
        clustering.index = faiss.index_cpu_to_gpu(resources, 0, clustering.index)
    clustering.train(features, init_centroids=start)
    took = time.perf_counter() - started
    distances, _ = clustering.index.search(features, 1)
    return took, float(distances.sum(dtype=np.float64))


def concepts_timing(
    stage: str,
    features: Float32[ndarray, "n d"],
    iterations: int,
    turns: tuple[tuple[float, ...], tuple[float, ...]],
    inertia: Mapping[str, float],
    peak_bytes: int,
) -> Timing:
    """Return the line of the table for K-Means."""
    return Timing(
        stage=stage,
        bound_is=f"FAISS in one process, {len(features)} x {features.shape[1]}, from given centroids",
        items=len(features) * iterations,
        unit="rows x iterations",
        ours=turns[0],
        bound=turns[1],
        peak_bytes=peak_bytes,
        details={"inertia, ours by FAISS's": inertia["ours"] / inertia["FAISS"]},
    )


def matmul_flops(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Return floating-point operations per second of a large matrix product: the best of several tries."""
    side = _MATMUL[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        product = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
        del product
    return 2 * side**3 / best


def _flops(work: Callable[[], Any]) -> float:
    """Return the floating-point operations of matrix products and attention in `work`, which is run once."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


class _Peak:
    """Measures the peak memory of this process in the block: of the GPU, if the device is one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes = 0

    def __enter__(self) -> "_Peak":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            reset_peak()
        return self

    def __exit__(self, *_: object) -> None:
        gpu = self._device.type == "cuda"
        self.bytes = torch.cuda.max_memory_allocated(self._device) if gpu else peak_of(os.getpid())


def reset_peak() -> None:
    """Reset this process's peak memory, if the system supports it."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def peak_of(process: int) -> int:
    """Return the peak memory of a process in bytes; 0 if it has ended or the system does not report it."""
    try:
        line = next((s for s in _lines(f"/proc/{process}/status") if s.startswith("VmHWM")), "VmHWM 0")
    except OSError:
        return 0
    return int(line.split()[1]) * 1024
