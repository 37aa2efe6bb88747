"""The training step: its effect on weights, and equal results for any division of a batch."""

import functools
import logging
import math
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from transfgu.decoder import MaskDecoder
from transfgu.errors import UserError
from transfgu.losses import Loss, bootstrapping_loss
from transfgu.training.step import StepResult, make_optimiser, start_step

WIDTH, CONCEPTS, GRID, IMAGES = 12, 4, (2, 3), 4
ALL = slice(0, IMAGES)


class Batch:
    """Patch tokens and maps of four images, a teacher and the settings: the same in every process."""

    def __init__(self, *, background: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.patches = torch.randn(IMAGES, 6, WIDTH, generator=generator, dtype=torch.float64)
        # Mostly small: some pixels of the scaled maps stay below 0.1 in all concepts, more in some images.
        self.maps = torch.randn(IMAGES, CONCEPTS, *GRID, generator=generator, dtype=torch.float64).abs() ** 6
        self.classes = CONCEPTS + background
        self.teacher = make_decoder(self.classes, seed=7)
        self.settings: dict[str, Any] = {
            "omega_1": 1.0,
            "omega_2": 0.3,
            "alpha": 0.05,
            "permutation": [*range(1, self.classes), 0],
            "background_threshold": 0.1 if background else None,
        }

    def step(self, student: nn.Module, optimiser: Optimizer, rows: slice = ALL, part: int | None = None) -> StepResult:
        return start_step(
            student, optimiser, self.patches[rows], self.maps[rows], self.teacher, part=part, **self.settings
        ).result()

    def loss(self, student: nn.Module, rows: slice = ALL) -> Loss:
        masks, embeddings = student(self.patches[rows])
        with torch.no_grad():
            opinion, _ = self.teacher(self.patches[rows])
        logits, teacher_logits = (m.mT.unflatten(2, GRID) for m in (masks, opinion))
        return bootstrapping_loss(logits, embeddings, self.maps[rows], teacher_logits, **self.settings)


def make_decoder(classes: int, seed: int = 0) -> MaskDecoder:
    torch.manual_seed(seed)
    return MaskDecoder(WIDTH, classes, num_heads=3, dropout=0.0).double()


class SmallMemory(nn.Module):
    """A decoder on a device with memory for so many images: more fail in the middle of the backward pass."""

    def __init__(self, decoder: MaskDecoder, room: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.room = room

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        watch = self.decoder.blocks[0].register_forward_hook(functools.partial(self._watch, len(patches)))
        masks, embeddings = self.decoder(patches)
        watch.remove()
        return masks, embeddings

    def _watch(self, images: int, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        def overflow(_gradient: Tensor) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        if images > self.room:
            output.register_hook(overflow)  # type: ignore[no-untyped-call]


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


# ---- one process ----


def test_decay_is_on_matrices_and_on_the_class_embedding() -> None:
    decoder = make_decoder(CONCEPTS)
    groups = make_optimiser(decoder, 1e-3, weight_decay=0.1).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] == 0.1 for p in group["params"]}
    kept = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    names = {name: id(parameter) for name, parameter in decoder.named_parameters()}
    assert decayed | kept == set(names.values())
    assert decayed == {names[name] for name in names if name.endswith(("cls_emb", "proj_patch", "proj_classes"))} | {
        names[name] for name in names if name.endswith(".weight") and "norm" not in name
    }


def test_frozen_parameters_are_no_part_of_it() -> None:
    decoder = make_decoder(CONCEPTS)
    decoder.cls_emb.requires_grad_(False)
    optimised = {id(p) for group in make_optimiser(decoder, 1e-3).param_groups for p in group["params"]}
    assert id(decoder.cls_emb) not in optimised


@pytest.mark.parametrize("background", [False, True])
def test_step_reports_the_loss_and_follows_its_clamped_gradient(background: bool) -> None:
    batch = Batch(background=background)
    student = make_decoder(batch.classes)
    with torch.no_grad():
        student.proj_classes.mul_(1e-3)  # a tiny length to divide by: gradients beyond 1
    before = snapshot(student)
    loss = batch.loss(student)
    torch.autograd.backward(loss.total)
    expected = gradients(student)
    assert max(gradient.abs().max().item() for gradient in expected.values()) > 1

    result = batch.step(student, SGD(student.parameters(), lr=0.5))
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.5 * expected[name].clamp(-1, 1))
    assert result.total == pytest.approx(loss.total.item(), rel=1e-6)
    assert result.peer == pytest.approx(loss.peer.item(), rel=1e-6)
    assert result.diversity == pytest.approx(loss.diversity.item(), rel=1e-6)
    assert result.uncertainty == pytest.approx(loss.uncertainty.item(), rel=1e-6)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in expected.values()))
    assert result.gradient_norm == pytest.approx(norm, rel=1e-6)
    assert not result.skipped


