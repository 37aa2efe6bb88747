"""Pretraining's parts, each against values derived by hand or a property that must hold."""

import math
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tests.refusals import refused
from transfgu.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder
from transfgu.pretraining import objective
from transfgu.pretraining.objective import StepSchedule, Student, Teacher, Views
from transfgu.pretraining.recipe import VIEWS, PretrainingRecipe

SMALL = PretrainingRecipe(
    width=12,
    depth=2,
    heads=3,
    patch_size=4,
    global_size=8,
    local_size=4,
    local_views=2,
    prototypes=5,
    hidden=8,
    bottleneck=4,
    batch_size=16,
    steps=10,
    warmup=2,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_encoder() -> VisionTransformer:
    torch.manual_seed(0)
    encoder = objective.new_encoder(SMALL)
    for parameter in encoder.parameters():  # far from the initial values, at which attention is all but uniform
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


# ---- Sinkhorn-Knopp


def test_sinkhorn_of_two_samples_by_hand() -> None:
    """Sample 0 prefers prototype 0 by a factor 3, sample 1 is indifferent: shares [[3/4, 1/4], [1/2, 1/2]].

    Columns to 1 gives [[3/5, 1/3], [2/5, 2/3]], then rows to 1 gives [[9/14, 5/14], [3/8, 5/8]].
    """
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    expected = torch.tensor([[9 / 14, 5 / 14], [3 / 8, 5 / 8]])
    torch.testing.assert_close(objective.sinkhorn(logits, 1.0, 1), expected)
    torch.testing.assert_close(objective.sinkhorn(logits * 0.1, 0.1, 1), expected)


def test_sinkhorn_converges_to_equal_columns() -> None:
    """For [[3, 1], [1, 1]] the doubly stochastic scaling is [[a, 1 - a], [1 - a, a]], a^2 / (1 - a)^2 = 3."""
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    a = math.sqrt(3) / (1 + math.sqrt(3))
    torch.testing.assert_close(objective.sinkhorn(logits, 1.0, 50), torch.tensor([[a, 1 - a], [1 - a, a]]))


def test_sinkhorn_survives_sharp_logits() -> None:
    shares = objective.sinkhorn(torch.tensor([[1.0, -1.0], [1.0, -1.0]]), 0.001, 3)
    assert shares.isfinite().all()
    torch.testing.assert_close(shares.sum(1), torch.ones(2))


# ---- mosaics


def test_mosaic_places_tiles_and_says_where() -> None:
    """Four 8 x 8 views, each of one value, patches of 4: a grid of 4 x 4 patches, in 2 x 2 tiles."""
    views = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8)
    mosaics, inside = objective.mosaic(views, 2, 4)
    assert mosaics.shape == (1, 3, 16, 16)
    expected = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])
    assert (mosaics[0, 0, ::4, ::4] == expected).all()
    assert (inside.int().argmax(0).view(4, 4) == expected).all()
    assert (inside.sum(0) == 1).all()


def test_rolled_mosaic_keeps_tiles_and_places_together() -> None:
    views = torch.arange(16.0)[:, None, None, None].expand(16, 3, 8, 8)
    mosaics, inside = objective.mosaic(views, 2, 4, (1, 3))
    assert mosaics.shape[0] == 4
    for number, image in enumerate(mosaics):
        by_patch = image[0, ::4, ::4].flatten()
        for tile in range(4):
            assert (by_patch[inside[tile]] == 4 * number + tile).all()
    assert mosaics[0, 0, 0, 0] == 2  # what was in row 3 and column 1


def test_attention_held_to_a_tile_sees_that_tile_alone() -> None:
    """With one block, tokens before it are local: changing other tiles must not change the feature at all."""
    torch.manual_seed(0)
    encoder = objective.new_encoder(PretrainingRecipe(**{**vars(SMALL), "depth": 1}))
    views = torch.randn(4, 3, 8, 8, generator=generator())
    mosaics, inside = objective.mosaic(views, 2, 4)
    hard = torch.zeros(inside.shape).masked_fill(~inside, -torch.inf)
    bias = F.pad(hard, (1, 0))[None]
    before = objective.class_features(encoder, mosaics, bias=bias)[0]
    changed = views.clone()
    changed[0] += 1
    after = objective.class_features(encoder, objective.mosaic(changed, 2, 4)[0], bias=bias)[0]
    assert (after[1:] == before[1:]).all()
    assert not torch.allclose(after[0], before[0])


def test_attention_bias_is_hard_or_soft_outside_and_nothing_inside() -> None:
    _, inside = objective.mosaic(torch.zeros(4, 3, 8, 8), 2, 4)
    bias = objective.attention_bias(inside, 50, generator())
    assert bias.shape == (50, 4, 17)
    assert (bias[:, :, 0] == 0).all()
    places = bias[:, :, 1:]
    assert (places[:, inside] == 0).all()
    outside = places.transpose(1, 2)[:, ~inside.T]
    hard = outside.isinf()
    assert 0.35 < hard.float().mean() < 0.65
    assert ((outside[~hard] <= -1) & (outside[~hard] >= -4)).all()  # four tiles: log((4 - 1) / 3) = 0 more


