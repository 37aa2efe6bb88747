"""Report each epoch to all requested trackers: its losses and scores, and a picture of the student's predictions.

TensorBoard gets a file of events per epoch in the run's own folder, on any storage; a repeated epoch replaces its file,
so a curve never has two values for one epoch. MLflow and Weights & Biases have their own run, which is found again by
the run's URI. A tracker that fails is dropped with a message; training continues.
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

from transfgu.datasets.images import encoded
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
"""Columns of the history and their names for trackers; all others are losses."""
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
    """A tracked run."""

    track: str
    """Names of trackers, separated by commas; see `ComputeRecipe.track`."""
    uri: str
    """Folder of the run: it contains the events, and trackers find their own run again by it."""
    title: str
    fields: Mapping[str, Any]
    """Settings by name."""


def subject(recipe: Recipe, run: Run) -> Subject:
    """Return a run as trackers identify it."""
    return Subject(
        track=recipe.compute.track,
        uri=run.uri,
        title=f"{recipe.preset}, seed {recipe.seed}",
        fields=recipe.flat(),
    )


def names(track: str) -> list[str]:
    """Return the trackers that a text names, separated by commas or spaces.

    Raises:
        UserError: an unknown tracker, or one whose package is not installed.
    """
    asked = [name for name in track.replace(",", " ").split() if name != "none"]
    for name in asked:
        if name not in PACKAGES:
            raise UserError(
                f"--track does not know {name}: choose from {', '.join(PACKAGES)}, or none", code="tracker-unknown"
            )
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"--track {name} requires the package {name}: pip install {PACKAGES[name]}", code="package-missing"
            )
    return asked


class Tracker(Protocol):
    """The interface of trackers."""

    def epoch(self, number: int, values: Mapping[str, float], picture: Picture | None) -> None:
        """Report the results of the epoch of this number, counted from 1."""
        ...

    def close(self) -> None:
        """Finish: there are no more epochs."""
        ...


class Trackers:
    """All requested trackers; an error in one of them does not affect the others."""

    def __init__(self, subject: Subject, note: Callable[[str], None]) -> None:
        """Set up the trackers; `note` is called with the reason if one is dropped."""
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
        """Report an epoch to all trackers.

        Args:
            row: row of the training's history.
            picture: the student's predictions for a few images, if there is a picture.
        """
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key not in _UNTOLD}
        values = {_NUMBERS.get(key, f"loss/{key}"): float(value) for key, value in numbers.items()}
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, lambda t=tracker: t.epoch(int(row["epoch"]), values, picture))  # type: ignore[misc]

    def close(self) -> None:
        """Finish all trackers."""
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.close)

    def _attempt(self, name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # a server that does not answer must not stop a training
            self._trackers.pop(name, None)
            self._note(f"tracking with {name} has stopped: {' '.join(str(error).split())[:200] or repr(error)}")
            return None


class TensorBoard:
    """Writes events to the run's folder; `tensorboard --logdir RUN/tensorboard --reload_multifile true` shows them."""

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
            # TensorBoard reads files with tfevents in their names, in the order of names.
            storage.write_bytes(storage.join(self._folder, f"events.out.tfevents.{number:06d}"), file.read_bytes())

    def close(self) -> None:
        """See `Tracker`."""


class MLflow:
    """A run of the experiment `transfgu`, at `MLFLOW_TRACKING_URI`."""

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
    """A run of the project `transfgu`, with the key and the mode that wandb itself finds."""

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


# The picture is stored in the run's folder, because one class draws it and another reports it.


def picture_file(folder: str, epoch: int) -> str:
    """Return the URI of the picture of an epoch, counted from 1, in the folder of pictures."""
    return storage.join(folder, f"epoch-{epoch:06d}.png")


def write_picture(folder: str, epoch: int, pairs: Sequence[tuple[Picture, Picture]]) -> None:
    """Write an epoch's picture.

    Args:
        folder: URI of the folder of pictures.
        epoch: counted from 1.
        pairs: image and coloured prediction, all of the same size; in rows of two pairs.
    """
    rows = [
        np.concatenate([part for pair in pairs[i : i + 2] for part in pair], axis=1) for i in range(0, len(pairs), 2)
    ]
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    storage.write_bytes(picture_file(folder, epoch), encoded(Image.fromarray(np.concatenate(padded)), "PNG"))


def read_picture(folder: str, epoch: int) -> Picture | None:
    """Return an epoch's picture, if there is one."""
    data = storage.read_bytes_or_none(picture_file(folder, epoch))
    return None if data is None else np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
