"""Recipes: published values, conversions, digests by stage, and messages that list valid names."""

import dataclasses

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.refusals import refused
from transfgu.errors import UserError
from transfgu.methods import STAGES
from transfgu.presets import PRESETS
from transfgu.recipe import FIELDS, SHORT_NAMES, Recipe, from_yaml, preset


@pytest.mark.parametrize("name", PRESETS)
def test_yaml_gives_back_every_preset(name: str) -> None:
    assert from_yaml(preset(name).to_yaml()) == preset(name)


@pytest.mark.parametrize(
    ("name", "concepts", "classes", "epochs", "batch"),
    [
        ("coco-stuff-27", 27, 27, 200, 256),
        ("coco-stuff-27-curated", 27, 27, 200, 256),
        ("coco-stuff-171", 171, 171, 200, 256),
        ("coco-80", 80, 81, 200, 256),
        ("pascal-voc", 20, 21, 100, 512),
        ("cityscapes", 27, 27, 50, 256),
        ("lip-5", 5, 6, 100, 512),
        ("lip-16", 16, 17, 100, 512),
        ("lip-19", 19, 20, 100, 256),
        ("shapes", 10, 10, preset("shapes").training.epochs, preset("shapes").training.batch_size),
    ],
)
def test_presets_are_the_published_ones(name: str, concepts: int, classes: int, epochs: int, batch: int) -> None:
    recipe = preset(name)
    assert (recipe.concepts.count, recipe.classes) == (concepts, classes)
    assert (recipe.training.epochs, recipe.training.batch_size) == (epochs, batch)


def test_published_learning_rates_and_gradient_scales() -> None:
    rates = {n: preset(n).training.lr for n in PRESETS}
    assert rates["coco-stuff-27-curated"] == 2.2e-4
    assert rates["cityscapes"] == 5e-5
    assert [rates[f"lip-{k}"] for k in (5, 16, 19)] == [1e-4, 2e-5, 2e-5]
    scales = {n: preset(n).pseudo_labels.gradient_scale for n in PRESETS}
    assert scales["coco-80"] == scales["pascal-voc"] == 1 / 8
    assert scales["cityscapes"] == scales["lip-19"] == 1 / 2


def test_short_names_are_those_that_one_component_has() -> None:
    assert SHORT_NAMES["omega_1"] == "training.omega_1"
    assert "batch_size" not in SHORT_NAMES  # the encoder, training and evaluation each have one
    assert "seed" not in SHORT_NAMES  # is no component's


def test_text_is_converted_to_each_fields_type() -> None:
    recipe = preset("shapes").with_fields(
        {"epochs": "3", "lr": "1e-2", "windows.scales": "0.5, 0.25", "image_size": "64x96", "views": "true"}
    )
    assert recipe.training.epochs == 3
    assert recipe.training.lr == 0.01
    assert recipe.windows.scales == (0.5, 0.25)
    assert recipe.dataset.image_size == (64, 96)
    assert recipe.training.views is True


@pytest.mark.parametrize(
    ("name", "value", "refusal"),
    [
        ("epochz", "3", "field-unknown epochz training.epochs"),
        ("epochs", "many", "field-type training.epochs many"),
        ("epochs", 2.5, "field-type training.epochs 2.5"),
        ("epochs", "0", "field-range training.epochs 0"),
        ("lr", "nan", "field-type training.lr nan"),
        ("lr", "-1", "field-range training.lr"),
        ("omega_1", "-0.1", "field-range training.omega_1"),
        ("image_size", "320", "field-length dataset.image_size 2 320x320"),
        ("image_size", "0x8", "field-range dataset.image_size"),
        ("windows.groups", "some", "field-choice windows.groups both foreground all some"),
        ("windows.scales", "2", "field-range windows.scales"),
        ("min_foreground", "1.5", "field-range windows.min_foreground"),
        ("smoothing", "2", "field-range pseudo_labels.smoothing"),
        ("dropout", "1", "field-range decoder.dropout"),
        ("evaluation.scales", "1 0", "field-range evaluation.scales"),
        ("evaluation.scales", "", "field-range evaluation.scales"),
        ("flip", "2", "field-type evaluation.flip 2"),
        ("max_bad_share", "3", "field-range dataset.max_bad_share"),
        ("limit", "-1", "field-range limit"),
        ("views", "maybe", "field-type training.views maybe"),
        ("things", "-1", "field-range concepts.things"),
    ],
)
def test_a_bad_value_is_named_in_one_line(name: str, value: object, refusal: str) -> None:
    with refused(refusal):
        preset("shapes").with_fields({name: value})


def test_an_unknown_preset_lists_the_good_ones() -> None:
    with refused("preset-unknown coco shapes coco-stuff-27 folder"):
        preset("coco")


def test_stuff_needs_background_windows() -> None:
    with refused("windows-missing"):
        preset("shapes").with_fields({"groups": "foreground"})


def test_too_few_concepts() -> None:
    with refused("concepts-few"):
        preset("folder").with_fields({"things": 1, "stuff": 0})


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "just words",
        "preset: nothing",
        "training: {epochz: 3}",
        "epochs: [1, 2]",
        pytest.param("[" * 100_000, id="nested"),
    ],
)
def test_a_bad_yaml_recipe_is_one_line(text: str) -> None:
    with pytest.raises(UserError) as caught:
        from_yaml(text)
    assert "\n" not in str(caught.value)


def test_yaml_fills_in_from_its_preset() -> None:
    recipe = from_yaml(yaml.safe_dump({"preset": "cityscapes", "training": {"epochs": 7}}))
    assert recipe == preset("cityscapes").with_fields({"epochs": 7})