# ---- the encoder


def test_class_features_are_the_encoders_class_tokens() -> None:
    encoder = small_encoder()
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    reader = Encoder.from_state_dict(state, patch_size=4, num_heads=3)
    images = torch.randn(2, 3, 8, 8, generator=generator())
    features = objective.class_features(encoder, images)[:, 0]
    torch.testing.assert_close(features, reader(images).cls, rtol=1e-4, atol=1e-5)


def test_forgetting_takes_away_what_earlier_blocks_put_into_the_class_token() -> None:
    encoder = small_encoder()
    images = torch.randn(2, 3, 8, 8, generator=generator())
    kept, forgotten = torch.tensor([False, False]), torch.tensor([True, False])
    plain = objective.class_features(encoder, images)
    torch.testing.assert_close(objective.class_features(encoder, images, forgotten=kept), plain)
    half = objective.class_features(encoder, images, forgotten=forgotten)
    assert not torch.allclose(half[0], plain[0])
    torch.testing.assert_close(half[1], plain[1])


def test_teacher_follows_by_its_momentum() -> None:
    student = Student(SMALL)
    teacher = Teacher(student)
    before = {name: p.clone() for name, p in teacher.average.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    teacher.follow(student, 0.75)
    for name, parameter in teacher.average.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.25)
        assert not parameter.requires_grad
    assert not any(name.startswith("head") for name in objective.encoder_state(teacher))


# ---- views


def test_views_repeat_with_their_generator_and_cover_all_sizes() -> None:
    images = torch.rand(16, 3, 20, 20, generator=generator())
    first, again = (Views.draw(images, SMALL, generator(5)) for _ in range(2))
    assert first.globals_[0].shape == (16, 3, 8, 8)
    assert len(first.locals_) == 2
    assert first.locals_[0].shape == (16, 3, 4, 4)
    assert (first.globals_[1] == again.globals_[1]).all()
    assert not (first.globals_[0] == first.globals_[1]).all()


def test_a_view_of_the_whole_grey_image_stays_grey() -> None:
    """Neither hue nor saturation can change grey; brightness and contrast leave a constant image constant."""
    images = torch.full((8, 3, 16, 16), 0.5)
    views = objective.draw_views(images, 8, (1.0, 1.0), SMALL, generator())
    mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
    deviation = torch.tensor(IMAGENET_STD)[:, None, None]
    pixels = views * deviation + mean
    torch.testing.assert_close(pixels, pixels[:, :1, :1, :1].expand_as(pixels), atol=2e-3, rtol=0)
    assert 0.5 * 0.6 <= pixels.min() <= pixels.max() <= 0.5 * 1.4
    assert pixels.std() > 0.05


def test_hues_of_photographs_turn_a_little() -> None:
    """Sky blue, (0.3, 0.5, 0.9): in drawn views any channel may lead; within 36 degrees only blue, or none if grey."""
    images = torch.tensor([0.3, 0.5, 0.9])[:, None, None].expand(200, 3, 4, 4)
    mean, deviation = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)

    def leads(recipe: PretrainingRecipe) -> Tensor:
        pixels = objective.draw_views(images, 4, (1.0, 1.0), recipe, generator())[:, :, 0, 0] * deviation + mean
        return pixels.argmax(1)[pixels.amax(1) - pixels.amin(1) > 0.01].bincount(minlength=3)

    assert (leads(SMALL) > 10).all()
    photographs = leads(PretrainingRecipe(**{**vars(SMALL), **VIEWS["photographs"], "grey_share": 0.0}))
    assert photographs[2] == photographs.sum() > 150


def test_grey_share_of_one_leaves_no_colour() -> None:
    recipe = PretrainingRecipe(**{**vars(SMALL), "grey_share": 1.0})
    images = torch.rand(8, 3, 4, 4, generator=generator())
    views = objective.draw_views(images, 4, (1.0, 1.0), recipe, generator(1))
    pixels = views * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    torch.testing.assert_close(pixels, pixels[:, :1].expand_as(pixels), atol=4e-3, rtol=0)


def test_colours_turn_by_a_matrix_that_undoes_itself() -> None:
    turn = torch.tensor([0.7, -0.7])
    there, back = objective.colour_matrix(turn, torch.ones(2))
    torch.testing.assert_close(there @ back, torch.eye(3), atol=1e-5, rtol=0)
    grey = objective.colour_matrix(turn, torch.zeros(2))[0]
    torch.testing.assert_close(grey, torch.tensor([0.299, 0.587, 0.114]).expand(3, 3), atol=2e-3, rtol=0)


# ---- the objective


