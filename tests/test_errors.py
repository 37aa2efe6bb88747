"""The share of unusable inputs that ends a run."""

import pickle

import pytest

from transfgu.errors import BadShare, LeftOut, UserError, counted

BAD = [LeftOut(name=f"{i}.png", reason="truncated image") for i in range(4)]


def test_numbers_have_their_noun() -> None:
    shown = [counted(1, "CPU"), counted(1.0, "GPU"), counted(0.5, "GPU"), counted(0, "class"), counted(2000000, "tile")]
    assert shown == ["1 CPU", "1 GPU", "0.5 GPUs", "0 classes", "2000000 tiles"]


def test_advice_that_ray_adds_is_not_in_the_line() -> None:
    error = UserError("no room: free some", code="disk-full")
    error.args = (f"{error.args[0]}\nFailed to run a task after 1/1 attempts.",)
    assert error.line == pickle.loads(pickle.dumps(error)).line == "no room: free some [disk-full]"


def test_a_share_is_exceeded_above_its_limit() -> None:
    tenth = BadShare(limit=0.1)
    assert not tenth.is_exceeded(1, 10)
    assert tenth.is_exceeded(2, 10)
    assert not BadShare(limit=1).is_exceeded(10, 10)
    assert BadShare(limit=0).is_exceeded(1, 1000)
    tenth.check(BAD[:1], 10, "images")
    with pytest.raises(UserError) as raised:
        tenth.check(BAD, 16, "validation images", at_least=True)
    assert raised.value.line == (
        "at least 4 of 16 validation images (25%) can't be used, such as 0.png (truncated image), 1.png (truncated "
        "image), 2.png (truncated image): correct or remove them, or raise --dataset.max_bad_share from 0.1 "
        "[images-bad]"
    )


def test_a_share_without_a_flag_has_one_remedy() -> None:
    with pytest.raises(UserError) as raised:
        BadShare(limit=0.1, flag="").check(BAD[:1], 2, "images")
    assert str(raised.value).endswith("0.png (truncated image): correct or remove them")