def test_warm_up_needs_no_teacher() -> None:
    batch = Batch(background=True)
    batch.settings["permutation"] = None
    student = make_decoder(batch.classes)
    optimiser = make_optimiser(student, 1e-2)
    losses = [
        start_step(student, optimiser, batch.patches, batch.maps, **batch.settings).result().total for _ in range(20)
    ]
    assert losses[-1] < 0.8 * losses[0]


def test_teacher_is_not_trained_and_drops_nothing() -> None:
    batch = Batch(background=False)
    torch.manual_seed(3)
    batch.teacher = MaskDecoder(WIDTH, batch.classes, num_heads=3, dropout=0.9).double().train()
    before = snapshot(batch.teacher)
    results = []
    for seed in range(2):
        student = make_decoder(batch.classes)
        torch.manual_seed(seed)
        results.append(batch.step(student, make_optimiser(student, 1e-3)))
    assert results[0] == results[1]
    assert not gradients(batch.teacher)
    assert all(torch.equal(before[name], value) for name, value in snapshot(batch.teacher).items())


def test_step_whose_total_is_not_positive_is_skipped() -> None:
    batch = Batch(background=False)
    student = make_decoder(batch.classes)
    optimiser = make_optimiser(student, 1e-3)
    batch.step(student, optimiser)
    before, moments = snapshot(student), str(optimiser.state_dict())
    batch.settings["alpha"] = 5.0
    result = batch.step(student, optimiser)
    assert result.total < 0
    assert result.skipped
    assert all(torch.equal(before[name], value) for name, value in snapshot(student).items())
    assert str(optimiser.state_dict()) == moments


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("alpha", "moves"), [(0.05, True), (5.0, False), (math.nan, False)])
def test_a_fused_optimiser_skips_the_same_steps(fused: bool, alpha: float, moves: bool) -> None:
    batch = Batch(background=False)
    student = make_decoder(batch.classes)
    before = snapshot(student)
    batch.settings["alpha"] = alpha
    optimiser = SGD(student.parameters(), lr=0.1, fused=fused)
    step = start_step(student, optimiser, batch.patches, batch.maps, batch.teacher, **batch.settings)
    assert any(not torch.equal(before[name], value) for name, value in snapshot(student).items()) == moves
    if math.isnan(alpha):
        with pytest.raises(FloatingPointError):
            step.result()
    else:
        assert step.result().skipped != moves


@pytest.mark.parametrize("background", [False, True])
def test_bfloat16_is_close_to_float32_and_keeps_float32_weights(background: bool) -> None:
    batch = Batch(background=background)
    batch.patches, batch.maps, batch.teacher = batch.patches.float(), batch.maps.float(), batch.teacher.float()
    results, after = [], []
    for half in (False, True):
        student = make_decoder(batch.classes).float()
        optimiser = SGD(student.parameters(), lr=0.1)
        step = start_step(student, optimiser, batch.patches, batch.maps, batch.teacher, half=half, **batch.settings)
        results.append(step.result())
        after.append(snapshot(student))
    # bfloat16 keeps 8 bits: 2^-8 relative, in each of the two blocks' products.
    assert results[1].total == pytest.approx(results[0].total, rel=0.03)
    assert results[1].total != results[0].total
    assert results[1].gradient_norm == pytest.approx(results[0].gradient_norm, rel=0.1)
    for name, value in after[1].items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, after[0][name], rtol=0.05, atol=0.01)


