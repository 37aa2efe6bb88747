"""Every method of comparison in the trainer: alone, with two workers, and resumed from a checkpoint."""

from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.baselines.learning import FIELDS, IMAGES, SIDE, inputs, make, recipe_of, run_epoch, trained
from transfgu.baselines.optimisation import SharedBatchNorm2d
from transfgu.inference.averaging import averaged_logits
from transfgu.learner import Learner
from transfgu.methods import METHODS
from transfgu.recipe import EvaluationRecipe, Recipe
from transfgu.training import state as states
from transfgu.training.state import State
from transfgu.workers import differentiable_sum, gather_rows

Outcome = dict[str, tuple[dict[str, Tensor], list[dict[str, Any]]]]


def one_epoch(method: str) -> Recipe:
    """One epoch only, because K-Means of the next one would start from features that differ in the last bit."""
    return recipe_of(method, **({} if method == "token-kmeans" else {"epochs": 1}))


def run_all(rank: int, folder: str) -> Outcome:
    """Train every method as one of two workers."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    try:
        return {method: trained(one_epoch(method), rank, 2) for method in FIELDS}
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory, two_processes: ProcessPoolExecutor) -> list[Outcome]:
    folder = str(tmp_path_factory.mktemp("group"))
    return list(two_processes.map(run_all, range(2), [folder, folder]))


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], within: float) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=within, atol=within, msg=f"{name} differs")


@pytest.mark.parametrize("method", FIELDS)
def test_two_workers_train_as_one_does(by_two: list[Outcome], method: str) -> None:
    weights, rows = trained(one_epoch(method))
    for outcome in by_two:
        found, its = outcome[method]
        # Prototypes of an untrained network are nearly the same: K-Means may group them by their last bits.
        skipped = ("things",) if method == "maskcontrast" else ()
        kept, wanted_weights = ({n: t for n, t in w.items() if n not in skipped} for w in (found, weights))
        assert_close(kept, wanted_weights, 1e-5)
        for row, wanted in zip(its, rows, strict=True):
            assert row == pytest.approx(wanted, abs=1e-5)


def state_of(learner: Learner) -> State:
    return State(student=learner.network, optimiser=learner.optimiser, teacher=learner.teacher)


@pytest.mark.parametrize("method", [name for name in FIELDS if name != "token-kmeans"])
def test_a_training_that_is_begun_again_ends_as_if_nothing_had_been(method: str, tmp_path: Path) -> None:
    recipe = recipe_of(method)
    undisturbed = make(recipe)
    first = run_epoch(recipe, undisturbed, 0)
    state_of(undisturbed).snapshot({}).save(tmp_path)
    assert first["total"] == first["total"]
    row = run_epoch(recipe, undisturbed, 1)
    again = make(recipe)
    state = state_of(again)
    state.take(*states.read(tmp_path, torch.device("cpu")))
    again.teacher = state.teacher
    assert run_epoch(recipe, again, 1) == pytest.approx(row, abs=1e-7)
    assert_close(again.network.state_dict(), undisturbed.network.state_dict(), 1e-7)


@pytest.mark.parametrize("method", FIELDS)
def test_a_model_is_read_as_it_was_trained(method: str) -> None:
    recipe = recipe_of(method)
    learner = make(recipe)
    run_epoch(recipe, learner, 0)
    learner.network.eval()
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (read,) = METHODS[method].load("model")(recipe, [learner.model.state_dict()], torch.device("cpu"))
    with torch.no_grad():
        wanted = learner.model.logits(learner.model.frozen(images), (SIDE, SIDE))
        found = read.logits(read.frozen(images), (SIDE, SIDE))
    assert found.shape[:2] == (2, recipe.classes)
    torch.testing.assert_close(found, wanted)
    assert found.std() > 0
    # Averaged over the sizes and mirror images of the recipe, it is of the finest size.
    how = EvaluationRecipe(scales=(0.5, 1.0), flip=True)
    (logits,) = averaged_logits([read], images, how)
    assert logits.shape[:2] == (2, recipe.classes)
    torch.testing.assert_close(averaged_logits([read], images.flip(3), how)[0], logits.flip(3), rtol=1e-3, atol=1e-3)


def test_iic_trains_its_heads_in_turns() -> None:
    recipe = recipe_of("iic")
    learner = make(recipe)
    before = {name: tensor.clone() for name, tensor in learner.network.state_dict().items()}
    assert run_epoch(recipe, learner, 0)["head"] == "main"
    after = learner.network.state_dict()
    moved = {name.split(".")[1] for name in before if name.startswith("heads") and not before[name].equal(after[name])}
    assert moved == {"main"}
    assert run_epoch(recipe, learner, 1)["head"] == "auxiliary"


def test_maskcontrast_tells_things_from_stuff() -> None:
    """By hand: the object logit is 3 in the left half and -3 in the right half, embeddings are unit vectors."""
    recipe = recipe_of("maskcontrast")
    model = make(recipe).model
    network = model.network  # type: ignore[attr-defined]
    network.things[:] = torch.eye(8)[:2]
    network.stuff[:] = torch.eye(8)[2:4]
    embeddings = torch.zeros(1, 8, 2, 4)
    embeddings[:, 1, :, :2] = 1
    embeddings[:, 2, 0, 2:] = 1
    embeddings[:, 3, 1, 2:] = 1
    objects = torch.tensor([3.0, 3, -3, -3]).expand(1, 2, 4)
    network.forward = lambda _: (embeddings, objects)
    logits = model.logits(torch.zeros(1, 3, 2, 4), (2, 4))
    assert logits.argmax(1).tolist() == [[[1, 1, 2, 2], [1, 1, 3, 3]]]
    assert logits[0, :, 0, 0].tolist() == [2, 3, -3, -3]


def test_token_kmeans_is_kmeans_over_all_tokens() -> None:
    recipe = recipe_of("token-kmeans")
    learner = make(recipe)
    row = run_epoch(recipe, learner, 0)
    tokens, _ = inputs(recipe, learner)
    assert tokens.shape[:2] == (IMAGES, (SIDE // 8) ** 2)
    centroids = learner.network.state_dict()["centroids"]
    distances = torch.cdist(tokens.flatten(0, 1), centroids).square().amin(1)
    assert row["total"] == pytest.approx(distances.mean().item(), rel=1e-4)
    logits = learner.model.logits(tokens, (SIDE, SIDE))
    nearest = torch.cdist(tokens.flatten(0, 1), centroids).argmin(1)
    assert torch.equal(logits.argmax(1).flatten(), nearest)


def shared_norm(rank: int, folder: str) -> list[Tensor]:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/norm", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        images, norm = example()
        mine = images[rank * 3 :].clone().requires_grad_() if rank else images[:3].clone().requires_grad_()
        made = norm(mine)
        ((made**3).sum()).backward()
        assert mine.grad is not None
        total = differentiable_sum(made.sum())
        rows = gather_rows(made.detach()[:, 0, 0, 0], torch.arange(len(made)).numpy() * 2 + rank)
        return [made.detach(), mine.grad, norm.running_mean, norm.running_var, total.detach(), rows]
    finally:
        dist.destroy_process_group()


def example() -> tuple[Tensor, SharedBatchNorm2d]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 2, 3, 4, generator=generator) * 3 + 1
    norm = SharedBatchNorm2d(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 0.5]))
        norm.bias.copy_(torch.tensor([-1.0, 1.0]))
    return images, norm


def test_batch_norm_is_that_of_the_whole_batch(two_processes: ProcessPoolExecutor, tmp_path: Path) -> None:
    parts = list(two_processes.map(shared_norm, range(2), [str(tmp_path)] * 2))
    images, norm = example()
    images.requires_grad_()
    made = norm(images)
    ((made**3).sum()).backward()
    assert images.grad is not None
    for place, wanted in enumerate((made.detach(), images.grad)):
        torch.testing.assert_close(torch.cat([part[place] for part in parts]), wanted, rtol=1e-5, atol=1e-5)
    for part in parts:
        torch.testing.assert_close(part[2], norm.running_mean)
        torch.testing.assert_close(part[3], norm.running_var)
        torch.testing.assert_close(part[4], made.detach().sum(), rtol=1e-4, atol=1e-4)
        # Keys 0 2 4 of the first worker, 1 3 of the second.
        torch.testing.assert_close(part[5], made.detach()[[0, 3, 1, 4, 2], 0, 0, 0], rtol=1e-5, atol=1e-5)
