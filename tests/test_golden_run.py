"""A run of the first format, kept forever: made by `jobs/train.py shapes --limit 12 --epochs 1` of commit a7d013c.

`golden/run` is its folder without Ray's state, curves and report; `golden/prediction` holds the masks of its validation
scenes by `jobs/predict.py` of the same commit.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import yaml
from PIL import Image

from tests.refusals import refused
from transfgu import Segmenter, formats, pipeline, presets, recipe
from transfgu.errors import UserError
from transfgu.methods import STAGES
from transfgu.recipe import FIELDS, Recipe, preset
from transfgu.report import page
from transfgu.runtime.progress import Progress
from transfgu.search.trials import Ledger
from transfgu.stages import prediction
from transfgu.stages.prediction import PredictionJob
from transfgu.store.artifacts import Run
from transfgu.training import checkpoints

GOLDEN = Path(__file__).parent / "golden"
METRICS = json.loads((GOLDEN / "run" / "metrics.json").read_text())


@pytest.fixture
def golden(tmp_path: Path) -> Run:
    """A copy, because the tests write into it."""
    shutil.copytree(GOLDEN / "run", tmp_path / "run")
    return Run(str(tmp_path / "run"))


def command() -> Recipe:
    """The recipe of the original command today; the preset has changed since."""
    return preset("shapes").with_fields({"limit": 12, "epochs": 1})


def asked() -> Recipe:
    """The recipe of the same command when it continues the run."""
    return Run(str(GOLDEN / "run")).continued(command())


def edit(path: Path, **changes: Any) -> None:
    """Replace values of a JSON or YAML object."""
    read, write = (yaml.safe_load, yaml.safe_dump) if path.suffix == ".yaml" else (json.loads, json.dumps)
    path.write_text(write({**read(path.read_text()), **changes}))


def masks(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))}


def test_training_finds_every_stage_complete(golden: Run) -> None:
    metrics = pipeline.run_stages(command(), golden, report=page.write, quiet=True)
    assert [stage for stage in STAGES if metrics["stages"][stage]["skipped"]] == list(STAGES)
    for name in ("mean_iou", "pixel_accuracy", "iou", "assignment", "last"):
        assert metrics[name] == METRICS[name]
    assert Path(golden.file("report.html")).exists()
    # The recipe is of today's format from now on, and the run is still complete.
    assert yaml.safe_load(Path(golden.file("recipe.yaml")).read_text())["format"] == formats.FORMAT
    again = pipeline.run_stages(command(), golden, quiet=True)
    assert all(again["stages"][stage]["skipped"] for stage in STAGES)


def test_the_segmenter_predicts_its_masks(golden: Run) -> None:
    segmenter = Segmenter.load(golden.uri)
    scenes = sorted(Path(golden.file("samples/scenes/validation/images")).glob("*.png"))
    wanted = masks(GOLDEN / "prediction" / "masks")
    assert len(scenes) == len(wanted) == 12
    for scene in scenes:
        np.testing.assert_array_equal(segmenter.predict(scene), wanted[scene.name])


@pytest.mark.ray
@pytest.mark.usefixtures("small_work_here")
def test_evaluation_counts_its_figures(golden: Run) -> None:
    result = pipeline.evaluate(golden.recipe(), golden, quiet=True)
    assert {name: result[name] for name in ("mean_iou", "pixel_accuracy", "iou")} == {
        name: METRICS[name] for name in ("mean_iou", "pixel_accuracy", "iou")
    }
    assert result["images"] == 12


@pytest.mark.ray
@pytest.mark.usefixtures("small_work_here")
def test_prediction_makes_its_masks_and_goes_on_with_them(golden: Run, tmp_path: Path) -> None:
    job = PredictionJob(
        run=golden.uri, images=golden.file("samples/scenes/validation/images"), out=str(tmp_path / "out")
    )
    assert prediction.predict(job, golden.recipe().compute, Progress("prediction", quiet=True)).made == 12
    made, wanted = masks(tmp_path / "out" / "masks"), masks(GOLDEN / "prediction" / "masks")
    assert made.keys() == wanted.keys()
    for name, mask in made.items():
        np.testing.assert_array_equal(mask, wanted[name])
    shutil.copytree(GOLDEN / "prediction", tmp_path / "theirs")
    (tmp_path / "theirs" / "masks" / "000003.png").unlink()
    edit(tmp_path / "theirs" / "prediction.json", run=golden.uri)
    job = dataclasses.replace(job, out=str(tmp_path / "theirs"))
    found = prediction.predict(job, golden.recipe().compute, Progress("prediction", quiet=True))
    assert found.images == 12
    assert masks(tmp_path / "theirs" / "masks").keys() == wanted.keys()


def restricted(monkeypatch: pytest.MonkeyPatch, name: str, **history: Any) -> None:
    """Give a present field a history, like that of an added or renamed field."""
    known = dict(FIELDS)
    known[name] = dataclasses.replace(known[name], **history)
    monkeypatch.setattr(recipe, "FIELDS", known)


@pytest.fixture
def without_smoothing(golden: Run) -> Run:
    """A run of a version without `pseudo_labels.smoothing`, which smoothed over 3 patches."""
    drop(golden, "pseudo_labels.smoothing")
    return golden


def drop(run: Run, name: str, now: str = "") -> None:
    """Remove a field from a run's files, or rename it."""
    component, _, leaf = name.rpartition(".")
    for stage in STAGES:
        for file in ("manifest.json", "fields.json"):
            path = Path(run.artifact(stage).file(file))
            tree = json.loads(path.read_text())
            fields = tree["fields"] if file == "manifest.json" else tree
            if name in fields:
                value = fields.pop(name)
                if now:
                    fields[now] = value
            path.write_text(json.dumps(tree))
    path = Path(run.file("recipe.yaml"))
    tree = yaml.safe_load(path.read_text())
    value = tree[component].pop(leaf)
    if now:
        tree[now.partition(".")[0]][now.rpartition(".")[2]] = value
    path.write_text(yaml.safe_dump(tree))