@pytest.mark.parametrize("where", ["patches", "maps"])
def test_what_is_no_number_ends_training_before_it_reaches_the_weights(where: str) -> None:
    batch = Batch(background=False)
    student = make_decoder(batch.classes)
    before = snapshot(student)
    if where == "patches":
        batch.patches[0, 0, 0] = math.nan
    else:
        batch.settings["omega_2"] = math.inf
    with pytest.raises(FloatingPointError, match=r"training diverged: loss (nan|inf).*learning rate"):
        batch.step(student, make_optimiser(student, 1e-3))
    assert all(torch.equal(before[name], value) for name, value in snapshot(student).items())


def test_restarted_student_keeps_the_moments() -> None:
    batch = Batch(background=False)
    student = make_decoder(batch.classes)
    initial = snapshot(student)
    optimiser = make_optimiser(student, 1e-3)
    batch.step(student, optimiser)
    moment = optimiser.state[student.cls_emb]["exp_avg"].clone()
    student.load_state_dict(initial)
    assert torch.equal(optimiser.state[student.cls_emb]["exp_avg"], moment)
    batch.step(student, optimiser)
    # The same weights and data: the same gradient g. From 0.1 g the moment goes to 0.9 x 0.1 g + 0.1 g = 1.9 x 0.1 g.
    torch.testing.assert_close(optimiser.state[student.cls_emb]["exp_avg"], 1.9 * moment)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("part", [1, 3])
def test_parts_give_the_gradient_of_the_whole(background: bool, part: int) -> None:
    batch = Batch(background=background)
    whole, parts = make_decoder(batch.classes), make_decoder(batch.classes)
    expected = batch.step(whole, SGD(whole.parameters(), lr=0.1))
    result = batch.step(parts, SGD(parts.parameters(), lr=0.1), part=part)
    assert (expected.part, result.part) == (IMAGES, part)
    assert result.total == pytest.approx(expected.total, rel=1e-6)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], gradient, rtol=1e-6, atol=1e-6)


def test_out_of_memory_halves_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    batch = Batch(background=True)
    roomy, cramped = make_decoder(batch.classes), SmallMemory(make_decoder(batch.classes), room=1)
    expected = batch.step(roomy, SGD(roomy.parameters(), lr=0.1))
    optimiser = SGD(cramped.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING):
        result = batch.step(cramped, optimiser)
        assert result.part == 1
        assert result.total == pytest.approx(expected.total, rel=1e-6)
        for name, value in snapshot(roomy).items():
            torch.testing.assert_close(snapshot(cramped.decoder)[name], value, rtol=1e-6, atol=1e-6)
        batch.step(cramped, optimiser, part=result.part)
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: training batch processed 1 images at a time, not 4"
    ]


def test_a_single_image_too_large_is_the_user_s_to_mend() -> None:
    batch = Batch(background=False)
    student = SmallMemory(make_decoder(batch.classes), room=0)
    with pytest.raises(UserError) as error:
        batch.step(student, SGD(student.parameters(), lr=0.1))
    assert error.value.code == "image-too-large"


def test_other_errors_are_not_taken_for_memory() -> None:
    batch = Batch(background=False)
    student = make_decoder(batch.classes)
    batch.patches = batch.patches[:, :, :-1]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        batch.step(student, SGD(student.parameters(), lr=0.1))


