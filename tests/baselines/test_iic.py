"""IIC's loss against the published implementation, a transcription of its formula, and results derived by hand."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transfgu.baselines.iic import (
    BLOCK_BYTES,
    Pairs,
    SegmentationNetwork,
    apply_pairs,
    displaced_joint,
    draw_pairs,
    information_loss,
    mutual_information_loss,
    warp,
    with_edges,
)

Reference = Callable[[str], dict[str, np.ndarray]]
IDENTITY = torch.tensor([[1.0, 0, 0], [0, 1, 0]])


def identity(images: int) -> Tensor:
    return IDENTITY.expand(images, 2, 3)


def probabilities(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    logits = 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.softmax(1).to(dtype)


def pair(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return two views with gradients."""
    first, second = (probabilities(*shape, seed=seed + n, dtype=dtype).requires_grad_() for n in (0, 1))
    return first, second


@pytest.mark.parametrize("case", ["collapsed", "uncollapsed"])
def test_agrees_with_the_published_loss(reference: Reference, case: str) -> None:
    arrays = {name.removeprefix("iic/"): array for name, array in reference("iic").items()}
    logits = [torch.from_numpy(arrays[f"logits_{view}"]).requires_grad_() for view in (1, 2)]
    loss = mutual_information_loss(
        logits[0].softmax(1),
        logits[1].softmax(1),
        torch.from_numpy(arrays["affine_2_to_1"]),
        torch.from_numpy(arrays["mask"]),
        weight=float(arrays[f"{case}/lambda"]),
        half_side=int(arrays[f"{case}/half_side"]),
        collapsed=case == "collapsed",
    )
    assert loss.dtype == torch.float32
    # The collapsed loss, 1.5e-4, is what is left of terms of about 1 in single precision.
    np.testing.assert_allclose(loss.item(), arrays[f"{case}/loss"], rtol=1e-4, atol=1e-7)
    for view, gradient in enumerate(torch.autograd.grad(loss, logits), 1):
        # The gradients are about 1e-5, so an absolute tolerance of as much would pass anything.
        np.testing.assert_allclose(gradient, arrays[f"{case}/grad_{view}"], rtol=1e-4, atol=1e-9)


def literal_loss(first: Tensor, second: Tensor, mask: Tensor, weight: float, half_side: int, collapsed: bool) -> Tensor:
    """The formula, displacement by displacement, for views in the same frame."""
    (_, classes, height, width), steps = first.shape, range(-half_side, half_side + 1)
    joints = []
    for down, right in itertools.product(steps, steps):
        joint = first.new_zeros(classes, classes)
        for y, x in itertools.product(range(height), range(width)):
            if 0 <= y + down < height and 0 <= x + right < width:
                one = first[:, :, y + down, x + right] * mask[:, y + down, x + right, None]
                other = second[:, :, y, x] * mask[:, y, x, None]
                joint = joint + one.mT @ other
        joints.append(joint)
    if collapsed:
        joints = [torch.stack(joints).sum(0)]
    losses = []
    for joint in joints:
        if joint.sum() == 0:
            losses.append(joint.sum())
            continue
        joint = joint / (joint.sum().detach() if collapsed else joint.sum())
        joint = (joint + joint.mT) / 2
        rows, columns = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
        losses.append(-(joint * (joint.log() - weight * rows.log() - weight * columns.log())).sum())
    return torch.stack(losses).mean()


