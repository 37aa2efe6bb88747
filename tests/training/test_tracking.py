"""Each tracker's output is read in its own format; a tracker that fails is dropped without other effects."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from tests.refusals import refused
from transfgu.recipe import Recipe, preset
from transfgu.store.artifacts import Run
from transfgu.training import tracking

ROW: dict[str, Any] = {
    "epoch": 3,
    "total": 2.5,
    "peer": 1.25,
    "diversity": 0.5,
    "uncertainty": 0.25,
    "alpha": None,
    "mean_iou": 40.0,
    "pixel_accuracy": 60.0,
    "images_per_second": 12.5,
}
PICTURE = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)


def recipe_of(track: str) -> Recipe:
    return preset("shapes").with_fields({"track": track})


def events(file: Path) -> list[Event]:
    """Yield the records of a file: length, its checksum, the event, its checksum."""
    data, found, at = file.read_bytes(), [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        found.append(Event.FromString(data[at + 12 : at + 12 + length]))
        at += 12 + length + 4
    return found


def test_tensorboard_is_what_one_gets() -> None:
    assert tracking.names(preset("shapes").compute.track) == ["tensorboard"]
    assert tracking.names(recipe_of("none").compute.track) == []


def test_an_epoch_is_one_file_however_often_it_is_told(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    for total in (9.0, 2.5):
        trackers = tracking.Trackers(tracking.subject(preset("shapes"), run), pytest.fail)
        trackers.epoch({**ROW, "total": total}, PICTURE)
        trackers.close()
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    values = [(event.step, value) for event in events(file) for value in event.summary.value]
    assert {step for step, _ in values} == {3}
    numbers = {value.tag: value.simple_value for _, value in values if value.WhichOneof("value") == "simple_value"}
    assert numbers == {
        "loss/total": 2.5,
        "loss/peer": 1.25,
        "loss/diversity": 0.5,
        "loss/uncertainty": 0.25,
        "score/mean_iou": 40.0,
        "score/pixel_accuracy": 60.0,
        "speed/images_per_second": 12.5,
    }
    (picture,) = (value.image for _, value in values if value.WhichOneof("value") == "image")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))), PICTURE)


def test_mistakes_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with refused("tracker-unknown comet tensorboard mlflow wandb"):
        tracking.names(recipe_of("tensorboard,comet").compute.track)
    monkeypatch.setitem(tracking.PACKAGES, "wandb", "a_package_that_is_not_there")
    with refused("package-missing wandb"):
        tracking.names(recipe_of("wandb").compute.track)


def test_a_tracker_that_fails_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    notes: list[str] = []
    trackers = tracking.Trackers(tracking.subject(preset("shapes"), Run(str(tmp_path / "run"))), notes.append)
    trackers.epoch(ROW, None)
    trackers.epoch(ROW, None)
    assert len(notes) == 1
    assert notes[0].startswith("tracking with tensorboard has stopped: can't write")


def test_pictures_are_pairs_in_rows(tmp_path: Path) -> None:
    black, white = np.zeros((4, 5, 3), np.uint8), np.full((4, 5, 3), 200, np.uint8)
    tracking.write_picture(str(tmp_path), 7, [(black, white)] * 3)
    found = tracking.read_picture(str(tmp_path), 7)
    assert found is not None
    assert found.shape == (8, 20, 3)
    assert found[0, :, 0].tolist() == [0] * 5 + [200] * 5 + [0] * 5 + [200] * 5
    assert found[7, :, 0].tolist() == [0] * 5 + [200] * 5 + [255] * 10
    assert tracking.read_picture(str(tmp_path), 8) is None


@pytest.mark.trackers
def test_mlflow_finds_its_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a server or a database is more than a test needs
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.chdir(tmp_path)
    for epoch in (1, 2):
        trackers = tracking.Trackers(tracking.subject(recipe_of("mlflow"), Run(str(tmp_path / "run"))), pytest.fail)
        trackers.epoch({**ROW, "epoch": epoch}, PICTURE)
        trackers.close()
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("transfgu")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["loss/total"] == 2.5
    assert run.data.params["training.epochs"] == str(recipe_of("mlflow").training.epochs)
    assert [m.step for m in client.get_metric_history(run.info.run_id, "score/mean_iou")] == [1, 2]
    assert len(client.list_artifacts(run.info.run_id, "predictions")) == 2


@pytest.mark.trackers
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trackers = tracking.Trackers(tracking.subject(recipe_of("wandb"), Run(str(tmp_path / "run"))), pytest.fail)
    trackers.epoch(ROW, PICTURE)
    trackers.close()
    assert list(tmp_path.rglob("*.wandb"))
    assert list(tmp_path.rglob("predictions*.png"))
