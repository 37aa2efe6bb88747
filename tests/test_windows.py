"""Windows: lists derived by hand, the published conditions tried one centre at a time, saliency counted by pixel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from transfgu.errors import UserError
from transfgu.windows import crop_windows, select_windows, sliding_windows


def test_even_side_by_hand() -> None:
    # Side 2 of 4 patches, steps of 1: centres 1 and 2, patches 0 to 2 and 1 to 3, each without its last pixel.
    expected = [[0, 5, 0, 5], [0, 5, 2, 7], [2, 7, 0, 5], [2, 7, 2, 7]]
    assert sliding_windows((4, 4), [0.5], patch_size=2).tolist() == expected


def test_odd_side_by_hand() -> None:
    # Side 3, steps of 1.5: whole multiples inside are centre 3 alone, patches 2 to 4.
    assert sliding_windows((6, 7), [0.5], patch_size=8).tolist() == [[16, 39, 16, 39]]


def test_a_last_window_touches_the_end_by_hand() -> None:
    # Side 4, steps of 2: 8 patches have centres 2, 4 and, at the end, 5; 7 patches have 2 and 4.
    rows, columns = [[0, 4], [2, 6], [3, 7]], [[0, 4], [2, 6]]
    expected = [row + column for row in rows for column in columns]
    assert sliding_windows((8, 7), [0.6], patch_size=1).tolist() == expected


def test_scales_follow_each_other() -> None:
    both = sliding_windows((12, 10), [0.5, 0.3])
    np.testing.assert_array_equal(
        both, np.concatenate([sliding_windows((12, 10), [0.5]), sliding_windows((12, 10), [0.3])])
    )


def published(grid: tuple[int, int], scale: float, patch: int) -> list[list[int]]:
    """The published conditions, one centre at a time."""
    (h, w), windows = grid, []
    side = int(min(h * scale, w * scale))
    half = side / 2
    for y in range(h):
        for x in range(w):
            if not (x - half >= 0 and y - half >= 0 and x + half < w and y + half < h):
                continue
            on_x, on_y = x % half == 0, y % half == 0
            ends_x, ends_y = x + half == w - 1, y + half == h - 1
            if (
                (on_x and on_y)
                or (on_y and (x == half or ends_x))
                or (on_x and (y == half or ends_y))
                or (ends_x and ends_y)
            ):
                rows = [i for i in range(h) if abs(i - y) <= half]
                columns = [j for j in range(w) if abs(j - x) <= half]
                windows.append(
                    [
                        rows[0] * patch,
                        rows[-1] * patch + patch - 1,
                        columns[0] * patch,
                        columns[-1] * patch + patch - 1,
                    ]
                )
    return windows


@settings(max_examples=50, deadline=None)
@given(h=st.integers(3, 24), w=st.integers(3, 24), scale=st.floats(0.2, 0.9), patch=st.sampled_from([1, 8, 14]))
def test_published_conditions(h: int, w: int, scale: float, patch: int) -> None:
    expected = published((h, w), scale, patch) if min(h, w) * scale >= 1 else []
    if expected:
        assert sliding_windows((h, w), [scale], patch).tolist() == expected
    else:
        with pytest.raises(UserError):
            sliding_windows((h, w), [scale], patch)


@pytest.mark.parametrize(
    ("grid", "scales", "message"),
    [
        ((20, 20), [0.5, 1.5], "window scale 1.5 is not a share"),
        ((20, 20), [0.0], "window scale 0.0 is not a share"),
        ((4, 40), [0.2], "window scale 0.2 of 4 x 40 patches is less than a patch"),
        ((4, 4), [1.0], "no window of scales .* fits a grid of 4 x 4"),
    ],
)
def test_useless_scales(grid: tuple[int, int], scales: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sliding_windows(grid, scales)


def test_shares_by_hand() -> None:
    saliency = np.array([[True, False], [False, False]])
    # Of patches of 4 pixels: all of the salient one; 4 x 2 of 4 x 4; 4 x 1 of 4 x 5; 1 of 16.
    windows = np.array([[0, 4, 0, 4], [0, 4, 2, 6], [0, 4, 3, 8], [3, 7, 3, 7]])
    foreground, background = select_windows(windows, saliency, 4)
    assert foreground.tolist() == [0]  # half is not more than half
    assert background.tolist() == [3]  # 80 % is not more than 80 %
    foreground, background = select_windows(windows, saliency, 4, min_foreground=0.49, min_background=0.79)
    assert foreground.tolist() == [0, 1]
    assert background.tolist() == [2, 3]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), h=st.integers(4, 16), w=st.integers(4, 16), patch=st.sampled_from([1, 4, 8]))
def test_shares_are_counted_in_pixels(seed: int, h: int, w: int, patch: int) -> None:
    saliency = np.random.default_rng(seed).random((h, w)) < 0.5
    windows = sliding_windows((h, w), [0.5, 0.8], patch + 1)  # of another patch size: edges anywhere
    windows = np.minimum(windows, np.repeat([h, w], 2) * patch)
    windows = windows[(windows[:, 1] > windows[:, 0]) & (windows[:, 3] > windows[:, 2])]
    pixels = saliency.repeat(patch, 0).repeat(patch, 1)
    shares = np.array([pixels[y0:y1, x0:x1].mean() for y0, y1, x0, x1 in windows])
    foreground, background = select_windows(windows, saliency, patch, min_foreground=0.55, min_background=0.45)
    np.testing.assert_array_equal(foreground, np.flatnonzero(shares > 0.55))
    np.testing.assert_array_equal(background, np.flatnonzero(1 - shares > 0.45))


def test_crops_are_the_pixels_resized() -> None:
    image = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0))
    windows = np.array([[0, 8, 4, 12], [3, 24, 0, 31]])
    crops = crop_windows(image, windows, (8, 8))
    torch.testing.assert_close(crops[0], image[:, :8, 4:12])  # of the size asked for already
    torch.testing.assert_close(
        crops[1], F.interpolate(image[None, :, 3:24, :31], (8, 8), mode="bilinear", antialias=False)[0]
    )
    assert crop_windows(image, windows[:0], (8, 6)).shape == (0, 3, 8, 6)