@settings(max_examples=12)
@given(
    seed=st.integers(0, 1000),
    images=st.integers(1, 3),
    classes=st.integers(1, 4),
    grid=st.tuples(st.integers(2, 4), st.integers(2, 4)),
    half_side=st.integers(0, 5),
    weight=st.floats(0.5, 2),
    collapsed=st.booleans(),
    some=st.booleans(),
)
def test_is_its_formula(
    seed: int,
    images: int,
    classes: int,
    grid: tuple[int, int],
    half_side: int,
    weight: float,
    collapsed: bool,
    some: bool,
) -> None:
    """Also boxes larger than the image, and masks without a pixel."""
    views = pair(images, classes, *grid, seed=seed)
    mask = (torch.rand(images, *grid, generator=torch.Generator().manual_seed(seed)) < (0.6 if some else 0)).double()
    expected = literal_loss(*views, mask, weight, half_side, collapsed)
    loss = mutual_information_loss(
        *views, identity(images).double(), mask, weight=weight, half_side=half_side, collapsed=collapsed
    )
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    gradients = torch.autograd.grad(expected, views, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(torch.autograd.grad(loss, views), gradients, rtol=1e-7, atol=1e-11)


def test_next_to_nothing_is_not_nothing() -> None:
    """Joint probabilities of 1e-9 in single precision: logarithms are limited at 2e-16 only, as published."""
    logits = torch.tensor([10.0, -10.0])[None, :, None, None] + torch.arange(4.0).reshape(1, 1, 2, 2) / 8
    first, second = (torch.cat([view[:, :1], -view[:, :1]], 1).softmax(1) for view in (logits, logits.flip(3)))
    exact = [view.double().requires_grad_() for view in (first, second)]
    expected = literal_loss(exact[0], exact[1], torch.ones(1, 2, 2).double(), 2, 0, False)
    views = [first.requires_grad_(), second.requires_grad_()]
    loss = mutual_information_loss(views[0], views[1], identity(1), torch.ones(1, 2, 2), half_side=0, weight=2)
    for found, wanted in zip(torch.autograd.grad(loss, views), torch.autograd.grad(expected, exact), strict=True):
        assert wanted.abs().max() > 1
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def one_hot_views(classes: int) -> Tensor:
    """One image of two rows, each with one pixel of each class."""
    return torch.eye(classes)[None, :, None, :].repeat(1, 1, 2, 1)


@pytest.mark.parametrize("classes", [2, 5])
def test_sure_balanced_and_equal_classes_give_all_information_there_is(classes: int) -> None:
    views = one_hot_views(classes)
    loss = mutual_information_loss(views, views, identity(1), torch.ones(1, 2, classes), half_side=0)
    assert loss.item() == pytest.approx(-math.log(classes))
    # H(joint) = log C is taken from lambda times both marginals' entropies.
    heavy = mutual_information_loss(views, views, identity(1), torch.ones(1, 2, classes), half_side=0, weight=1.5)
    assert heavy.item() == pytest.approx(-(2 * 1.5 - 1) * math.log(classes))


def test_independent_views_tell_nothing() -> None:
    first, second = torch.full((1, 3, 4, 4), 1 / 3), probabilities(1, 3, 4, 4, dtype=torch.float32)
    joint = displaced_joint(first, second, identity(1), torch.ones(1, 4, 4), half_side=0)
    # Symmetrised, the marginals are the mean of both, so the loss is not exactly 0 for an unequal second view.
    both = (joint[..., 0, 0] + joint[..., 0, 0].mT) / 2 / joint.sum()
    information = (both * (both / both.sum(0) / both.sum(1, keepdim=True)).log()).sum()
    assert information_loss(joint).item() == pytest.approx(-information.item(), abs=1e-9)
    uniform = mutual_information_loss(first, first, identity(1), torch.ones(1, 4, 4), half_side=2)
    assert uniform.item() == pytest.approx(0, abs=1e-9)


def test_the_affine_map_brings_the_second_view_back() -> None:
    """A mirrored second view, with the mirror as the map, equals the first view twice."""
    view, mask = probabilities(2, 3, 4, 5), torch.ones(2, 4, 5)
    mirror = torch.tensor([[-1.0, 0, 0], [0, 1, 0]], dtype=torch.float64).expand(2, 2, 3)
    plain = mutual_information_loss(view, view, identity(2).double(), mask, half_side=1)
    back = mutual_information_loss(view, view.flip(3), mirror, mask, half_side=1)
    torch.testing.assert_close(back, plain)
    assert mutual_information_loss(view, view.flip(3), identity(2).double(), mask, half_side=1) > plain


def test_displacements_are_counted_where_the_first_view_lies_further_on() -> None:
    """A point at (1, 2) of the first view and at (0, 0) of the second: displaced by 1 down, 2 to the right."""
    first, second = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
    first[0, 0, 1, 2], second[0, 0, 0, 0] = 1, 1
    joint = displaced_joint(first, second, identity(1), torch.ones(1, 3, 3), half_side=2)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    expected[2 + 1, 2 + 2] = 1
    torch.testing.assert_close(joint[0, 0], expected, rtol=0, atol=1e-12)


def test_parts_of_a_batch_add_up() -> None:
    (first, second), mask = pair(5, 4, 6, 6), torch.ones(5, 6, 6)
    whole = displaced_joint(first, second, identity(5).double(), mask, half_side=2)
    parts = [
        displaced_joint(first[rows], second[rows], identity(n).double(), mask[rows], half_side=2)
        for rows, n in ((slice(0, 2), 2), (slice(2, 5), 3))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-12, atol=1e-12)


def test_blocks_of_classes_do_not_matter() -> None:
    views = pair(2, 5, 6, 7)

    def found(block_bytes: int = BLOCK_BYTES) -> tuple[Tensor, ...]:
        mask = torch.ones(2, 6, 7)
        affine = identity(2).double()
        loss = mutual_information_loss(*views, affine, mask, half_side=3, block_bytes=block_bytes)
        return loss, *torch.autograd.grad(loss, views)

    torch.testing.assert_close(found(block_bytes=1), found(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_in_single(dtype: torch.dtype) -> None:
    views = pair(2, 3, 8, 8, dtype=dtype)
    loss = mutual_information_loss(*views, identity(2), torch.ones(2, 8, 8, dtype=torch.bool), half_side=2)
    exact = mutual_information_loss(views[0].float(), views[1].float(), identity(2), torch.ones(2, 8, 8), half_side=2)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, views))


@pytest.mark.parametrize("collapsed", [False, True])
def test_an_empty_mask_has_no_loss_and_no_gradient(collapsed: bool) -> None:
    views = pair(2, 3, 4, 4)
    loss = mutual_information_loss(*views, identity(2).double(), torch.zeros(2, 4, 4), half_side=1, collapsed=collapsed)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, views))