def test_a_stage_depends_on_its_own_fields_and_earlier_ones_alone() -> None:
    recipe = preset("coco-stuff-27")
    changed = {
        "omega_1": "training",
        "gradient_scale": "pseudo_labels",
        "concepts.iterations": "concepts",
        "windows.scales": "features",
        "limit": "samples",
        "evaluation.protocol": "evaluation",
        "evaluation.scales": "evaluation",
        "evaluation.flip": "evaluation",
    }
    values = {
        **{"omega_1": 2, "gradient_scale": 1, "concepts.iterations": 5, "windows.scales": (0.5,), "limit": 3},
        **{"evaluation.protocol": "label", "evaluation.scales": (0.75, 1.0), "evaluation.flip": True},
    }
    for name, first in changed.items():
        other = recipe.with_fields({name: values[name]})
        same = [s for s in STAGES if other.digest(s) == recipe.digest(s)]
        assert same == list(STAGES[: STAGES.index(first)]), name


@pytest.mark.parametrize("name", PRESETS)
def test_logits_are_averaged_only_where_it_is_asked_for(name: str) -> None:
    averaged = ((1.0, 1.5), True) if name == "shapes" else ((1.0,), False)
    assert (preset(name).evaluation.scales, preset(name).evaluation.flip) == averaged


def test_where_it_runs_changes_no_digest() -> None:
    recipe = preset("shapes")
    for fields in ({"workers": 4}, {"actors": 2}, {"encoder.batch_size": 7}, {"max_bad_share": 0.5}):
        assert recipe.with_fields(fields).digest("evaluation") == recipe.digest("evaluation")


def test_features_depend_on_whether_there_is_stuff_but_not_on_how_much() -> None:
    digests = [preset("folder").with_fields({"stuff": n}).digest("features") for n in (0, 5, 15)]
    assert digests[1] == digests[2] != digests[0]


def test_the_seed_is_the_scenes_but_not_a_data_sets() -> None:
    for name, same in (("shapes", False), ("coco-stuff-27", True)):
        a, b = preset(name), preset(name).with_fields({"seed": 5})
        assert (a.digest("samples") == b.digest("samples")) is same
        assert a.digest("concepts") != b.digest("concepts")


def test_every_field_says_what_it_means() -> None:
    assert all(info.doc for info in FIELDS.values())
    numbers = {f.name for f in dataclasses.fields(Recipe)}
    assert numbers <= {n.partition(".")[0] for n in FIELDS}


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
def test_lists_survive_the_way_through_text(scales: list[float]) -> None:
    text = ",".join(map(repr, scales))
    assert preset("shapes").with_fields({"windows.scales": text}).windows.scales == tuple(scales)


@pytest.mark.parametrize(
    ("field", "value", "first"),
    [
        ("concepts.whiten", "foreground", "concepts"),
        ("pseudo_labels.refine", 2, "pseudo_labels"),
        ("training.certain_share", 0.5, "training"),
        ("concepts.start", "faiss", "concepts"),
        ("training.sampler", "published", "training"),
        ("training.colours", "batch", "training"),
    ],
)
def test_options_change_digests_from_their_stage_on(field: str, value: object, first: str) -> None:
    """The paper's presets turn them off, so digests equal those of runs before these fields existed."""
    off = preset("coco-stuff-27")
    assert off.flat()[field] == FIELDS[field].before
    on = off.with_fields({field: value})
    changed = [stage for stage in STAGES if on.digest(stage) != off.digest(stage)]
    assert changed == list(STAGES[STAGES.index(first) :])


@pytest.mark.parametrize(("field", "value"), [("refine", -1), ("certain_share", 0), ("certain_share", 1.1)])
def test_options_out_of_range_are_refused(field: str, value: float) -> None:
    with refused(f"field-range {SHORT_NAMES[field]}"):
        preset("shapes").with_fields({field: value})


@pytest.mark.parametrize(
    ("whiten", "windows"),
    [
        ("none", []),
        ("foreground", ["foreground"]),
        ("background", ["background"]),
        ("both", ["foreground", "background", "all"]),
    ],
)
def test_which_windows_are_whitened(whiten: str, windows: list[str]) -> None:
    recipe = preset("shapes").with_fields({"whiten": whiten})
    assert [w for w in ("foreground", "background", "all") if recipe.concepts.whitens(w)] == windows


@pytest.mark.parametrize(
    ("scaling", "batch", "lr"), [("linear", 64, 4e-4), ("sqrt", 64, 2e-4), ("linear", 8, 5e-5), ("sqrt", 16, 1e-4)]
)
def test_learning_rate_follows_the_batch_size(scaling: str, batch: int, lr: float) -> None:
    """1e-4 is meant for 16 images."""
    fields = {"lr": 1e-4, "training.batch_size": batch, "lr_scaling": scaling, "lr_batch_size": 16}
    recipe = preset("shapes").with_fields(fields)
    assert recipe.training.scaled_lr == pytest.approx(lr)
    assert recipe.digest("training") != preset("shapes").with_fields({**fields, "lr": 2e-4}).digest("training")


def test_learning_rate_is_not_scaled_unless_asked() -> None:
    assert {preset(name).training.scaled_lr / preset(name).training.lr for name in PRESETS} == {1.0}


@pytest.mark.parametrize("fields", [{"lr_scaling": "sqrt"}, {"lr_batch_size": 256}])
def test_scaling_needs_both_of_its_fields(fields: dict[str, object]) -> None:
    with refused("field-combination training.lr_scaling training.lr_batch_size"):
        preset("shapes").with_fields(fields)