def test_a_field_that_came_later_has_the_value_of_its_time(
    without_smoothing: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused("recipe-mismatch pseudo_labels.smoothing nothing 3"):
        pipeline.check_artifacts(asked(), without_smoothing)
    restricted(monkeypatch, "pseudo_labels.smoothing", before=3)
    assert all(pipeline.check_artifacts(asked(), without_smoothing).values())
    assert without_smoothing.recipe().pseudo_labels.smoothing == 3
    # A preset that smooths over 5 from now on does so in new runs; this one goes on as it was made.
    monkeypatch.setitem(presets.PRESET_FIELDS["shapes"], "smoothing", 5)
    assert command().pseudo_labels.smoothing == 5
    continued = without_smoothing.continued(command())
    assert continued.pseudo_labels.smoothing == 3
    assert all(pipeline.check_artifacts(continued, without_smoothing).values())
    # Who asks for it gets it, or is told why not.
    given = command().with_fields({"smoothing": 7})
    with refused("recipe-mismatch pseudo_labels.smoothing 3 7"):
        pipeline.check_artifacts(without_smoothing.continued(given), without_smoothing)


def test_a_later_field_leaves_digests_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are found by the digest."""
    before = asked().digest("training")
    assert before == json.loads((GOLDEN / "run/training/manifest.json").read_text())["digest"]
    fields = asked().stage_fields("training")
    restricted(monkeypatch, "pseudo_labels.smoothing", before=1)
    assert asked().digest("training") == before  # 3 is not what runs had: it counts
    restricted(monkeypatch, "pseudo_labels.smoothing", before=3)
    del fields["pseudo_labels.smoothing"]
    assert asked().digest("training") != before  # as a version without the field digested
    changed = asked().with_fields({"smoothing": 5}).digest("training")
    assert changed not in (before, asked().digest("training"))


def test_a_renamed_field_is_known_by_its_old_name(golden: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(golden, "concepts.iterations", "concepts.rounds")
    with refused("recipe-mismatch concepts.rounds"):
        pipeline.check_artifacts(asked(), golden)
    restricted(monkeypatch, "concepts.iterations", was=("concepts.rounds",))
    assert golden.recipe() == Run(str(GOLDEN / "run")).recipe()
    assert all(pipeline.check_artifacts(asked(), golden).values())
    assert asked().with_fields({"concepts.rounds": 7}).concepts.iterations == 7


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("recipe.yaml", lambda run: run.recipe()),
        ("concepts/manifest.json", lambda run: run.artifact("concepts").manifest()),
        ("evaluation/scores.json", lambda run: run.scores()),
    ],
)
def test_a_format_to_come_is_refused_in_one_line(golden: Run, file: str, read: Any) -> None:
    edit(Path(golden.file(file)), format=formats.FORMAT + 1)
    with refused(f"format-newer {formats.FORMAT + 1}"):
        read(golden)


def test_masks_trials_checkpoints_and_models_of_a_format_to_come_are_refused(golden: Run, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "prediction", tmp_path / "out")
    job = PredictionJob(run=golden.uri, images=golden.file("samples/scenes/validation/images"), out=f"{tmp_path}/out")
    edit(tmp_path / "out" / "prediction.json", format=formats.FORMAT + 1, files="png")
    with refused("format-newer prediction.json"):
        prediction.preflight(job)
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "0000.json").write_text(json.dumps({"format": formats.FORMAT + 1}))
    with refused("format-newer 0000.json"):
        Ledger(str(tmp_path))
    checkpoint = tmp_path / "ray" / "checkpoint_1"
    checkpoint.mkdir(parents=True)
    (checkpoint / checkpoints.HISTORY).write_text('[{"epoch": 1}]')
    checkpoints.seal(checkpoint)
    assert checkpoints.newest(str(tmp_path / "ray"))
    edit(checkpoint / "digests.json", format=formats.FORMAT + 1)
    with refused("format-newer checkpoint_1"):
        checkpoints.newest(str(tmp_path / "ray"))
    model = Path(golden.file("model.safetensors"))
    tensors = safetensors.torch.load_file(model)
    safetensors.torch.save_file(tensors, model, {formats.WEIGHTS_KEY: str(formats.FORMAT + 1)})
    with refused("format-newer model.safetensors"):
        Segmenter.load(golden.uri)


def test_a_checkpoint_of_the_first_format_is_whole(tmp_path: Path) -> None:
    """In that format, `digests.json` was the list of files itself."""
    checkpoint = tmp_path / "checkpoint_1"
    checkpoint.mkdir()
    content = b'[{"epoch": 1}]'
    (checkpoint / checkpoints.HISTORY).write_bytes(content)
    (checkpoint / "digests.json").write_text(json.dumps({checkpoints.HISTORY: hashlib.sha256(content).hexdigest()}))
    found = checkpoints.newest(str(tmp_path))
    assert found is not None
    assert found.history == [{"epoch": 1}]


DAMAGE = (b"", b"{", b"[]", b"null", b"3", b'{"stage": 1', b"\xff\xfe", b'{"stage": "x"}')


READERS: Mapping[str, Callable[[Run], object]] = {
    "concepts/manifest.json": lambda run: run.artifact("concepts").manifest(),
    "evaluation/scores.json": Run.scores,
    "training/history.json": Run.history,
}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (file, content)
        for file in READERS
        for content in DAMAGE
        if (file, content) != ("training/history.json", b"[]")  # a history of no epoch is whole
    ],
)
def test_a_damaged_file_is_told_in_one_line(golden: Run, file: str, content: bytes) -> None:
    Path(golden.file(file)).write_bytes(content)
    with refused(f"file-damaged {Path(file).name}"):
        READERS[file](golden)


@pytest.mark.parametrize("file", READERS)
def test_a_command_that_goes_on_with_a_damaged_run_ends_in_one_line(golden: Run, file: str) -> None:
    Path(golden.file(file)).write_bytes(b"{")
    with refused("file-damaged"):
        pipeline.run_stages(command(), golden, report=page.write, quiet=True)


@pytest.mark.parametrize("content", [c for c in DAMAGE if c != b'{"stage": "x"}'])
def test_damaged_claims_and_records_are_told_in_one_line(golden: Run, tmp_path: Path, content: bytes) -> None:
    artifact = golden.artifact("concepts")
    Path(artifact.file("manifest.json")).unlink()
    Path(artifact.file("fields.json")).write_bytes(content)
    with refused("file-damaged fields.json"):
        artifact.check(asked())
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "0000.json").write_bytes(content)
    with refused("file-damaged 0000.json"):
        Ledger(str(tmp_path))
    for name in ("prediction.json", "summary.json"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(GOLDEN / "prediction", tmp_path / "out")
        (tmp_path / "out" / name).write_bytes(content)
        job = PredictionJob(
            run=golden.uri, images=golden.file("samples/scenes/validation/images"), out=str(tmp_path / "out")
        )
        with refused(f"file-damaged {name}"):
            prediction.predict(job, golden.recipe().compute, Progress("prediction", quiet=True))


@pytest.mark.parametrize("content", [b"\xe9t\xe9: 1", b"- 1", b"a: [", b"data: {b: 1}"])
def test_a_damaged_recipe_is_told_in_one_line(golden: Run, content: bytes) -> None:
    Path(golden.file("recipe.yaml")).write_bytes(content)
    with pytest.raises(UserError) as caught:
        golden.recipe()
    assert caught.value.code in ("recipe-damaged", "field-unknown")
