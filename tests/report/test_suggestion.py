"""Suggestions of a number of concepts, of features that were made for them."""

import json
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.refusals import refused
from transfgu.benchmarks import suggestions
from transfgu.cli import suggest
from transfgu.datasets.shapes import STUFF, THINGS, scene
from transfgu.recipe import Recipe, preset
from transfgu.report import suggestion
from transfgu.store.artifacts import Outcome, Run

IMAGES = 40


def write_features(run: Run, recipe: Recipe, heaps: dict[str, int]) -> None:
    """For each group so many heaps of windows, ten windows an image, in two parts."""
    random = np.random.default_rng(0)
    rows = []
    for group, count in heaps.items():
        centres = 8 * np.eye(6)[:count]
        for n in range(10 * IMAGES):
            rows.append((n // 10, group, (centres[random.integers(count)] + random.normal(size=6)).astype(np.float32)))
    folder = run.artifact("features")
    folder.begin(recipe)
    for part, images in enumerate((range(IMAGES // 2), range(IMAGES // 2, IMAGES))):
        own = [row for row in rows if row[0] in images]
        columns = {
            "index": pa.array([row[0] for row in own], pa.int32()),
            "group": pa.array([row[1] for row in own]).dictionary_encode(),
            "feature": pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate([row[2] for row in own])), 6),
        }
        pq.write_table(pa.table(columns), folder.file(f"part-{part:08d}.parquet"))
    folder.commit(recipe, Outcome(items=IMAGES), time.monotonic())


def run_of(folder: Path, recipe: Recipe, heaps: dict[str, int]) -> Run:
    run = Run(str(folder))
    folder.mkdir()
    Path(run.file("recipe.yaml")).write_text(recipe.to_yaml())
    write_features(run, recipe, heaps)
    return run


def test_heaps_of_windows_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", preset("shapes"), {"foreground": 4, "background": 3})
    suggest.main([run.uri, "--least", "3", "--most", "5", "--windows", "300"])
    told = capsys.readouterr().out
    assert told.rstrip().endswith(f"--reuse {run.uri} --run {run.uri}-K --things 4 --stuff 3")
    assert "things: 4 suggested; halves of the images find the same clusters" in told
    found = json.loads(Path(run.file("suggestion.json")).read_text())
    assert [found[name]["suggestion"] for name in ("things", "stuff")] == [4, 3]
    assert [found[name]["present"] for name in ("things", "stuff")] == [6, 4]
    assert found["things"]["windows"] == 300  # of 400: thirty whole images
    assert [m["k"] for m in found["stuff"]["measures"]] == [3, 4, 5]
    picture = ET.parse(run.file("suggestion.svg")).getroot()
    texts = [text.text or "" for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "stuff: 3 suggested (solid line), 4 in the run (dotted)" in texts
    assert sum(text.startswith("inertia") for text in texts) == 2


def test_windows_that_are_clustered_together_are_measured_together(tmp_path: Path) -> None:
    recipe = preset("shapes").with_fields({"windows.groups": "all", "concepts.whiten": "none"})
    run = run_of(tmp_path / "run", recipe, {"all": 4})
    (found,) = suggestion.find(recipe, run, least=3, most=5)
    assert (found.name, found.windows, found.present, found.suggestion) == ("concepts", 10 * IMAGES, 10, 4)


def test_numbers_become_fewer() -> None:
    assert suggestion.numbers(2, 12) == list(range(2, 13))
    assert suggestion.numbers(30, 70) == [30, 31, 32, 34, 36, 38, 40, 42, 44, 46, 48, 51, 54, 57, 60, 63, 66, 70]
    assert suggestion.numbers(3, 3) == [3]


def test_refusals(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", preset("shapes"), {"foreground": 5, "background": 3})
    with refused("windows-few 21"):
        suggest.main([run.uri, "--most", "21"])
    for flags in (["--least", "1"], ["--least", "5", "--most", "4"], ["--windows", "10"]):
        with refused("flag-range"):
            suggest.main([run.uri, *flags])
    with refused("run-missing"):
        suggest.main([str(tmp_path)])
    other = Run(str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    Path(other.file("recipe.yaml")).write_text(preset("shapes").to_yaml())
    with refused("features-missing"):
        suggest.main([other.uri])
    Path(other.file("recipe.yaml")).write_text(preset("shapes", "picie").to_yaml())
    with refused("option-of-another-method picie"):
        suggest.main([other.uri])


def test_scenes_of_some_kinds() -> None:
    whole = [scene(7, "train", n, 32) for n in range(6)]
    named = [scene(7, "train", n, 32, things=range(len(THINGS)), stuff=range(len(STUFF))) for n in range(6)]
    for (image, label), (same, again) in zip(whole, named, strict=True):
        np.testing.assert_array_equal(image, same)
        np.testing.assert_array_equal(label, again)
    some = [scene(7, "train", n, 32, things=(1, 4), stuff=(0, 3))[1] for n in range(40)]
    assert set(np.unique(some)) == {1, 4, len(THINGS), len(THINGS) + 3}


@pytest.mark.long
def test_kinds_of_scenes_are_counted_within_two() -> None:
    said: list[str] = []
    found = suggestions.run(1, say=said.append)
    for name, (chosen, _) in found.items():
        assert abs(chosen - int(name.split()[0])) <= 2, said