def test_contrast_by_hand() -> None:
    """Two images, two views: own pairs agree fully, others are orthogonal; t = 1. Each row: log(1 + e^-1)."""
    unit = torch.eye(2).expand(2, 2, 2)
    expected = torch.tensor(math.log(1 + math.exp(-1)))
    torch.testing.assert_close(objective.contrast(unit, 1.0), expected)


def test_clustering_compares_each_view_with_the_other_views_target() -> None:
    """One image, two views, two prototypes; the teacher is certain of 0 for view 0, of 1 for view 1.

    The student gives view 0 cosines (0, 1) and view 1 (1, 0), t = 1: each agrees with the *other* view's target,
    at a loss of log(1 + e^-1); against its own it would be 1 more.
    """
    targets = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    cosines = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])
    expected = torch.tensor(math.log(1 + math.exp(-1)))
    torch.testing.assert_close(objective.clustering(cosines, targets, 1.0), expected)


def test_a_local_view_is_compared_with_both_targets() -> None:
    targets = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    cosines = torch.zeros(3, 1, 2)
    torch.testing.assert_close(objective.clustering(cosines, targets, 1.0), torch.tensor(math.log(2)))


def test_schedule_at_its_landmarks() -> None:
    recipe = PretrainingRecipe(steps=100, warmup=10, clustering_starts=0.1, clustering_full=0.3, learning_rate=1.0)
    first, middle, last = (StepSchedule.at(step, recipe) for step in (0, 50, 100))
    assert first.learning_rate == 0
    assert middle.learning_rate == pytest.approx(0.98 * 0.5 + 0.02)
    assert last.learning_rate == pytest.approx(0.02)
    assert (first.clustering_weight, middle.clustering_weight) == (0, 1)
    assert StepSchedule.at(20, recipe).clustering_weight == pytest.approx(0.5)
    assert (first.train_prototypes, middle.train_prototypes) == (False, True)
    assert [first.teacher_momentum, last.teacher_momentum] == pytest.approx([0.99, 1])
    assert [first.weight_decay, last.weight_decay] == pytest.approx([0.04, 0.2])


def test_neighbours_vote() -> None:
    """Two distant clusters, each of one class except for one stray sample in the half that searches."""
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]).repeat(2, 1)
    classes = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1])
    assert objective.nearest_neighbour_accuracy(features, classes, 2) == 0.75


def test_steps_on_the_same_views_lower_the_loss() -> None:
    torch.manual_seed(0)
    recipe = PretrainingRecipe(**{**vars(SMALL), "clustering_starts": 0.0, "learning_rate": 4e-3})
    student = Student(recipe)
    teacher, optimizer = Teacher(student), objective.new_optimizer(student)
    views = Views.draw(torch.rand(16, 3, 16, 16, generator=generator()), recipe, generator())
    losses = []
    for _ in range(6):
        now = StepSchedule.at(5, recipe)
        objective.apply_schedule(optimizer, now)
        unit, cosines = student(views, generator())
        loss = objective.pretraining_loss(unit, cosines, teacher(views), now.clustering_weight, recipe)
        optimizer.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.total.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize(
    ("wrong", "refusal"),
    [
        ({"global_size": 9}, "image-size global_size 9"),
        ({"width": 10}, "heads-mismatch 10"),
        ({"batch_size": 24}, "batch-size 24"),
        ({"local_mosaic": 5}, "batch-size 25"),
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong: dict[str, int], refusal: str) -> None:
    with refused(refusal):
        PretrainingRecipe(**{**vars(SMALL), **wrong})


# ---- several workers


def slices() -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors, cosines and the teacher's cosines of a global batch of four images."""
    unit = F.normalize(torch.randn(3, 4, 6, generator=generator(1)), dim=-1)
    return unit, torch.randn(3, 4, 5, generator=generator(2)), torch.randn(2, 4, 5, generator=generator(3))


def loss_and_gradients(part: slice) -> tuple[Tensor, Tensor]:
    unit, cosines, teacher = (t[:, part].clone() for t in slices())
    unit.requires_grad_()
    cosines.requires_grad_()
    loss = objective.pretraining_loss(unit, cosines, teacher, 0.7, SMALL)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert unit.grad is not None
    assert cosines.grad is not None
    return unit.grad, cosines.grad


def gradients_of_a_worker(rank: int, folder: Path) -> tuple[Tensor, Tensor]:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    gradients = loss_and_gradients(slice(2 * rank, 2 * rank + 2))
    dist.destroy_process_group()
    return gradients


def test_two_workers_average_gradient_is_that_of_the_whole_batch(
    tmp_path: Path, two_processes: ProcessPoolExecutor
) -> None:
    whole = loss_and_gradients(slice(0, 4))
    parts = list(two_processes.map(gradients_of_a_worker, range(2), [tmp_path, tmp_path]))
    for number, expected in enumerate(whole):
        # Each worker's gradient concerns its own images; DistributedDataParallel halves the sum over both.
        averaged = torch.cat([part[number] for part in parts], 1) / 2
        torch.testing.assert_close(averaged, expected, rtol=1e-4, atol=1e-6)
