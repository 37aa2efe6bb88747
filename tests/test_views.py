"""Training views: what they depend on, their parts against torchvision one image at a time, and their statistics."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as T

from transfgu.encoder import IMAGENET_MEAN, IMAGENET_STD, normalise
from transfgu.views import Views, apply_views, crop_views, draw_views

SIZE = (32, 48)


def batch(count: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, *SIZE), generator=generator, dtype=torch.uint8)
    return images, torch.rand(count, classes, SIZE[0] // 8, SIZE[1] // 8, generator=generator)


def plain(count: int, **changes: object) -> Views:
    """Views that show the whole unchanged image, except for `changes`."""
    views = Views(
        jitter=np.zeros(count, bool),
        order=np.tile(np.arange(4), (count, 1)),
        factors=np.tile([1.0, 1.0, 1.0, 0.0], (count, 1)),
        grey=np.zeros(count, bool),
        blur=np.zeros(count, bool),
        sigma=np.ones(count),
        boxes=np.tile([0, SIZE[0], 0, SIZE[1]], (count, 1)),
        flip=np.zeros(count, bool),
    )
    return dataclasses.replace(views, **changes)  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)
@given(
    samples=st.lists(st.integers(0, 2**40), min_size=1, max_size=6, unique=True),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 300),
    which=st.data(),
)
def test_a_view_does_not_depend_on_its_batch(samples: list[int], seed: int, epoch: int, which: st.DataObject) -> None:
    images, maps = batch(len(samples))
    together = apply_views(images, maps, draw_views(samples, SIZE, seed=seed, epoch=epoch), 8)
    place = which.draw(st.integers(0, len(samples) - 1))
    alone = apply_views(
        images[place : place + 1],
        maps[place : place + 1],
        draw_views([samples[place]], SIZE, seed=seed, epoch=epoch),
        8,
    )
    for whole, part in zip(together, alone, strict=True):
        torch.testing.assert_close(whole[place], part[0], rtol=0, atol=1e-6)


def test_seed_epoch_and_sample_all_matter() -> None:
    drawn = [
        draw_views([sample], SIZE, seed=seed, epoch=epoch).factors.tolist()
        for sample, seed, epoch in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert len({str(factors) for factors in drawn}) == 4


def test_shares_and_ranges_of_what_is_drawn() -> None:
    views = draw_views(range(4000), (320, 640), seed=1, epoch=2)
    for flags, share in [(views.jitter, 0.3), (views.grey, 0.2), (views.blur, 0.2), (views.flip, 0.5)]:
        assert abs(flags.mean() - share) < 4 * np.sqrt(share * (1 - share) / 4000)  # four deviations
    assert (views.factors[:, :3].min(0) < 0.25).all()
    assert (views.factors[:, :3].max(0) > 1.75).all()
    assert (views.factors[:, :3] >= 0.2).all()
    assert (views.factors[:, :3] <= 1.8).all()
    assert 0.19 < np.abs(views.factors[:, 3]).max() <= 0.2
    assert 1 <= views.sigma.min() < 1.05 < 1.95 < views.sigma.max() <= 2
    assert len({tuple(order) for order in views.order.tolist()}) == 24
    heights, widths = views.boxes[:, 1] - views.boxes[:, 0], views.boxes[:, 3] - views.boxes[:, 2]
    assert sorted(set(heights.tolist())) == [128, 160, 192, 224, 256, 288]  # 0.4 to 0.9 of 320
    np.testing.assert_array_equal(widths, 2 * heights)
    assert views.boxes.min() == 0
    assert (views.boxes <= [320, 320, 640, 640]).all()


def test_the_whole_image_unchanged() -> None:
    images, maps = batch(2)
    view, part = apply_views(images, maps, plain(2), 8)
    whole = F.interpolate(normalise(images), (16, 24), mode="bilinear")
    torch.testing.assert_close(view, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part, F.avg_pool2d(maps, 2), rtol=1e-5, atol=1e-6)  # 4 x 6 patches to 2 x 3


def test_a_flip_mirrors_image_and_maps() -> None:
    images, maps = batch(2)
    straight = apply_views(images, maps, plain(2), 8)
    flipped = apply_views(images, maps, plain(2, flip=np.array([True, False])), 8)
    for one, other in zip(straight, flipped, strict=True):
        torch.testing.assert_close(one[0].flip(-1), other[0])
        torch.testing.assert_close(one[1], other[1])


def test_image_and_maps_are_cut_alike() -> None:
    # A bright patch in the image and in a map stays in one place, wherever the crop is.
    image, maps = torch.zeros(1, 3, *SIZE, dtype=torch.uint8), torch.zeros(1, 1, 4, 6)
    image[:, :, 8:16, 24:32] = 255
    maps[:, :, 1, 3] = 1
    for box in ([0, 16, 16, 40], [8, 24, 8, 32], [0, 32, 0, 48]):
        view, part = apply_views(image, maps, plain(1, boxes=np.array([box])), 8)
        bright = F.avg_pool2d(view[:, :1], 8)
        assert bright.argmax() == part.argmax()


@pytest.mark.parametrize("box", [[3, 19, 5, 40], [0, 13, 30, 48], [20, 32, 0, 20]])
def test_crops_match_torch_one_image_at_a_time(box: list[int]) -> None:
    images, maps = batch(2)
    y0, y1, x0, x1 = box
    view, _ = crop_views(images.float(), maps, np.array([[0, 32, 0, 48], box]), (16, 24), (2, 3))
    expected = F.interpolate(images[1:, :, y0:y1, x0:x1].float(), (16, 24), mode="bilinear")
    torch.testing.assert_close(view[1:], expected, rtol=1e-5, atol=1e-4)


def test_a_map_of_crop_averages_its_pixels() -> None:
    # Linear in x, so that the mean over a bin is the value at the bin's centre; the crop is patches 1 to 4.
    maps = torch.arange(6.0).expand(1, 1, 4, 6)
    _, part = crop_views(torch.zeros(1, 3, *SIZE), maps, np.array([[8, 24, 8, 32]]), (16, 24), (2, 3))
    torch.testing.assert_close(part, torch.tensor([1.0, 2.0, 3.0]).expand(1, 1, 2, 3))


def test_photometric_steps_match_torchvision() -> None:
    images, maps = batch(5)
    images[4] //= 64  # few levels: equal channels, greys and blacks
    rng = np.random.default_rng(0)
    factors = np.column_stack([rng.uniform(0.2, 1.8, (5, 3)), rng.uniform(-0.2, 0.2, 5)])
    order = np.array([rng.permutation(4) for _ in range(5)])
    jitter, grey, blur = [True, True, False, True, True], [False, False, True, True, False], [False, True, True] * 2
    views = plain(
        5,
        jitter=np.array(jitter),
        order=order,
        factors=factors,
        grey=np.array(grey),
        blur=np.array(blur[:5]),
        sigma=np.linspace(1, 2, 5),
    )
    steps = (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, T.adjust_hue)
    expected = []
    for i, image in enumerate(images.float() / 255):
        if jitter[i]:
            for step in order[i]:
                image = steps[step](image, factors[i, step])
        if grey[i]:
            image = T.rgb_to_grayscale(image, 3)
        if blur[i]:
            image = T.gaussian_blur(image, [3, 3], [views.sigma[i]] * 2)
        image = T.normalize(image, list(IMAGENET_MEAN), list(IMAGENET_STD))
        expected.append(F.interpolate(image[None], (16, 24), mode="bilinear")[0])
    torch.testing.assert_close(apply_views(images, maps, views, 8)[0], torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_maps_of_another_resolution_and_precision_keep_their_place() -> None:
    images, maps = batch(1)
    views = plain(1, boxes=np.array([[8, 24, 0, 24]]))  # patches 1 and 2 of y, 0 to 2 of x: those of the view
    fine = maps.repeat_interleave(3, 2).repeat_interleave(3, 3).half()
    for given_maps in (maps, fine):
        _, part = apply_views(images, given_maps, views, 8)
        torch.testing.assert_close(part, maps[:, :, 1:3, :3], rtol=0, atol=1e-3)


def test_a_worker_without_images_gets_an_empty_batch() -> None:
    images, maps = batch(1)
    view, part = apply_views(images[:0], maps[:0], draw_views([], SIZE, seed=0, epoch=0), 8)
    assert view.shape == (0, 3, 16, 24)
    assert part.shape == (0, 3, 2, 3)


def test_colours_of_a_batch_are_drawn_once_and_its_crops_for_each_image() -> None:
    cases = (0, 3), (40, 3), (0, 4)
    drawn = [draw_views(range(first, first + 40), SIZE, seed=0, epoch=0, batch=batch) for first, batch in cases]
    for views in drawn:
        for name in ("jitter", "order", "factors", "grey", "blur", "sigma"):
            values = getattr(views, name)
            assert (values == values[0]).all(), name
        assert len(np.unique(views.boxes, axis=0)) > 20
        assert 0 < views.flip.sum() < 40
    # Two workers' shares of a batch have the same colours; two batches have not.
    np.testing.assert_array_equal(drawn[0].factors[0], drawn[1].factors[0])
    assert (drawn[0].factors[0] != drawn[2].factors[0]).all()
    shares = [bool(draw_views([0], SIZE, seed=1, epoch=0, batch=b).jitter[0]) for b in range(2000)]
    assert np.mean(shares) == pytest.approx(0.3, abs=0.04)
