"""Artefacts: complete only with a manifest, refused for another recipe, damage told in one line."""

import time
from pathlib import Path

import pytest

from tests.refusals import refused
from transfgu.errors import LeftOut
from transfgu.recipe import preset
from transfgu.store.artifacts import Manifest, Outcome, Run

RECIPE = preset("shapes")
OUTCOME = Outcome(items=3, left_out=(LeftOut(name="a.png", reason="truncated image"),), details={"windows": 7})


def test_an_artefact_is_complete_once_committed(tmp_path: Path) -> None:
    artifact = Run(str(tmp_path)).artifact("features")
    assert not artifact.check(RECIPE)
    artifact.begin(RECIPE)
    assert not artifact.check(RECIPE)  # begun is not complete
    artifact.commit(RECIPE, OUTCOME, time.monotonic() - 2)
    assert artifact.check(RECIPE)
    manifest = artifact.manifest()
    assert manifest is not None
    assert manifest.outcome == OUTCOME
    assert manifest.digest == RECIPE.digest("features")
    assert 2 <= manifest.seconds < 60


@pytest.mark.parametrize("committed", [False, True])
def test_another_recipes_work_is_refused_by_the_fields_that_differ(tmp_path: Path, committed: bool) -> None:
    artifact = Run(str(tmp_path)).artifact("features")
    artifact.begin(RECIPE)
    if committed:
        artifact.commit(RECIPE, OUTCOME, time.monotonic())
    other = RECIPE.with_fields({"windows.scales": (0.5,), "omega_1": 3})
    with refused("recipe-mismatch windows.scales") as caught:
        artifact.check(other)
    assert "omega_1" not in str(caught.value)  # features do not depend on it
    assert artifact.check(RECIPE.with_fields({"omega_1": 3})) is committed


@pytest.mark.parametrize(
    ("theirs", "asked"), [("iic", "transfgu"), ("transfgu", "iic"), ("iic", "picie"), ("linear-head", "transfgu")]
)
def test_another_methods_work_is_refused(tmp_path: Path, theirs: str, asked: str) -> None:
    run = Run(str(tmp_path))
    run.artifact("training").begin(preset("shapes", theirs))
    (tmp_path / "recipe.yaml").write_text(preset("shapes", theirs).to_yaml())
    wanted = run.continued(preset("shapes", asked))
    assert wanted.method == asked
    with refused(f"run-of-another-method {theirs} {asked}"):
        run.artifact("training").check_method(wanted)
    run.artifact("training").check_method(preset("shapes", theirs))
    assert not run.artifact("training").check(run.continued(preset("shapes", theirs)))


def test_a_damaged_manifest_names_the_folder_to_delete(tmp_path: Path) -> None:
    artifact = Run(str(tmp_path)).artifact("features")
    artifact.begin(RECIPE)
    Path(artifact.file("manifest.json")).write_text('{"stage": "fea')
    with refused("file-damaged"):
        artifact.check(RECIPE)


def test_a_manifest_survives_the_way_through_text() -> None:
    manifest = Manifest(stage="features", digest="0" * 64, fields={"seed": 1}, seconds=1.5, outcome=OUTCOME)
    assert Manifest.from_json(manifest.to_json()) == manifest
