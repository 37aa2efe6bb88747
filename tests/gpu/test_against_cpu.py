"""A GPU computes the same as a CPU: every step of the method on both, in float32 and in bfloat16.

`TRANSFGU_GPU_TESTS=cpu` uses the CPU instead of the GPU, to try the tests themselves. Tolerances in float32 allow sums
of some hundred products in another order. bfloat16 keeps 8 bits, so each product has a relative error of up to 2^-9.
"""

import os
import socket
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.made_run import make_run
from transfgu.benchmarks.arithmetic import faiss_kmeans, kmeans_start
from transfgu.datasets.shapes import scene
from transfgu.decoder import MaskDecoder, all_winners
from transfgu.device_kmeans import DeviceShard
from transfgu.encoder import SHIPPED, Encoder, normalise
from transfgu.inference.frozen_encoder import FrozenEncoder
from transfgu.inference.memory import HalveOnOutOfMemory
from transfgu.kmeans import Shard, cluster
from transfgu.learner import Batch
from transfgu.losses import bootstrapping_loss
from transfgu.metrics import batch_confusion, confusion_matrix
from transfgu.recipe import PseudoLabelsRecipe, Recipe, preset
from transfgu.runtime.progress import Progress
from transfgu.stages import concepts, training
from transfgu.store import storage
from transfgu.training.copies import on_device
from transfgu.training.step import make_optimiser, start_step
from transfgu.views import apply_views, draw_views
from transfgu.windows import sliding_windows

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
SIDE, IMAGES, K, WIDTH, GRID = 128, 6, 10, 48, (8, 8)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="what it shows is CUDA's alone")


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return CPU if os.environ.get("TRANSFGU_GPU_TESTS") == "cpu" else torch.device("cuda")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.stack([scene(3, "train", i, SIDE)[0].transpose(2, 0, 1) for i in range(IMAGES)])


def recipe(precision: str) -> Recipe:
    return preset("shapes").with_fields({"encoder.precision": precision, "windows.size": (64, 64)})


def on_both(gpu: torch.device, precision: str) -> tuple[FrozenEncoder, FrozenEncoder]:
    return FrozenEncoder(recipe("float32"), CPU), FrozenEncoder(recipe(precision), gpu)


def cosines(one: np.ndarray, other: np.ndarray) -> Tensor:
    return F.cosine_similarity(torch.tensor(one), torch.tensor(other), dim=-1)


# ---- the frozen encoder ----


@pytest.mark.parametrize(("precision", "nearest"), [("float32", 0.99999), ("bfloat16", 0.999)])
def test_features(gpu: torch.device, images: np.ndarray, precision: str, nearest: float) -> None:
    windows = np.asarray(sliding_windows((16, 16), (0.5,), 8))
    rows, places = np.repeat(np.arange(IMAGES), len(windows)), np.tile(windows, (IMAGES, 1))
    cpu, other = (f.window_features(images, rows, places, (64, 64)) for f in on_both(gpu, precision))
    assert cosines(cpu, other).min() > nearest


@pytest.mark.parametrize(("precision", "same"), [("float32", 0.999), ("bfloat16", 0.98)])
def test_saliency(gpu: torch.device, images: np.ndarray, precision: str, same: float) -> None:
    cpu, other = (f.saliency(images, times_mean=1.0) for f in on_both(gpu, precision))
    assert (cpu == other).mean() >= same
    assert 0.05 < cpu.mean() < 0.95


@pytest.mark.parametrize(("precision", "same"), [("float32", 0.999), ("bfloat16", 0.85)])
def test_concept_maps(gpu: torch.device, images: np.ndarray, precision: str, same: float) -> None:
    both = on_both(gpu, precision)
    encoder = both[0].encoder
    centres = encoder.class_tokens(normalise(torch.tensor(images), encoder.mean, encoder.std))
    cpu, other = (f.concept_maps(images, centres, PseudoLabelsRecipe()) for f in both)
    assert cpu.shape == other.shape == (IMAGES, len(centres) + 2, 16, 16)
    labels = [unpacked.argmax(1) for unpacked in map(maps_of, (cpu, other))]
    assert (labels[0] == labels[1]).float().mean() >= same


def maps_of(packed: np.ndarray) -> Tensor:
    from transfgu.datasets.packed_maps import unpack_maps

    return unpack_maps(torch.tensor(packed))


# ---- decoder, loss, step ----


def decoder(seed: int = 0) -> MaskDecoder:
    torch.manual_seed(seed)
    return MaskDecoder(WIDTH, K, num_heads=3, dropout=0.0)


