"""Show the state of a run: each stage, the process that works on it, its scores, and the next command.

`transfgu status RUN` reads the run's folder and changes nothing.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transfgu.cli.command_line import Parser
from transfgu.errors import counted
from transfgu.recipe import Recipe
from transfgu.store import storage
from transfgu.store.artifacts import Manifest, Run, read_json
from transfgu.store.lock import holder_of


@dataclass(frozen=True, kw_only=True)
class State:
    """The content of a run's folder.

    Args:
        recipe: recipe of the run.
        complete: manifests of complete stages, in order.
        begun: stages that have started and are not complete.
        holder: description of the process that works on it; None: none.
        metrics: the content of `metrics.json`; empty if there is none.
    """

    recipe: Recipe
    complete: dict[str, Manifest]
    begun: tuple[str, ...]
    holder: str | None
    metrics: dict[str, Any]

    @property
    def finished(self) -> bool:
        """True if every stage is complete."""
        return len(self.complete) == len(self.recipe.stages)

    @property
    def score(self) -> str:
        """MIoU and accuracy as text; empty if there are none."""
        if self.metrics.get("mean_iou") is None:
            return ""
        return f"mIoU {self.metrics['mean_iou']:.2f} %, pixel accuracy {self.metrics['pixel_accuracy']:.2f} %"


def state_of(run: Run) -> State:
    """Read the state of a run.

    Raises:
        UserError: the folder has no run, or a damaged one.
    """
    recipe = run.recipe()
    manifests = {stage: run.artifact(stage).manifest() for stage in recipe.stages}
    complete = {stage: manifest for stage, manifest in manifests.items() if manifest is not None}
    missing = (stage for stage in recipe.stages if stage not in complete)
    begun = tuple(stage for stage in missing if storage.exists(run.artifact(stage).file("fields.json")))
    metrics = read_json(run.file("metrics.json"), "delete it, and train again") or {}
    return State(recipe=recipe, complete=complete, begun=begun, holder=holder_of(run.uri), metrics=metrics)


def describe(run: Run) -> Iterator[str]:
    """Yield a description of a run's state, line by line."""
    state, uri = state_of(run), storage.shown(run.uri)
    classes, epochs = counted(state.recipe.classes, "class"), counted(state.recipe.training.epochs, "epoch")
    yield f"{uri}: {state.recipe.preset}, {classes}, {epochs}"
    for stage in state.recipe.stages:
        if stage in state.complete:
            manifest = state.complete[stage]
            left_out = len(manifest.outcome.left_out)
            note = f", {left_out} left out" if left_out else ""
            yield f"  {stage:13}  complete: {counted(manifest.outcome.items, 'image')}, {manifest.seconds:.1f} s{note}"
        else:
            yield f"  {stage:13}  {'begun' if stage in state.begun else 'not yet'}"
    if state.score:
        yield state.score
    if state.holder:
        yield f"{state.holder} works on it"
    elif state.finished:
        yield f"next: transfgu predict --run {uri} --images IMAGES --out MASKS"
    else:
        yield f"next: transfgu train --recipe {storage.join(uri, 'recipe.yaml')} --run {uri}"


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser."""
    made = Parser(__doc__ or "", "status", "RUN")
    made.add_argument("run", metavar="RUN", help="folder of a run: the --run of `transfgu train`")
    made.add_argument("--json", action="store_true", help="print JSON: stages, begun, holder, metrics")
    return made


def main(words: Sequence[str]) -> None:
    """Print the state of a run."""
    given = parser(words).parse(words)
    run = Run(given.run)
    if given.json:
        state = state_of(run)
        stages = {s: {"items": m.outcome.items, "seconds": m.seconds} for s, m in state.complete.items()}
        print(
            json.dumps(
                {"stages": stages, "begun": state.begun, "holder": state.holder, "metrics": state.metrics}, indent=1
            )
        )
        return
    for line in describe(run):
        print(line)