def test_gradient_is_the_slope() -> None:
    views = pair(1, 2, 3, 4)
    turned = torch.tensor([[[0.9, -0.3, 0.1], [0.2, 1.1, 0.0]]], dtype=torch.float64)

    def loss(first: Tensor, second: Tensor) -> Tensor:
        return mutual_information_loss(first, second, turned, torch.ones(1, 3, 4), half_side=1)

    assert torch.autograd.gradcheck(loss, views)


def test_wrong_arguments_are_refused() -> None:
    view, mask = probabilities(2, 3, 4, 4), torch.ones(2, 4, 4)
    with pytest.raises(ValueError, match="the views differ"):
        mutual_information_loss(view, view[:, :2], identity(2), mask)
    with pytest.raises(ValueError, match=r"second_to_first must be \(2, 2, 3\), not \(1, 2, 3\)"):
        mutual_information_loss(view, view, identity(1), mask)
    with pytest.raises(ValueError, match=r"mask must be \(2, 4, 4\), not \(2, 4, 3\)"):
        mutual_information_loss(view, view, identity(2), mask[..., 1:])
    with pytest.raises(ValueError, match="half_side must be 0 pixels or more, not -1"):
        mutual_information_loss(view, view, identity(2), mask, half_side=-1)


def test_agrees_with_a_convolution() -> None:
    """The published method: one view is the kernel of a convolution with the other one."""
    first, second = (probabilities(3, 4, 9, 7, seed=n) for n in (0, 1))
    joint = displaced_joint(first, second, identity(3).double(), torch.ones(3, 9, 7), half_side=2)
    torch.testing.assert_close(joint, F.conv2d(first.movedim(1, 0), second.movedim(1, 0), padding=2))


# ---- network ----

SMALL = (4, 6, 8, 8, 8, 8)


def test_each_head_gives_probabilities_at_the_images_size() -> None:
    network = SegmentationNetwork(3, 9, sub_heads=2, widths=SMALL)
    for head, classes in (("main", 3), ("auxiliary", 9)):
        maps = network(torch.rand(2, 3, 18, 13), head)
        assert [some.shape for some in maps] == [(2, classes, 18, 13)] * 2
        torch.testing.assert_close(maps[0].sum(1), torch.ones(2, 18, 13))
        assert not torch.equal(maps[0], maps[1])


def test_the_published_network_has_its_parameters() -> None:
    """By hand: 9 weights per pair of channels of a 3 x 3 convolution, two numbers of batch norm per channel."""
    network = SegmentationNetwork(15, 45)
    channels = (5, 64, 128, 256, 256, 512, 512)
    trunk = sum(9 * a * b + 2 * b for a, b in itertools.pairwise(channels))
    assert sum(p.numel() for p in network.parameters()) == trunk + 512 * (15 + 45)


def test_class_maps_stay_in_place() -> None:
    """A changed pixel changes only its surroundings: up to 4 + 2 + 2 x (2 + 4) pixels away, plus upsampling's 2."""
    network = SegmentationNetwork(2, 4, widths=SMALL).eval()
    images = torch.full((1, 3, 64, 64), 0.5)
    changed = images.clone()
    changed[0, :, 40, 20] = 1
    moved = (network(images)[0] - network(changed)[0]).abs().sum((0, 1)).detach()
    rows, columns = torch.nonzero(moved > 0, as_tuple=True)
    for found, place in ((rows, 40), (columns, 20)):
        # The images' own edges change nothing: they are the same in both.
        assert abs((found.min() + found.max()).item() / 2 - place) <= 1


