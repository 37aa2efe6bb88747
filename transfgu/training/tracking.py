"""An epoch is told once, to all who were asked for: its losses and scores, and a picture of what the student sees.

TensorBoard gets a file of events for each epoch in the run's own folder, on any storage; an epoch that is trained again
replaces its file, so a curve never has two values for one epoch. MLflow and Weights & Biases keep a run of their own,
found again by the run's URI. A tracker that fails is given up with a word to the user; training goes on.
"""

import hashlib
import importlib.util
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from transfgu.errors import UserError
from transfgu.recipe import Recipe
from transfgu.store import storage
from transfgu.store.artifacts import Run

Picture = UInt8[np.ndarray, "H W 3"]

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
_NUMBERS = {
    "mean_iou": "score/mean_iou",
    "pixel_accuracy": "score/pixel_accuracy",
    "alpha": "schedule/alpha",
    "images_per_second": "speed/images_per_second",
}
"""Columns of the history under the names that trackers get; all others are losses."""
_UNTOLD = (
    "epoch",
    "step",
    "workers",
    "seconds",
    "start_seconds",
    "score_seconds",
    "teacher_updated",
    "skipped_steps",
    "label_free",
)
_PICTURE = "predictions"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is tracked."""

    track: str
    """Names of trackers, with commas between; see `ComputeRecipe.track`."""
    uri: str
    """Folder of the run: its events lie in it, and a tracker finds its own run again by it."""
    title: str
    fields: Mapping[str, Any]
    """Settings by name."""


def subject(recipe: Recipe, run: Run) -> Subject:
    """Return a run as trackers know it."""
    return Subject(
        track=recipe.compute.track,
        uri=run.uri,
        title=f"{recipe.preset}, seed {recipe.seed}",
        fields=recipe.flat(),
    )


def names(track: str) -> list[str]:
    """The trackers that a text names, with commas or spaces between.

    Raises:
        UserError: an unknown one, or one whose package is not installed.
    """
    asked = [name for name in track.replace(",", " ").split() if name != "none"]
    for name in asked:
        if name not in PACKAGES:
            raise UserError(
                f"--track does not know {name}: choose from {', '.join(PACKAGES)}, or none", code="tracker-unknown"
            )
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"--track {name} needs the package {name}: pip install {PACKAGES[name]}", code="package-missing"
            )
    return asked


class Tracker(Protocol):
    """Whoever wants to know of epochs."""

    def epoch(self, number: int, values: Mapping[str, float], picture: Picture | None) -> None:
        """What the epoch of this number, from 1, came to."""
        ...

    def close(self) -> None:
        """There are no more."""
        ...


class Trackers:
    """All that were asked for; an error in one of them ends nothing but itself."""

    def __init__(self, subject: Subject, note: Callable[[str], None]) -> None:
        """`note` is told why a tracker was given up."""
        makers: dict[str, Callable[[Subject], Tracker]] = {
            "tensorboard": TensorBoard,
            "mlflow": MLflow,
            "wandb": WeightsAndBiases,
        }
        self._note = note
        self._trackers: dict[str, Tracker] = {}
        for name in names(subject.track):
            made = self._attempt(name, lambda make=makers[name]: make(subject))  # type: ignore[misc]
            if made is not None:
                self._trackers[name] = made

    def epoch(self, row: Mapping[str, Any], picture: Picture | None) -> None:
        """Tell all of an epoch.

        Args:
            row: of the training's history.
            picture: what the student makes of a few images, if there is one.
        """
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key not in _UNTOLD}
        values = {_NUMBERS.get(key, f"loss/{key}"): float(value) for key, value in numbers.items()}
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, lambda t=tracker: t.epoch(int(row["epoch"]), values, picture))  # type: ignore[misc]

    def close(self) -> None:
        """Let all finish."""
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.close)

    def _attempt(self, name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # a server that does not answer must not end a training
            self._trackers.pop(name, None)
            self._note(f"tracking by {name} is given up: {' '.join(str(error).split())[:200] or repr(error)}")
            return None


class TensorBoard:
    """Events in the run's folder `tensorboard`: `tensorboard --logdir RUN/tensorboard --reload_multifile true`."""

    def __init__(self, subject: Subject) -> None:
        self._folder = storage.join(subject.uri, "tensorboard")

    def epoch(self, number: int, values: Mapping[str, float], picture: Picture | None) -> None:
        """See `Tracker`."""
        from tensorboardX import SummaryWriter

        with tempfile.TemporaryDirectory() as folder:
            with SummaryWriter(folder) as writer:
                for name, value in values.items():
                    writer.add_scalar(name, value, number)
                if picture is not None:
                    writer.add_image(_PICTURE, picture, number, dataformats="HWC")
            (file,) = Path(folder).iterdir()
            # TensorBoard reads what has tfevents in its name, in the order of names.
            storage.write_bytes(storage.join(self._folder, f"events.out.tfevents.{number:06d}"), file.read_bytes())

    def close(self) -> None:
        """See `Tracker`."""


