"""Ranges as users write them, and their mistakes in one line."""

import numpy as np
import pytest

from tests.refusals import refused
from transfgu.recipe import preset
from transfgu.search import space as search_space
from transfgu.search.space import DEFAULT, DEFAULT_GRID, Range, apply, parse
from transfgu.training.schedule import plan

SHAPES = preset("shapes")


def test_the_kinds_of_range() -> None:
    space = parse(
        [
            "omega_1=loguniform(0.1,3)",
            " training.omega_2 = uniform( 0 , 1e0 )",
            "passes=randint(1,4)",
            "lr=choice(1e-3,3e-3)",
        ],
        SHAPES,
    )
    assert space.ranges == (
        Range(name="training.omega_1", kind="loguniform", values=(0.1, 3.0)),
        Range(name="training.omega_2", kind="uniform", values=(0.0, 1.0)),
        Range(name="training.passes", kind="randint", values=(1, 4)),
        Range(name="training.lr", kind="choice", values=(0.001, 0.003)),
    )
    assert space.shown()[0] == "training.omega_1=loguniform(0.1,3)"
    assert parse(space.shown(), SHAPES) == space


def test_draws_lie_in_their_ranges_and_follow_seed_and_number() -> None:
    space = parse(
        ["omega_1=loguniform(0.01,100)", "passes=randint(2,4)", "lr=choice(0.1,0.2)", "omega_2=uniform(1,2)"], SHAPES
    )
    drawn = [space.draw(7, number) for number in range(400)]
    assert drawn == [space.draw(7, number) for number in range(400)]
    assert drawn[:5] != [space.draw(8, number) for number in range(5)]
    omega = np.array([d["training.omega_1"] for d in drawn])
    assert omega.min() >= 0.01
    assert omega.max() <= 100
    assert 0.4 < np.mean(omega < 1) < 0.6  # half of the decades lie below 1
    assert {d["training.passes"] for d in drawn} == {2, 3, 4}  # both ends
    assert all(type(d["training.passes"]) is int for d in drawn)
    assert {d["training.lr"] for d in drawn} == {0.1, 0.2}
    assert all(1 <= d["training.omega_2"] <= 2 for d in drawn)


def test_a_grid_is_every_combination() -> None:
    space = parse(["omega_1=grid(1,2)", "passes=randint(1,3)"], SHAPES)
    assert [tuple(point.values()) for point in space.grid()] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    with refused("search-grid-unlisted training.omega_1=uniform(0,1)"):
        parse(["omega_1=uniform(0,1)"], SHAPES).grid()


def test_values_go_into_the_recipe() -> None:
    recipe = apply(SHAPES, {"training.omega_1": 2.5, "training.passes": 3, "concepts.things": 5})
    assert (recipe.training.omega_1, recipe.training.passes, recipe.concepts.things) == (2.5, 3, 5)
    assert recipe.training.omega_2 == SHAPES.training.omega_2


def test_alpha_is_held_constant_or_rises() -> None:
    space = parse(["alpha=uniform(0,0.2)"], SHAPES)
    assert space.names == ("alpha",)
    taught = SHAPES.with_fields({"epochs": 30, "teacher_start": 2, "teacher_every": (20,)})
    held = apply(taught, {"alpha": 0.17}).training
    assert {round(plan(held, epoch).alpha, 9) for epoch in range(2, 30)} == {0.17}
    ramp = apply(SHAPES, {"training.alpha_start": 0.03, "training.alpha_step": 0.01}).training
    assert ramp == SHAPES.training


def test_the_defaults_hold_what_is_published() -> None:
    recipe = preset("coco-stuff-27")
    ranges = {r.name: r.values for r in parse(DEFAULT, recipe).ranges}
    published = recipe.flat()
    for name, (low, *_, high) in ranges.items():
        assert low <= published[name] <= high
    assert set(ranges) == {f"training.{name}" for name in ("omega_1", "omega_2", "alpha_start", "alpha_step")}
    grid = parse(DEFAULT_GRID, recipe).grid()
    assert {name: published[name] for name in ranges} in grid
    assert len(grid) == 36


def test_what_is_shared_follows_from_the_fields() -> None:
    features, training = SHAPES.stage_fields("features"), SHAPES.stage_fields("training")
    assert not parse(["omega_1=uniform(0,1)"], SHAPES).touches(features)
    assert parse(["omega_1=uniform(0,1)"], SHAPES).touches(training)
    assert parse(["alpha=uniform(0,1)"], SHAPES).touches(training)
    assert parse(["windows.min_foreground=uniform(0.2,0.8)"], SHAPES).touches(features)


@pytest.mark.parametrize(
    ("texts", "refusal"),
    [
        (["omega_3=uniform(0,1)"], "field-unknown omega_3"),
        (["encoder.name=choice(1,2)"], "search-field-unsupported encoder.name"),
        (["windows.scales=choice(1,2)"], "search-field-unsupported windows.scales"),
        (["views=choice(0,1)"], "search-field-unsupported training.views"),
        (["interpolation=choice(0,1)"], "search-field-unsupported dataset.interpolation"),
        (["compute.workers=randint(1,2)"], "search-field-unsupported compute.workers"),
        (["encoder.batch_size=randint(1,2)"], "search-field-unsupported encoder.batch_size"),
        (["omega_1=uniform(3,0.1)"], "search-range-empty omega_1=uniform(3,0.1)"),
        (["omega_1=uniform(1,1)"], "search-range-empty omega_1=uniform(1,1)"),
        (["omega_1=choice()"], "search-range-empty omega_1=choice()"),
        (["omega_1=choice(1,1)"], "search-range-invalid omega_1=choice(1,1)"),
        (["omega_1=loguniform(0,1)"], "search-range-invalid omega_1=loguniform(0,1)"),
        (["omega_1=uniform(0,1,2)"], "search-range-invalid uniform(low,high)"),
        (["omega_1=normal(0,1)"], "search-range-invalid FIELD=uniform(low,high)"),
        (["omega_1"], "search-range-invalid omega_1"),
        (["omega_1=uniform(0,x)"], "field-type training.omega_1 x"),
        (["omega_1=uniform(0,inf)"], "field-type training.omega_1 inf"),
        (["passes=uniform(1,3)"], "search-range-invalid randint(low,high)"),
        (["passes=choice(1,1.5)"], "field-type training.passes 1.5"),
        (["omega_1=randint(1,3)"], "search-range-invalid uniform(low,high)"),
        (["omega_1=uniform(-1,1)"], "field-range training.omega_1 -1.0"),
        (["concepts.things=randint(-3,3)"], "field-range concepts.things"),
        (["omega_1=uniform(0,1)", "training.omega_1=uniform(0,2)"], "search-field-twice training.omega_1"),
        (["alpha=uniform(0,1)", "alpha_step=choice(0,1)"], "search-field-twice training.alpha_step"),
    ],
)
def test_mistakes_are_one_line(texts: list[str], refusal: str) -> None:
    with refused(refusal):
        search_space.parse(texts, SHAPES)
