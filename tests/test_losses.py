"""The loss against a literal, pixel-by-pixel transcription of its formulas, and against numbers derived by hand."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transfgu.losses import (
    LEVELS,
    Loss,
    batch_shares,
    bootstrapping_loss,
    diversity,
    loss_share,
    margin_levels,
    pixel_losses,
)

# ---- the formulas, transcribed: Python floats and loops, nothing of torch ----


def softmax(values: list[float]) -> list[float]:
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def argmax(values: list[float]) -> int:
    return max(range(len(values)), key=lambda index: values[index])


@dataclass
class Literal:
    peer: float
    diversity: float
    uncertainty: float
    labels: list[int]


def literal_loss(
    logits: np.ndarray,
    embeddings: np.ndarray,
    maps: np.ndarray,
    teacher: np.ndarray | None,
    alpha: float,
    permutation: list[int],
    threshold: float | None,
) -> Literal:
    peers, uncertainties, labels, cosines = [], [], [], []
    images, concepts, height, width = maps.shape
    for b in range(images):
        low, high = float(maps[b].min()), float(maps[b].max())
        for y, x in itertools.product(range(height), range(width)):
            evidence = [0.0 if high == low else (float(m) - low) / (high - low) for m in maps[b, :, y, x]]
            counted = threshold is None or any(value > 0.1 for value in evidence)
            if threshold is not None:
                evidence = [max(0.0, threshold - max(evidence)), *evidence]
            if teacher is not None:
                opinion = softmax([float(v) for v in teacher[b, :, y, x]])
                evidence = [0.5 * p + 0.5 * m for p, m in zip(opinion, evidence, strict=True)]
            label = argmax(evidence)
            probabilities = softmax([float(v) for v in logits[b, :, y, x]])
            peer = -math.log(probabilities[label])
            if teacher is not None:
                negative = argmax([evidence[c] for c in permutation])
                peer += alpha * math.log(probabilities[negative])
            peers.append(peer)
            labels.append(label)
            if counted:
                foreground = softmax([float(v) for v in logits[b, -concepts:, y, x]])
                largest, *rest = sorted(foreground, reverse=True)
                uncertainties.append(1 - (largest - (rest[0] if rest else 0.0)))
        for first, second in itertools.combinations(embeddings[b], 2):
            cosines.append(float(first @ second))
    return Literal(
        peer=sum(peers) / len(peers),
        diversity=1 + sum(cosines) / len(cosines),
        uncertainty=sum(uncertainties) / len(uncertainties) if uncertainties else 0.0,
        labels=labels,
    )


@dataclass
class Case:
    logits: Tensor
    embeddings: Tensor
    maps: Tensor
    teacher: Tensor
    permutation: Tensor
    threshold: float | None

    def loss(
        self,
        *,
        teacher: bool = True,
        alpha: float = 0.05,
        omega_1: float = 1.0,
        omega_2: float = 0.3,
        certain_share: float = 1,
    ) -> Loss:
        return bootstrapping_loss(
            self.logits,
            self.embeddings,
            self.maps,
            self.teacher if teacher else None,
            omega_1=omega_1,
            omega_2=omega_2,
            alpha=alpha,
            permutation=self.permutation if teacher else None,
            background_threshold=self.threshold,
            certain_share=certain_share,
        )


def make_case(
    seed: int = 0, images: int = 2, concepts: int = 4, grid: tuple[int, int] = (3, 4), background: bool = False
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    classes = concepts + background
    return Case(
        logits=2 * normal(images, classes, *grid),
        embeddings=F.normalize(normal(images, classes, 6), dim=-1),
        # Mostly small: of scaled maps, some pixels stay below 0.1 in all concepts.
        maps=normal(images, concepts, *grid).abs() ** 6,
        teacher=3 * normal(images, classes, *grid),
        permutation=torch.randperm(classes, generator=generator),
        threshold=0.1 if background else None,
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    images=st.integers(1, 3),
    concepts=st.integers(2, 5),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    background=st.booleans(),
    teacher=st.booleans(),
    alpha=st.floats(0.0, 0.5),
)
def test_loss_is_its_formula(
    seed: int, images: int, concepts: int, grid: tuple[int, int], background: bool, teacher: bool, alpha: float
) -> None:
    case = make_case(seed, images, concepts, grid, background)
    expected = literal_loss(
        case.logits.numpy(),
        case.embeddings.numpy(),
        case.maps.numpy(),
        case.teacher.numpy() if teacher else None,
        alpha,
        case.permutation.tolist(),
        case.threshold,
    )
    loss = case.loss(teacher=teacher, alpha=alpha, omega_1=0.7, omega_2=0.2)
    assert loss.labels.flatten().tolist() == expected.labels
    assert loss.peer.item() == pytest.approx(expected.peer, rel=1e-6)
    assert loss.diversity.item() == pytest.approx(expected.diversity, rel=1e-6, abs=1e-6)
    assert loss.uncertainty.item() == pytest.approx(expected.uncertainty, rel=1e-6)
    total = expected.peer + 0.7 * expected.diversity + 0.2 * expected.uncertainty
    assert loss.total.item() == pytest.approx(total, rel=1e-6)


# ---- by hand ----


def one_pixel(values: list[float]) -> Tensor:
    return torch.tensor(values).reshape(1, -1, 1, 1)


def test_peer_by_hand() -> None:
    """P = (3/4, 1/4); maps say class 0; the teacher, class 1; swapped, the negative label is class 0."""
    logits = one_pixel([math.log(3), 0.0])
    maps, swap = one_pixel([5.0, 2.0]), [1, 0]
    warm_up = pixel_losses(logits, maps, alpha=0.1)
    assert warm_up.labels.item() == 0
    assert warm_up.peer.item() == pytest.approx(-math.log(3 / 4))
    # The maps' evidence is scaled to (1, 0), so the halves give (0.5 + 0.5 p, 0.5 - 0.5 p): class 0 wins yet.
    taught = pixel_losses(logits, maps, one_pixel([0.0, 5.0]), alpha=0.1, permutation=swap)
    assert taught.labels.item() == 0
    assert taught.peer.item() == pytest.approx(-math.log(3 / 4) + 0.1 * math.log(1 / 4))
    # With constant maps the teacher alone decides: label 1, and negative label 0.
    alone = pixel_losses(logits, one_pixel([2.0, 2.0]), one_pixel([0.0, 20.0]), alpha=0.1, permutation=swap)
    assert alone.labels.item() == 1
    assert alone.peer.item() == pytest.approx(-math.log(1 / 4) + 0.1 * math.log(3 / 4))


def test_negative_label_without_a_change_of_classes_weakens_the_positive() -> None:
    case = make_case(background=True)
    case.permutation = torch.arange(5)
    plain = F.cross_entropy(case.logits, case.loss().labels)
    torch.testing.assert_close(case.loss(alpha=0.25).peer, 0.75 * plain)


def test_background_by_hand() -> None:
    """Scaled maps (0 0.04 1): background gets 0.1, 0.06 and 0; only the last pixel is foreground."""
    maps = torch.tensor([[[[0.0, 0.04, 1.0]], [[0.0, 0.0, 0.5]]]])
    logits = torch.tensor([[[[9.0, 9.0, 9.0]], [[0.0, 0.0, math.log(4)]], [[0.0, 0.0, 0.0]]]])
    pixels = pixel_losses(logits, maps, alpha=0.0, background_threshold=0.1)
    assert pixels.labels.flatten().tolist() == [0, 0, 1]
    assert pixels.counted.flatten().tolist() == [False, False, True]
    # There, foreground classes have 4/5 and 1/5, whatever the background's logit.
    embeddings = torch.eye(3)[None]
    loss = bootstrapping_loss(logits, embeddings, maps, omega_1=0, omega_2=1, alpha=0, background_threshold=0.1)
    assert loss.uncertainty.item() == pytest.approx(1 - (4 / 5 - 1 / 5))


def test_background_threshold_moves_labels_but_not_what_counts() -> None:
    maps = torch.tensor([[[[0.0, 0.3, 1.0]]]])
    logits = torch.zeros(1, 2, 1, 3)
    pixels = pixel_losses(logits, maps, alpha=0.0, background_threshold=0.7)
    assert pixels.labels.flatten().tolist() == [0, 0, 1]
    assert pixels.counted.flatten().tolist() == [False, True, True]


def test_single_concept_with_background() -> None:
    """With one foreground class there is no uncertainty."""
    case = make_case(concepts=1, background=True)
    assert case.loss().uncertainty.item() == 0
    assert torch.isfinite(case.loss().total)


@pytest.mark.parametrize("background", [False, True])
def test_constant_maps_scale_to_zeros(background: bool) -> None:
    """Labels are then those of the first class (of the background, if there is one), and no pixel is foreground."""
    case = make_case(background=background)
    case.maps = torch.full_like(case.maps, 0.7)
    case.logits.requires_grad_()
    loss = case.loss(teacher=False)
    assert not loss.labels.any()
    if background:
        assert loss.uncertainty.item() == 0
    (gradient,) = torch.autograd.grad(loss.uncertainty, case.logits)
    assert torch.isfinite(gradient).all()
    assert gradient.any() != background


@pytest.mark.parametrize(
    ("embeddings", "expected"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], 1.0),
        ([[1.0, 0.0], [1.0, 0.0]], 2.0),
        ([[1.0, 0.0], [-1.0, 0.0]], 0.0),
        ([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], 2 / 3),
    ],
)
def test_diversity_by_hand(embeddings: list[list[float]], expected: float) -> None:
    assert diversity(torch.tensor([embeddings])).item() == pytest.approx(expected, abs=1e-6)


def test_diversity_has_the_gradient_of_its_pairs() -> None:
    embeddings = make_case(concepts=5).embeddings.requires_grad_()
    first, second = torch.triu_indices(5, 5, 1)
    pairs = 1 + (embeddings @ embeddings.mT)[:, first, second].mean()
    expected = torch.autograd.grad(pairs, embeddings)
    torch.testing.assert_close(torch.autograd.grad(diversity(embeddings).mean(), embeddings), expected)


# ---- what may not matter ----


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("teacher", [False, True])
def test_scale_and_offset_of_an_image_s_maps_do_not_matter(background: bool, teacher: bool) -> None:
    case = make_case(background=background)
    before = case.loss(teacher=teacher)
    case.maps = case.maps * torch.tensor([3.0, 0.01]).reshape(2, 1, 1, 1) + 5
    after = case.loss(teacher=teacher)
    assert torch.equal(before.labels, after.labels)
    torch.testing.assert_close(before.total, after.total)


def test_names_of_classes_do_not_matter() -> None:
    """Relabelling all inputs relabels the labels; the permutation follows as a map between classes."""
    case = make_case()
    names = torch.tensor([2, 0, 3, 1])
    place = names.argsort()
    before = case.loss()
    renamed = Case(
        case.logits[:, names],
        case.embeddings[:, names],
        case.maps[:, names],
        case.teacher[:, names],
        place[case.permutation[names]],
        None,
    )
    after = renamed.loss()
    assert torch.equal(names[after.labels], before.labels)
    torch.testing.assert_close(after.total, before.total)


@pytest.mark.parametrize("share", [1, 0.4])
@pytest.mark.parametrize("background", [False, True])
def test_parts_of_a_batch_add_up(background: bool, share: float) -> None:
    """With weights of the whole batch, a split 1 + 2 images gives its loss and gradient, wherever foreground is."""
    case = make_case(images=3, background=background)
    case.logits.requires_grad_()
    whole = case.loss(certain_share=share)
    (expected,) = torch.autograd.grad(whole.total, case.logits)
    shares = batch_shares(case.maps, case.threshold, share)
    totals = []
    for rows in (slice(0, 1), slice(1, 3)):
        part = loss_share(
            shares,
            case.logits[rows],
            case.embeddings[rows],
            case.maps[rows],
            case.teacher[rows],
            omega_1=1.0,
            omega_2=0.3,
            alpha=0.05,
            permutation=case.permutation,
            background_threshold=case.threshold,
        )
        totals.append(part.total)
    torch.testing.assert_close(sum(totals), whole.total)
    torch.testing.assert_close(torch.autograd.grad(totals, case.logits), (expected,))


# Three images of 1 x 2 pixels and two concepts, as image, concept, row, column, each scaled to [0, 1]: leads of concept
# 0 are 1, 1/4, 1/8 and 1/2, those of concept 1 are 1 and 3/4.
LEADS = torch.tensor([[[[1.0, 0.75]], [[0.0, 0.5]]], [[[0.0, 0.625]], [[1.0, 0.5]]], [[[0.5, 0.25]], [[0.0, 1.0]]]])


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (0.1, [[True, False], [True, False], [False, False]]),
        (0.5, [[True, False], [True, False], [True, False]]),
        (0.51, [[True, True], [True, False], [True, True]]),
        (1.0, [[True, True], [True, True], [True, True]]),
    ],
)
def test_the_most_certain_pixels_of_each_class_by_hand(share: float, kept: list[list[bool]]) -> None:
    """At least one pixel of each class; the peer loss is the mean over the certain ones."""
    logits = torch.randn(3, 2, 1, 2, generator=torch.Generator().manual_seed(0))
    embeddings = F.normalize(torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    loss = bootstrapping_loss(logits, embeddings, LEADS, omega_1=1, omega_2=0.3, alpha=0, certain_share=share)
    labels = torch.tensor([[0, 0], [1, 0], [0, 1]])
    each = F.cross_entropy(logits[:, :, 0], labels, reduction="none")
    torch.testing.assert_close(loss.peer, each[torch.tensor(kept)].mean())
    everything = bootstrapping_loss(logits, embeddings, LEADS, omega_1=1, omega_2=0.3, alpha=0)
    assert loss.uncertainty == everything.uncertainty
    assert loss.diversity == everything.diversity


def test_levels_follow_the_lead() -> None:
    """A difference of half a step of 1/128 is not resolved, a whole step is; nothing below 2^-24 is."""
    leads = torch.tensor([0.0, 2.0**-25, 2.0**-24 * (1 + 1 / 128), 0.5, 0.5 * (1 + 1 / 256), 0.5 * (1 + 1 / 128), 1.0])
    evidence = torch.stack([torch.zeros_like(leads), leads])[None, :, None]  # (1, 2, 1, 7)
    labels, levels = margin_levels(evidence)
    assert labels[0, 0, 1:].eq(1).all()
    first = LEVELS - 1 - 128
    assert levels.flatten().tolist() == [0, 0, 1, first, first, first + 1, LEVELS - 1]


def test_labels_carry_no_gradient_to_teacher_or_maps() -> None:
    case = make_case()
    case.teacher.requires_grad_()
    case.maps.requires_grad_()
    case.logits.requires_grad_()
    gradients = torch.autograd.grad(case.loss().total, (case.teacher, case.maps), allow_unused=True)
    assert [gradient is None for gradient in gradients] == [True, True]


def test_half_precision_logits_are_taken_in_single() -> None:
    """A million pixels' sum overflows float16; the mean must not."""
    logits = torch.zeros(1, 2, 512, 512, dtype=torch.float16)
    maps = torch.rand(1, 2, 512, 512, generator=torch.Generator().manual_seed(0)).half()
    embeddings = torch.eye(2)[None]
    loss = bootstrapping_loss(logits, embeddings, maps, omega_1=1, omega_2=0.3, alpha=0)
    assert loss.peer.item() == pytest.approx(math.log(2), rel=1e-5)
    assert loss.uncertainty.item() == pytest.approx(1)


@pytest.mark.parametrize("as_type", [torch.tensor, np.array, list])
def test_permutation_of_any_kind(as_type: type) -> None:
    case = make_case()
    expected = case.loss().total
    case.permutation = as_type(case.permutation.tolist())
    assert torch.equal(case.loss().total, expected)


def test_wrong_arguments_are_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="5 classes need 5 maps per image, not 4"):
        pixel_losses(torch.zeros(2, 5, 3, 4), case.maps, alpha=0)
    with pytest.raises(ValueError, match="4 classes need 3 maps per image, not 4"):
        pixel_losses(case.logits, case.maps, alpha=0, background_threshold=0.1)
    with pytest.raises(ValueError, match="a teacher needs the permutation"):
        pixel_losses(case.logits, case.maps, case.teacher, alpha=0)