class MLflow:
    """A run of the experiment `transfgu`, where `MLFLOW_TRACKING_URI` says."""

    def __init__(self, subject: Subject) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        uri = storage.shown(storage.absolute(subject.uri))
        experiment = self._client.get_experiment_by_name("transfgu")
        number = experiment.experiment_id if experiment else self._client.create_experiment("transfgu")
        found = self._client.search_runs([number], f"tags.`transfgu.run` = '{uri}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            return
        self._run = self._client.create_run(number, tags={"transfgu.run": uri}, run_name=subject.title).info.run_id
        for name, value in subject.fields.items():
            self._client.log_param(self._run, name, str(value)[:500])

    def epoch(self, number: int, values: Mapping[str, float], picture: Picture | None) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=number)
        if picture is not None:
            self._client.log_image(self._run, Image.fromarray(picture), f"{_PICTURE}/{number:06d}.png")

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._run)


class WeightsAndBiases:
    """A run of the project `transfgu`, by the key and in the mode that wandb itself finds."""

    def __init__(self, subject: Subject) -> None:
        import wandb

        self._image = wandb.Image
        uri = storage.shown(storage.absolute(subject.uri))
        self._run = wandb.init(
            project="transfgu",
            id=hashlib.sha256(uri.encode()).hexdigest()[:16],
            name=subject.title,
            resume="allow",
            config={**subject.fields, "run": uri},
            settings=wandb.Settings(silent=True),
        )

    def epoch(self, number: int, values: Mapping[str, float], picture: Picture | None) -> None:
        """See `Tracker`."""
        shown = {} if picture is None else {_PICTURE: self._image(Image.fromarray(picture))}
        self._run.log({**values, **shown}, step=number)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


# The picture: who paints it is not who tells of it, so it lies in the run's folder meanwhile.


def picture_file(folder: str, epoch: int) -> str:
    """URI of the picture of an epoch, from 1, in the folder that the trainer paints in."""
    return storage.join(folder, f"epoch-{epoch:06d}.png")


def write_picture(folder: str, epoch: int, pairs: Sequence[tuple[Picture, Picture]]) -> None:
    """Write an epoch's picture.

    Args:
        folder: URI.
        epoch: from 1.
        pairs: image and painted prediction of the same size, all of one; in rows of two pairs.
    """
    rows = [
        np.concatenate([part for pair in pairs[i : i + 2] for part in pair], axis=1) for i in range(0, len(pairs), 2)
    ]
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    sink = io.BytesIO()
    Image.fromarray(np.concatenate(padded)).save(sink, "PNG")
    storage.write_bytes(picture_file(folder, epoch), sink.getvalue())


def read_picture(folder: str, epoch: int) -> Picture | None:
    """An epoch's picture, if there is one."""
    data = storage.read_bytes_or_none(picture_file(folder, epoch))
    return None if data is None else np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