@pytest.mark.gpu
def test_out_of_memory_on_a_real_device() -> None:
    """Memory for a batch of 64 through a decoder of a published size, then a limit that is too small for it."""
    torch.manual_seed(0)
    patches, maps = torch.randn(64, 400, 384, device="cuda"), torch.rand(64, 27, 20, 20, device="cuda")
    steps = []
    for limited in (False, True):
        torch.manual_seed(1)
        student = MaskDecoder(384, 27, num_heads=6, dropout=0.0).cuda()
        if limited:
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(0.4 * torch.cuda.max_memory_allocated() / total)
        optimiser = make_optimiser(student, 1e-3)
        steps.append(start_step(student, optimiser, patches, maps, omega_1=1, omega_2=0.3, alpha=0.05).result())
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert steps[0].part == 64
    assert steps[1].part < 64
    assert steps[1].total == pytest.approx(steps[0].total, rel=1e-4)
    assert steps[1].gradient_norm == pytest.approx(steps[0].gradient_norm, rel=1e-3)


# ---- two workers ----

Outcome = dict[tuple[Any, ...], Any]

SLICES = {
    "equal": (slice(0, 2), slice(2, 4)),
    "unequal": (slice(0, 1), slice(1, 4)),
    "empty": (slice(0, 0), slice(0, 4)),
    "barren": (slice(0, 2), slice(2, 4)),
    "certain": (slice(0, 1), slice(1, 4)),
}
"""The images of each worker by name.

All of ``barren``'s second are without a foreground pixel, and ``certain``'s peer loss counts half of each class's
pixels.
"""


def make_batch(slices: str, background: bool) -> Batch:
    batch = Batch(background=background)
    if slices == "barren":
        batch.maps[SLICES[slices][1]] = 0.3
    if slices == "certain":
        batch.settings["certain_share"] = 0.5
    return batch


def three_steps(batch: Batch, rows: slice, room: int = IMAGES, wrap: bool = True) -> dict[str, Any]:
    """Results, weights after three steps of Adam, and the last clamped gradient."""
    student: nn.Module = SmallMemory(make_decoder(batch.classes), room)
    optimiser = make_optimiser(student, 1e-3)
    if wrap and dist.is_initialized():
        student = DistributedDataParallel(student)
    part, results = None, []
    for _ in range(3):
        results.append(batch.step(student, optimiser, rows, part))
        part = results[-1].part
    student = student.module if isinstance(student, DistributedDataParallel) else student
    return {
        "values": [[r.total, r.peer, r.diversity, r.uncertainty, r.gradient_norm, r.skipped] for r in results],
        "weights": snapshot(student),
        "gradients": gradients(student),
        "parts": [result.part for result in results],
    }


def loss_and_gradients(batch: Batch, rows: slice) -> dict[str, Any]:
    """The loss through an ordinary DistributedDataParallel, whose own hooks average gradients."""
    student: nn.Module = make_decoder(batch.classes)
    if dist.is_initialized():
        student = DistributedDataParallel(student)
    loss = batch.loss(student, rows)
    torch.autograd.backward(loss.total)
    student = student.module if isinstance(student, DistributedDataParallel) else student
    values = [term.item() for term in (loss.total, loss.peer, loss.diversity, loss.uncertainty)]
    return {"values": values, "gradients": gradients(student)}


def alpha_of_opposite_signs(negative: bool) -> float:
    """An alpha for which the two slices' totals differ in sign, and that of their batch is the requested one.

    Each total falls along a line in alpha; the batch's root lies between the slices'.
    """
    batch = Batch(background=False)
    student = make_decoder(batch.classes)

    def root(rows: slice) -> float:
        batch.settings["alpha"] = 0.0
        start = batch.loss(student, rows).total.item()
        batch.settings["alpha"] = 1.0
        return start / (start - batch.loss(student, rows).total.item())

    roots = sorted(root(rows) for rows in SLICES["equal"])
    assert roots[0] < root(ALL) < roots[1]
    return (root(ALL) + roots[1 if negative else 0]) / 2