def made_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(IMAGES, GRID[0] * GRID[1], WIDTH, generator=generator)
    return tokens, torch.rand(IMAGES, K, *GRID, generator=generator) ** 4


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-4), (True, 0.2)])
def test_decoder(gpu: torch.device, half: bool, tolerance: float) -> None:
    tokens, _ = made_batch()
    with torch.no_grad():
        logits, embeddings = decoder()(tokens)
        with torch.autocast(gpu.type, torch.bfloat16, enabled=half):
            found, others = decoder().to(gpu)(tokens.to(gpu))
    assert found.dtype == others.dtype == torch.float32  # LayerNorm over classes: of deviation 1
    torch.testing.assert_close(found.cpu(), logits, rtol=0, atol=tolerance)
    torch.testing.assert_close(others.cpu(), embeddings, rtol=0, atol=tolerance / 10)


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("background", [None, 0.1])
def test_loss_and_its_gradient(gpu: torch.device, with_teacher: bool, background: float | None) -> None:
    generator = torch.Generator().manual_seed(2)
    classes = K + (background is not None)
    logits, teacher = (torch.randn(IMAGES, classes, *GRID, generator=generator) for _ in range(2))
    embeddings = F.normalize(torch.randn(IMAGES, classes, WIDTH, generator=generator), dim=-1)
    _, maps = made_batch()
    found = []
    for device in (CPU, gpu):
        student = logits.to(device).requires_grad_()
        loss = bootstrapping_loss(
            student,
            embeddings.to(device),
            maps.to(device),
            teacher.to(device) if with_teacher else None,
            omega_1=1.0,
            omega_2=0.3,
            alpha=0.05,
            permutation=np.roll(np.arange(classes), 1),
            background_threshold=background,
        )
        torch.autograd.backward(loss.total)
        assert student.grad is not None
        terms = torch.stack([loss.total, loss.peer, loss.diversity, loss.uncertainty]).detach()
        found.append((terms.cpu(), student.grad.cpu(), loss.labels.cpu()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-7)
    assert torch.equal(found[1][2], found[0][2])


def trained(device: torch.device, half: bool = False, wrap: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    """Return the totals of six steps with a teacher, one of them skipped, and the weights after them."""
    tokens, maps = (tensor.to(device) for tensor in made_batch())
    student, teacher = decoder().to(device), decoder(1).to(device)
    optimiser = make_optimiser(student, 1e-3)
    model: nn.Module = DistributedDataParallel(student) if wrap else student
    results = [
        start_step(
            model,
            optimiser,
            tokens,
            maps,
            teacher,
            omega_1=1.0,
            omega_2=0.3,
            alpha=50.0 if step == 3 else 0.05,
            permutation=np.roll(np.arange(K), 1),
            half=half,
        ).result()
        for step in range(6)
    ]
    assert [result.skipped for result in results] == [False] * 3 + [True] + [False] * 2
    return [result.total for result in results], {n: p.detach().cpu() for n, p in student.named_parameters()}


@pytest.mark.parametrize(("half", "of_total", "of_weights"), [(False, 1e-4, 2e-4), (True, 0.02, 1e-2)])
def test_training_steps(gpu: torch.device, half: bool, of_total: float, of_weights: float) -> None:
    cpu, weights = trained(CPU)
    other, others = trained(gpu, half)
    assert other == pytest.approx(cpu, rel=of_total)
    for name, weight in weights.items():
        # Five steps of Adam move a weight by 5e-3 at most: where its gradient is about zero, up on one and down on the
        # other.
        torch.testing.assert_close(others[name], weight, rtol=0, atol=of_weights)
        assert (others[name] - weight).abs().mean() < of_weights / 8


@needs_cuda
def test_nccl_with_one_worker(gpu: torch.device) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        ones = torch.ones(4, device=gpu)
        dist.all_reduce(ones)
        assert ones.tolist() == [1.0] * 4
        totals, weights = trained(gpu, wrap=True)
    finally:
        dist.destroy_process_group()
    alone, others = trained(gpu)
    assert totals == pytest.approx(alone, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=2e-4)


# ---- views, batches ----


def test_views(gpu: torch.device, images: np.ndarray) -> None:
    pixels, (_, maps) = torch.tensor(images), made_batch()
    views = draw_views(range(IMAGES), (SIDE, SIDE), seed=4, epoch=2)
    seen, cut = apply_views(pixels, maps, views, 8)
    found, others = apply_views(pixels.to(gpu), maps.to(gpu), views, 8)
    torch.testing.assert_close(found.cpu(), seen, rtol=0, atol=1e-3)  # a hue may turn over at equal channels
    torch.testing.assert_close(others.cpu(), cut, rtol=1e-4, atol=1e-5)


def test_copies_of_batches_arrive_whole_and_in_order(gpu: torch.device) -> None:
    batches = [
        Batch(np.arange(2), torch.full((2, 3, 64, 64), i, dtype=torch.uint8), torch.full((2, 4, 8, 8), i).short())
        for i in range(20)
    ]
    sums = [(b.inputs.sum(dtype=torch.int64), b.maps.sum()) for b in on_device(iter(batches), gpu)]
    assert [(int(a), int(b)) for a, b in sums] == [(2 * 3 * 4096 * i, 512 * i) for i in range(20)]
    assert {a.device.type for a, _ in sums} == {gpu.type}


# ---- evaluation, K-Means ----


def test_winners_and_confusion(gpu: torch.device) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(IMAGES, K, *GRID, generator=generator)
    cpu, other = all_winners(logits, (96, 80)), all_winners(logits.to(gpu), (96, 80)).cpu()
    assert (cpu == other).float().mean() > 0.9999
    labels = torch.randint(-1, K + 1, cpu.shape, generator=generator, dtype=torch.int16)
    found = batch_confusion(labels.to(gpu), other.to(gpu), K)
    assert np.array_equal(found.cpu().numpy(), confusion_matrix(labels.numpy(), other.numpy(), K))
    with pytest.raises(ValueError, match="do not fit"):
        batch_confusion(labels.to(gpu), other.to(gpu) + K, K)


@pytest.mark.parametrize("pieces", [1, 3])
def test_kmeans(gpu: torch.device, pieces: int) -> None:
    rows = np.random.default_rng(0).standard_normal((20_000, 64), np.float32)
    some = np.array_split(rows, pieces)
    cpu, other = (cluster(shard, 12, iterations=30) for shard in (Shard(some), DeviceShard(some, gpu, at_once=4096)))
    assert other.inertia == pytest.approx(cpu.inertia, rel=1e-3)
    assert other.counts.sum() == len(rows)


@pytest.mark.skipif(not hasattr(faiss, "StandardGpuResources"), reason="this FAISS computes on CPUs alone")
def test_kmeans_is_as_good_as_faiss_on_the_gpu(gpu: torch.device) -> None:
    rows = np.random.default_rng(0).standard_normal((20_000, 64), np.float32)
    own = cluster(DeviceShard([rows], gpu), 12, iterations=30)
    _, inertia = faiss_kmeans(rows, kmeans_start(rows, 12), 30, gpu=True)
    assert own.inertia == pytest.approx(inertia, rel=1e-3)


def test_concepts_of_an_array_on_whatever_this_process_has(gpu: torch.device) -> None:
    rows = np.random.default_rng(0).standard_normal((5000, 32), np.float32)
    found = concepts.kmeans(rows, 7, iterations=20)
    assert found.inertia == pytest.approx(cluster(Shard([rows]), 7, iterations=20).inertia, rel=1e-3)


# ---- memory, and a GPU that is shared ----


@needs_cuda
def test_a_batch_that_does_not_fit_is_halved(gpu: torch.device) -> None:
    encoder = Encoder.from_pretrained(SHIPPED).to(gpu)
    batch = torch.randn(64, 3, SIDE, SIDE, device=gpu)
    with torch.no_grad():
        whole = encoder.class_tokens(batch)
        torch.cuda.synchronize()
        held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((held + 0.6 * (peak - held)) / total)
        try:
            halving = HalveOnOutOfMemory(encoder.class_tokens, "batch")
            found = halving(batch)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert halving.size is not None
    assert halving.size < 64
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.ray
def test_two_workers_share_one_gpu_by_halves(tmp_path: Path, ray_cluster: None) -> None:
    """Their weights are those of one worker; gradients are exchanged by Gloo, from one GPU."""
    weights = []
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        made = make_run(tmp_path / str(workers))
        fields: dict[str, Any] = {
            **{"compute.workers": workers, "gpus_per_actor": 0.5, "cpus_per_actor": 1.0, "dropout": 0.0},
            **{"epochs": 2, "teacher_start": 1, "teacher_every": (1,), "training.batch_size": 4, "views": False},
            **{"encoder.precision": "float32", "training.precision": "float32", "track": "none"},
        }
        training.run(made.recipe.with_fields(fields), made.run, Progress("training", quiet=True))
        weights.append(storage.read_bytes(made.run.file("training/last.safetensors")))
    import safetensors.torch

    one, two = map(safetensors.torch.load, weights)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-4)
