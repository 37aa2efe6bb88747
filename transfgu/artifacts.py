"""What a run keeps where: an artefact exists once its manifest does, and the manifest is written last, in one piece.

A stage may be stopped at any instant. What it wrote before counts only as far as it says so itself (complete part
files), and what it made counts for others once `manifest.json` lies beside it. The manifest holds the recipe's fields
that the artefact depends on, so another recipe's work is refused by naming the fields that differ.
"""

import json
import time
from dataclasses import dataclass, field
from typing import Any

from transfgu import storage
from transfgu.errors import UserError
from transfgu.recipe import Recipe

MODEL = "model.safetensors"
"""The run's decoder, in the run's folder: of the best epoch, or of the last where no validation image is labelled."""
LAST = "last.safetensors"
"""The decoder of the last epoch, in the training artefact."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """One input that was not used: its name in the data set, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a stage reports when it is done.

    Args:
        items: inputs it worked through, images mostly; those of an earlier, interrupted attempt included.
        left_out: inputs that could not be used.
        details: small, JSON-ready facts for the report, such as the number of windows or the final inertia.
    """

    items: int
    left_out: tuple[LeftOut, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete artefact's certificate."""

    stage: str
    digest: str
    fields: dict[str, Any]
    seconds: float
    outcome: Outcome

    def to_json(self) -> str:
        """As JSON text; :meth:`from_json` reads it back."""
        return json.dumps(
            {
                "stage": self.stage,
                "digest": self.digest,
                "fields": self.fields,
                "seconds": self.seconds,
                "items": self.outcome.items,
                "left_out": [vars(x) for x in self.outcome.left_out],
                "details": self.outcome.details,
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises ValueError or KeyError where the text is no manifest."""
        tree = json.loads(text)
        outcome = Outcome(
            items=tree["items"], left_out=tuple(LeftOut(**x) for x in tree["left_out"]), details=tree["details"]
        )
        return cls(
            stage=tree["stage"], digest=tree["digest"], fields=tree["fields"], seconds=tree["seconds"], outcome=outcome
        )


@dataclass(frozen=True)
class Artifact:
    """The folder of one stage's results within a run."""

    stage: str
    uri: str

    def file(self, name: str) -> str:
        """URI of a file of this artefact."""
        return storage.join(self.uri, name)

    def manifest(self) -> Manifest | None:
        """The certificate, or None while the artefact is not complete."""
        text = storage.read_bytes_or_none(self.file("manifest.json"))
        if text is None:
            return None
        try:
            return Manifest.from_json(text.decode())
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.file('manifest.json')} is damaged: delete the folder {self.uri} to make it anew"
            ) from None

    def check(self, recipe: Recipe) -> bool:
        """Whether the artefact is complete; False where there is nothing yet, or an interrupted attempt of `recipe`.

        Raises:
            UserError: it holds what another recipe made, if only in part; the message names the fields that differ.
        """
        manifest = self.manifest()
        started = storage.read_bytes_or_none(self.file("fields.json"))
        held = manifest.fields if manifest else json.loads(started) if started else None
        wanted = recipe.stage_fields(self.stage)
        if held is not None and held != wanted:
            differing = [
                f"{n} ({_shown(held.get(n))} there, {_shown(wanted.get(n))} asked)"
                for n in dict.fromkeys([*held, *wanted])
                if held.get(n) != wanted.get(n)
            ]
            raise UserError(
                f"{self.uri} holds another recipe's work, differing in {', '.join(differing)}: "
                "choose another --run, or delete that folder"
            )
        return manifest is not None

    def begin(self, recipe: Recipe) -> None:
        """Claim the folder for `recipe`, before the first part is written."""
        storage.write_bytes(self.file("fields.json"), json.dumps(recipe.stage_fields(self.stage), indent=1).encode())

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


def _shown(value: Any) -> str:
    return "nothing" if value is None or value == "" else str(value)


@dataclass(frozen=True)
class Run:
    """A run's folder, on any storage.

    It holds `recipe.yaml`, one folder a stage, `model.safetensors`, `metrics.json`, `report.html`, and `ray/`:
    Ray's own state, which evaluation, prediction and `Segmenter` never read.
    """

    uri: str

    def artifact(self, stage: str) -> Artifact:
        """The folder of a stage's results."""
        return Artifact(stage, self.file(stage))

    def file(self, name: str) -> str:
        """URI of a file of the run."""
        return storage.join(self.uri, name)
