"""Keep the artefacts of a run: an artefact is complete when its manifest exists, which is written last.

A stage can be stopped at any time. A stage that runs again keeps its complete part files; other stages read the
artefact only after `manifest.json` has been written. The manifest holds the fields of the recipe that the artefact
depends on, so a run with other fields is refused, and the error names the fields that differ.
"""

import functools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transfgu import formats
from transfgu.errors import LeftOut, UserError
from transfgu.methods import TRANSFGU, method
from transfgu.recipe import Recipe, from_yaml, given_in, upgraded
from transfgu.store import storage

MODEL = "model.safetensors"
"""The decoder in the run's folder: of the best epoch, or of the last if no validation image is labelled."""
SCORES = "evaluation/scores.json"
"""Results of the evaluation."""
BESIDE = "run:"
"""Prefix of `encoder.weights` in a recipe: a file in the folder of the recipe."""
REUSED = "reused.json"
"""File in the run's folder with the stages taken from other runs: URIs of artefacts by stage."""
LAST = "last.safetensors"
"""The decoder of the last epoch, in the training artefact."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a stage.

    Args:
        items: number of processed inputs, mostly images, including those of an earlier, interrupted attempt.
        left_out: inputs that could not be used.
        details: small, JSON-ready facts for the report, such as the number of windows or the final inertia.
    """

    items: int
    left_out: tuple[LeftOut, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a complete artefact."""

    stage: str
    digest: str
    fields: dict[str, Any]
    seconds: float
    outcome: Outcome

    def to_json(self) -> str:
        """Return the manifest as JSON, which :meth:`from_json` reads."""
        tree = {
            "stage": self.stage,
            "digest": self.digest,
            "fields": self.fields,
            "seconds": self.seconds,
            "items": self.outcome.items,
            "left_out": [vars(x) for x in self.outcome.left_out],
            "details": self.outcome.details,
        }
        return json.dumps(formats.stamp(tree), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "the manifest", remedy: str = "compute it again") -> "Manifest":
        """Read the result of :meth:`to_json`, of this version or an earlier one.

        Args:
            text: content of the file.
            name: name of the file in error messages.
            remedy: remedy for a damaged file.

        Raises:
            UserError: the text is not a manifest, or has a newer format.
        """
        tree = formats.read_json(text, name, remedy)
        with formats.damage(name, remedy):
            outcome = Outcome(
                items=int(tree["items"]),
                left_out=tuple(LeftOut(**x) for x in tree["left_out"]),
                details=dict(tree["details"]),
            )
            return cls(
                stage=str(tree["stage"]),
                digest=str(tree["digest"]),
                fields=dict(tree["fields"]),
                seconds=float(tree["seconds"]),
                outcome=outcome,
            )


def read_json(uri: str, remedy: str) -> dict[str, Any] | None:
    """Read a JSON object of a run and check its format.

    Args:
        uri: of the file.
        remedy: remedy for a damaged file.

    Returns:
        The object without its format number; None if there is no such file.

    Raises:
        UserError: the file is damaged, or has a newer format.
    """
    text = storage.read_bytes_or_none(uri)
    return None if text is None else formats.read_json(text, storage.shown(uri), remedy)


@dataclass(frozen=True)
class Artifact:
    """The folder of a stage's results in a run."""

    stage: str
    uri: str

    def file(self, name: str) -> str:
        """Return the URI of a file of this artefact."""
        return storage.join(self.uri, name)

    def manifest(self) -> Manifest | None:
        """Read the manifest; returns None if the artefact is not complete."""
        uri = self.file("manifest.json")
        text = storage.read_bytes_or_none(uri)
        return None if text is None else Manifest.from_json(text, storage.shown(uri), self._remedy)

    @property
    def _remedy(self) -> str:
        return f"delete the folder {storage.shown(self.uri)}, and run the same command again"

    def check_method(self, recipe: Recipe) -> None:
        """Refuse an artefact that another method made, completely or in part.

        Raises:
            UserError: it belongs to another method; the message names it.
        """
        held = self._held()
        if held is None:
            return
        theirs, asked = (str(fields.get("method", TRANSFGU)) for fields in (held, recipe.stage_fields(self.stage)))
        if theirs != asked:
            raise UserError(
                f"{self.uri} holds the work of another method, {theirs} (asked: {recipe.method}): choose another "
                f"--run, or continue that one with --method {theirs}",
                code="run-of-another-method",
            )

    def check(self, recipe: Recipe) -> bool:
        """Return True if the artefact is complete.

        False means: nothing yet, an interrupted attempt of `recipe`, or a training with fewer epochs that `recipe`
        continues (:meth:`is_shorter`).

        Raises:
            UserError: it was made, completely or in part, by another recipe; the message names the fields that differ.
        """
        differing = self.differences(recipe)
        if differing and not self.is_shorter(recipe, differing):
            raise UserError(
                f"{self.uri} holds another recipe's work, differing in {in_words(differing)}: "
                "choose another --run, or delete that folder",
                code="recipe-mismatch",
            )
        return not differing and self.manifest() is not None

    def differences(self, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
        """Return the fields in which the artefact, complete or started, belongs to another recipe.

        Returns:
            Existing and requested value, by dotted name; empty if there is nothing yet.

        Raises:
            UserError: the manifest is damaged, or has a newer format.
        """
        held = self._held()
        if held is None:
            return {}
        wanted = recipe.stage_fields(self.stage)
        held = {n: value for n, value in upgraded(held).items() if n in held or n in wanted}
        return {
            n: (held.get(n), wanted.get(n)) for n in dict.fromkeys([*held, *wanted]) if held.get(n) != wanted.get(n)
        }

    def is_shorter(self, recipe: Recipe, differing: Mapping[str, tuple[Any, Any]]) -> bool:
        """Return True if `recipe` is the artefact's with more epochs, so that training can continue from its last one.

        Args:
            recipe: the requested recipe.
            differing: the :meth:`differences` from it.
        """
        if self.stage not in ("training", "evaluation") or list(differing) != [EPOCHS]:
            return False
        there, asked = differing[EPOCHS]
        return isinstance(there, int) and there < asked and not method(recipe.method).anneals

    def _held(self) -> dict[str, Any] | None:
        """Return the fields of the artefact, complete or not; None if there is none."""
        manifest = self.manifest()
        if manifest:
            return manifest.fields
        return read_json(self.file("fields.json"), self._remedy)

    def begin(self, recipe: Recipe) -> None:
        """Claim the folder for `recipe`, before the first part is written; a shorter training is no longer complete."""
        fields = formats.stamp(recipe.stage_fields(self.stage))
        storage.write_bytes(self.file("fields.json"), json.dumps(fields, indent=1).encode())
        if storage.exists(self.file("manifest.json")):
            storage.delete(self.file("manifest.json"))

    def commit(self, recipe: Recipe, outcome: Outcome, started: float) -> Manifest:
        """Declare the artefact complete; `started` is the attempt's start by :func:`time.monotonic`."""
        manifest = Manifest(
            stage=self.stage,
            digest=recipe.digest(self.stage),
            fields=recipe.stage_fields(self.stage),
            seconds=round(time.monotonic() - started, 3),
            outcome=outcome,
        )
        storage.write_bytes(self.file("manifest.json"), manifest.to_json().encode())
        return manifest


EPOCHS = "training.epochs"


def in_words(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Return :meth:`Artifact.differences` as text: ``training.epochs (10 there, 20 asked)``."""
    return ", ".join(f"{n} ({_shown(there)} there, {_shown(asked)} asked)" for n, (there, asked) in differing.items())


def _shown(value: Any) -> str:
    return "nothing" if value is None or value == "" else str(value)


@dataclass(frozen=True)
class Run:
    """A run's folder, on any storage.

    It holds `recipe.yaml`, one folder per stage, `model.safetensors`, `metrics.json`, `report.html`, and `ray/`:
    Ray's own state, which evaluation, prediction and `Segmenter` never read.

    Args:
        uri: of the folder.
        links: URIs of artefacts in other runs' folders, by stage, that this run uses; None: what :data:`REUSED` lists.
    """

    uri: str
    links: Mapping[str, str] | None = field(default=None, kw_only=True, compare=False)

    def recipe(self) -> Recipe:
        """Read the recipe of the run, or of a model's folder; weights next to it get their URI.

        Raises:
            UserError: the folder holds no recipe, a damaged one, or one of a format to come.
        """
        uri = self.file("recipe.yaml")
        text = storage.read_bytes_or_none(uri)
        if text is None:
            raise UserError(
                f"{storage.shown(self.uri)} is not the folder of a run (it has no recipe.yaml): "
                "give the --run of transfgu train",
                code="run-missing",
            )
        recipe = from_yaml(text, storage.shown(uri), resolved=True)
        if recipe.encoder.weights.startswith(BESIDE):
            recipe = recipe.with_fields({"encoder.weights": self.file(recipe.encoder.weights.removeprefix(BESIDE))})
        return recipe

    def continued(self, asked: Recipe) -> Recipe:
        """Return `asked` with the run's own value in each field that its user gave neither then nor now.

        A preset may have changed since the run was made; its values then still hold for that run.

        Args:
            asked: the recipe of a command that continues the run.

        Raises:
            UserError: the run's recipe is damaged, or of a format to come.
        """
        uri = self.file("recipe.yaml")
        text = storage.read_bytes_or_none(uri)
        if text is None:
            return asked
        held = from_yaml(text, storage.shown(uri), resolved=True)
        if (held.preset, held.method) != (asked.preset, asked.method):
            return asked
        given = self.given(asked)
        kept = {n: v for n, v in held.flat().items() if n not in given and not n.startswith("compute.")}
        return asked.with_fields(kept)

    def given(self, asked: Recipe) -> set[str]:
        """Return the dotted names of the fields that the user gave, in a command or when the run began.

        Args:
            asked: the recipe of the command, before :meth:`continued`.

        Raises:
            UserError: the run's recipe is damaged, or of a format to come.
        """
        uri = self.file("recipe.yaml")
        text = storage.read_bytes_or_none(uri)
        return asked.given() | (set() if text is None else given_in(text, storage.shown(uri)))

    def model(self) -> str:
        """Return the URI of the decoder that the run predicts by: other weights than its own where it scored such."""
        return self.recipe().decoder.weights or self.file(MODEL)

    def scores(self) -> dict[str, Any] | None:
        """Read the scores of the run's evaluation; None if it was not evaluated.

        Raises:
            UserError: the file is damaged, or of a format to come.
        """
        uri = self.file(SCORES)
        remedy = f"delete the folder {storage.shown(self.file('evaluation'))}, and train again to compute them"
        scores = read_json(uri, remedy)
        if scores is None:
            return None
        with formats.damage(storage.shown(uri), remedy):
            _ = scores["mean_iou"], scores["pixel_accuracy"], scores["iou"], scores["assignment"]
            dict(scores.get("last", {}))
            clusters = scores["assignment"]
            if clusters is not None and sorted(clusters) != list(range(len(scores["iou"]))):
                raise ValueError("each class has a cluster of its own")
        return scores

    def history(self) -> list[dict[str, Any]]:
        """Read the training's history: one row per epoch.

        Raises:
            UserError: there is none, or it is damaged.
        """
        uri = self.artifact("training").file("history.json")
        remedy = f"delete the folder {storage.shown(self.file('training'))}, and the same command trains again"
        data = storage.read_bytes(uri)
        with formats.damage(storage.shown(uri), remedy):
            rows = json.loads(data)
            return [{**row, "epoch": int(row["epoch"])} for row in rows]

    def artifact(self, stage: str) -> Artifact:
        """Return the folder of a stage's results: this run's own, or that of the run from which the stage is taken."""
        return Artifact(stage, self.reused().get(stage) or self.file(stage))

    def reused(self) -> Mapping[str, str]:
        """Return the URIs of the artefacts that the run takes from other runs, by stage.

        The file that lists them is read once per `Run`.

        Raises:
            UserError: the file is damaged, or of a format to come.
        """
        return self._read_reused if self.links is None else self.links

    @functools.cached_property
    def _read_reused(self) -> Mapping[str, str]:
        uri, remedy = self.file(REUSED), "give --reuse RUN again to restore it"
        tree = read_json(uri, remedy)
        if tree is None:
            return {}
        with formats.damage(storage.shown(uri), remedy):
            return {str(stage): str(place) for stage, place in tree["stages"].items()}

    def file(self, name: str) -> str:
        """Return the URI of a file of the run."""
        return storage.join(self.uri, name)