def one_step_with_alpha(alpha: float, rows: slice) -> dict[str, Any]:
    batch = Batch(background=False)
    batch.settings["alpha"] = alpha
    student = make_decoder(batch.classes)
    result = batch.step(student, make_optimiser(student, 1e-3), rows)
    return {"skipped": result.skipped, "weights": snapshot(student)}


def run_everything(rank: int, folder: Path) -> Outcome:
    # Found out before there is a process group, while losses are this process's own.
    alphas = {negative: alpha_of_opposite_signs(negative) for negative in (False, True)}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=200)
    )
    outcome: Outcome = {}
    for background in (False, True):
        for name, slices in SLICES.items():
            outcome["steps", name, background] = three_steps(make_batch(name, background), slices[rank])
            outcome["loss", name, background] = loss_and_gradients(make_batch(name, background), slices[rank])
        # Memory runs out on one worker alone: the other must not be left waiting, or with another gradient.
        rows = SLICES["equal"][rank]
        outcome["memory", background] = three_steps(make_batch("equal", background), rows, room=2 - rank)
        outcome["bare", background] = three_steps(make_batch("equal", background), rows, wrap=False)
    for negative, alpha in alphas.items():
        outcome["signs", negative] = one_step_with_alpha(alpha, SLICES["equal"][rank])
    dist.destroy_process_group()
    return outcome


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory, two_processes: ProcessPoolExecutor) -> list[Outcome]:
    """Results of two real workers, connected by gloo, by rank."""
    folder = tmp_path_factory.mktemp("workers")
    return list(two_processes.map(run_everything, range(2), [folder, folder]))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("slices", SLICES)
def test_two_workers_average_to_one_process(workers: list[Outcome], slices: str, background: bool) -> None:
    """The loss's values, on each worker, and its gradient, averaged as by DistributedDataParallel."""
    expected = loss_and_gradients(make_batch(slices, background), ALL)
    for outcome in workers:
        actual = outcome["loss", slices, background]
        assert actual["values"] == pytest.approx(expected["values"], rel=1e-6)
        torch.testing.assert_close(actual["gradients"], expected["gradients"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("slices", SLICES)
def test_three_steps_on_two_workers_are_those_of_one(workers: list[Outcome], slices: str, background: bool) -> None:
    expected = three_steps(make_batch(slices, background), ALL)
    for outcome in workers:
        assert_same_steps(outcome["steps", slices, background], expected)


@pytest.mark.parametrize("background", [False, True])
def test_memory_running_out_on_one_worker_changes_nothing(workers: list[Outcome], background: bool) -> None:
    expected = three_steps(make_batch("equal", background), ALL)
    for outcome in workers:
        assert_same_steps(outcome["memory", background], expected)
    assert [outcome["memory", background]["parts"] for outcome in workers] == [[2, 2, 2], [1, 1, 1]]


@pytest.mark.parametrize("background", [False, True])
def test_students_need_no_wrapper(workers: list[Outcome], background: bool) -> None:
    expected = three_steps(make_batch("equal", background), ALL)
    for outcome in workers:
        assert_same_steps(outcome["bare", background], expected)


@pytest.mark.parametrize("negative", [False, True])
def test_all_workers_skip_or_none(workers: list[Outcome], negative: bool) -> None:
    """One worker's own total is positive and the other's is not: the batch's total decides for both."""
    first, second = (outcome["signs", negative] for outcome in workers)
    assert first["skipped"] is second["skipped"] is negative
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    moved = any(not torch.equal(first["weights"][n], v) for n, v in snapshot(make_decoder(CONCEPTS)).items())
    assert moved is not negative


def assert_same_steps(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(torch.tensor(actual["values"]), torch.tensor(expected["values"]), rtol=1e-6, atol=1e-6)
    for kind in ("weights", "gradients"):
        torch.testing.assert_close(actual[kind], expected[kind], rtol=0, atol=1e-6)
