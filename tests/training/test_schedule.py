"""Teacher updates and alpha, against tables written by hand from the published recipes."""

import pytest

from transfgu.recipe import TrainingRecipe, preset
from transfgu.training.schedule import plan

FROM_30_BY_TWO = [3, 6, 9, 12, 15, 18, 21, 24, 27, *range(30, 200, 2)]
UPDATES = {
    "coco-stuff-27": list(range(2, 200, 2)),
    "coco-stuff-27-curated": list(range(1, 200)),
    "coco-stuff-171": FROM_30_BY_TWO,
    "coco-80": FROM_30_BY_TWO,
    "pascal-voc": [5, 10, 15, 20, 25, 30, 35, 40, 44, 48, 52, 56, 60, 64, 68, 72, 76, 80, 84, 88, 90, 93, 96, 99],
    "cityscapes": list(range(1, 50)),
    "lip-5": list(range(2, 100, 2)),
    "lip-16": list(range(2, 100, 2)),
    "lip-19": [epoch for epoch in FROM_30_BY_TWO if epoch < 100],
}
LARGEST_ALPHA = {
    "coco-stuff-27": 0.04,
    "coco-stuff-27-curated": 0.03,
    "coco-stuff-171": 0.05,
    "coco-80": 0.05,
    "pascal-voc": 0.07,
    "cityscapes": 0.03,
    "lip-5": 0.04,
    "lip-16": 0.04,
    "lip-19": 0.05,
}


@pytest.mark.parametrize("name", UPDATES)
def test_published_presets(name: str) -> None:
    training = preset(name).training
    plans = [plan(training, epoch) for epoch in range(training.epochs)]
    assert [epoch for epoch, now in enumerate(plans) if now.updates_teacher] == UPDATES[name]
    first = UPDATES[name][0]
    assert [now.has_teacher for now in plans] == [epoch >= first for epoch in range(training.epochs)]
    assert max(now.alpha for now in plans) == pytest.approx(LARGEST_ALPHA[name])


def test_alpha_rises_from_each_update() -> None:
    training = preset("pascal-voc").training
    alphas = [plan(training, epoch).alpha for epoch in [4, 5, 6, 7, 8, 9, 10, 39, 40, 43, 44, 89, 90, 92, 93]]
    by_hand = [0, 0.03, 0.04, 0.05, 0.06, 0.07, 0.03, 0.07, 0.03, 0.06, 0.03, 0.04, 0.03, 0.05, 0.03]
    assert alphas == pytest.approx(by_hand)


def test_alpha_stops_rising() -> None:
    training = TrainingRecipe(teacher_start=1, teacher_every=(50,), epochs=60)
    alphas = [plan(training, epoch).alpha for epoch in range(60)]
    ramp = [0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10]
    assert alphas == pytest.approx([0, *ramp, *[0.10] * 41, *ramp, *[0.10] * 2])


def test_the_first_update_needs_no_multiple() -> None:
    training = TrainingRecipe(teacher_start=3, teacher_every=(4, 5), epochs=22)
    updates = [epoch for epoch in range(22) if plan(training, epoch).updates_teacher]
    assert updates == [3, 4, 8, 10, 15, 20]  # of 4 up to epoch 9, of 5 from epoch 10 on


def test_a_run_may_end_before_its_first_teacher() -> None:
    training = TrainingRecipe(teacher_start=9, epochs=5)
    assert not any(plan(training, epoch).has_teacher for epoch in range(5))