def test_edges_by_hand() -> None:
    """A white right half: Sobel's leftward derivative is -4 at the edge, and all others are 0."""
    images = torch.zeros(1, 3, 5, 6)
    images[..., 3:] = 1
    grey = 0.2989 + 0.587 + 0.114
    edges = with_edges(images)
    torch.testing.assert_close(edges[:, :3], images)
    assert edges[0, 3, 2].tolist() == pytest.approx([0, 0, -4 * grey, -4 * grey, 0, 4 * grey], abs=1e-6)
    assert edges[0, 4, 1:-1].abs().max() < 1e-6


def test_a_network_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="1 and 3 classes, 1 sub-heads, 6 widths: give 2 classes or more"):
        SegmentationNetwork(1, 3)


def test_training_raises_the_information() -> None:
    """From almost nothing to more than a third of the maximum, log 2, with both classes in use."""
    torch.manual_seed(0)
    images = torch.zeros(4, 3, 16, 16)
    images[..., 8:] = 1
    images = (images + 0.2 * torch.rand(4, 3, 16, 16)) / 1.2
    network = SegmentationNetwork(2, 4, widths=SMALL)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    mirror, losses = torch.tensor([[-1.0, 0, 0], [0, 1, 0]]).expand(4, 2, 3), []
    for _ in range(25):
        first, second = network(images)[0], network(images.flip(3))[0]
        loss = mutual_information_loss(first, second, mirror, torch.ones(4, 16, 16), half_side=1)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert abs(losses[0]) < 0.01
    assert -math.log(2) <= losses[-1] < -math.log(2) / 3
    assert 0.3 < network(images)[0].argmax(1).float().mean() < 0.7


# ---- pairs ----


def two_colours(size: tuple[int, int]) -> Tensor:
    """Smooth images, which change little when resampled in both directions."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size[0]), torch.linspace(0, 1, size[1]), indexing="ij")
    return (255 * torch.stack((x, y, (x + y) / 2)))[None].round().to(torch.uint8)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_the_second_view_comes_back_into_place(affine: bool, size: tuple[int, int]) -> None:
    images = two_colours(size).expand(8, -1, -1, -1)
    pairs = draw_pairs(range(8), size, seed=1, epoch=0, affine=affine)
    plain = Pairs(
        colours=draw_pairs([], size, seed=1, epoch=0).colours,
        second_to_first=pairs.second_to_first,
        first_to_second=pairs.first_to_second,
    )
    first, second = apply_pairs(images, plain)
    seen = warp(torch.ones_like(second), torch.from_numpy(pairs.second_to_first)) > 0.999
    seen &= warp(warp(torch.ones_like(second), torch.from_numpy(pairs.first_to_second)),
                 torch.from_numpy(pairs.second_to_first)) > 0.999  # fmt: skip
    back = warp(second, torch.from_numpy(pairs.second_to_first))
    assert seen.float().mean() > 0.5
    assert (back - first)[seen].abs().max() < 0.02
    mirrored = [float(np.linalg.det(matrix[:, :2])) < 0 for matrix in pairs.first_to_second]
    assert 0 < sum(mirrored) < 8


def test_rotation_is_in_pixels_whatever_the_sides() -> None:
    """Without a mirror image, shear and scale are small, so a matrix in pixels is almost orthogonal."""
    size = (11, 101)
    sides = np.array([size[1] - 1, size[0] - 1])
    for matrix in draw_pairs(range(20), size, seed=0, epoch=0, affine=True).first_to_second:
        pixels = matrix[:, :2] * sides[:, None] / sides[None]
        assert 0.8 * 0.98 < np.linalg.norm(pixels[:, 0]) < 1.2 * 1.02
        cosine = pixels[:, 0] @ pixels[:, 1] / np.linalg.norm(pixels[:, 0]) / np.linalg.norm(pixels[:, 1])
        assert abs(cosine) <= math.sin(math.radians(10)) + 1e-4


def test_a_pair_does_not_depend_on_its_batch() -> None:
    images = torch.randint(0, 256, (3, 3, 8, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    together = apply_pairs(images, draw_pairs([4, 5, 6], (8, 10), seed=3, epoch=2, affine=True))[1]
    alone = apply_pairs(images[1:2], draw_pairs([5], (8, 10), seed=3, epoch=2, affine=True))[1]
    torch.testing.assert_close(together[1:2], alone)
    other = apply_pairs(images[1:2], draw_pairs([5], (8, 10), seed=3, epoch=3, affine=True))[1]
    assert not torch.equal(other, alone)
