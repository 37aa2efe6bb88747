"""Take the stages that another run's recipe shares with this one, without copying.

A stage depends on its own fields and on those of all stages before it. So two runs share their first stages: features
for another number of concepts, pseudo labels for other weights of the losses. The run that reuses them stores their
URIs in one small file, and `Run.artifact` returns these.
"""

import json

from transfgu import formats
from transfgu.errors import UserError
from transfgu.fields import written
from transfgu.recipe import Recipe
from transfgu.store import storage
from transfgu.store.artifacts import REUSED, Artifact, Run, in_words


def linked(recipe: Recipe, run: Run, other: Run) -> tuple[Run, str]:
    """Find the stages of `other` that `recipe` shares and `run` has not completed itself; nothing is written.

    Args:
        recipe: resolved recipe of `run`.
        run: the run that needs the stages.
        other: the run that may have them.

    Returns:
        `run` with the places of these stages, and the reason why the next stage is not shared, as text; empty if all
            are.

    Raises:
        UserError: `other` is not a run, is `run` itself, or shares no stage.
    """
    if storage.absolute(other.uri) == storage.absolute(run.uri):
        raise UserError(
            f"--reuse and --run name the same folder, {storage.shown(run.uri)}: give the new run a folder of its own",
            code="reuse-same",
        )
    other.recipe()  # refuses a folder without a run
    links: dict[str, str] = {}
    why = ""
    for stage in recipe.stages:
        if Artifact(stage, run.file(stage)).manifest() is not None:
            continue
        held = other.artifact(stage)
        if differing := held.differences(recipe):
            why = f"{stage} differs in {in_words(differing)}"
            break
        if held.manifest() is None:
            why = f"{stage} is not complete there"
            break
        if stage not in ("training", "evaluation"):  # because their model is in another folder
            links[stage] = storage.absolute(held.uri)
    if not links and why.startswith(recipe.stages[0]):
        raise UserError(
            f"{storage.shown(other.uri)} shares no stage with this run: {why}; leave out --reuse, or change the recipe",
            code="reuse-nothing",
        )
    return Run(run.uri, links=links), why


def preset_note(asked: Recipe, recipe: Recipe, other: Run) -> str:
    """Name the fields in which a run has its preset's values, and the reused run has others.

    Args:
        asked: recipe of the command; fields that it changes from the preset were asked for.
        recipe: the same recipe, resolved.
        other: the reused run.

    Returns:
        The fields with both values, and the remedy, as one line; empty if there are none.
    """
    there, left_out = other.recipe().flat(), asked.given() | {"preset", "method"} | recipe.others_fields().keys()
    differing = {
        name: (there[name], value)
        for name, value in recipe.flat().items()
        if there[name] != value and name not in left_out and not name.startswith("compute.")
    }
    if not differing:
        return ""
    return (
        f"values of the preset {recipe.preset}, where {storage.shown(other.uri)} has others: {in_words(differing)}; "
        "without PRESET or --recipe, those are taken"
    )


def write(run: Run) -> None:
    """Write the places of the stages that a run of :func:`linked` takes from others into its folder."""
    stages = dict(run.reused())
    if stages:
        storage.write_bytes(run.file(REUSED), json.dumps(formats.stamp({"stages": stages}), indent=1).encode())
    elif storage.exists(run.file(REUSED)):
        storage.delete(run.file(REUSED))


def check_present(run: Run) -> None:
    """Refuse a run whose reused stages are missing.

    Raises:
        UserError: the folder of a stage, in another run, is no longer complete.
    """
    for stage, uri in run.reused().items():
        if Artifact(stage, uri).manifest() is None:
            raise UserError(
                f"{storage.shown(run.uri)} takes its {stage} from {storage.shown(uri)}, which is no longer there: "
                f"give --reuse RUN with the run's new place, or delete {REUSED} to compute the stage here",
                code="reuse-missing",
            )


def check_same(recipe: Recipe, run: Run) -> None:
    """Refuse a run's folder with another recipe's work, and show the command that shares what can be shared.

    Raises:
        UserError: a stage, complete or started, belongs to another recipe.
    """
    for index, stage in enumerate(recipe.stages):
        artifact = run.artifact(stage)
        differing = artifact.differences(recipe)
        if not differing or artifact.is_shorter(recipe, differing):
            continue
        try:
            there = run.recipe().flat() if index else None
        except UserError:  # for example in a folder that was started by a stage alone
            there = None
        if there is None:
            artifact.check(recipe)  # raises
            continue
        flags = [
            f"--{name} {written(value)}"
            for name, value in recipe.flat().items()
            if value != there[name] and not name.startswith("compute.")
        ]
        uri = storage.shown(run.uri).rstrip("/")
        number = next(n for n in range(2, 1000) if not storage.exists(f"{run.uri.rstrip('/')}-{n}"))
        raise UserError(
            f"{storage.shown(artifact.uri)} holds another recipe's work, differing in {in_words(differing)}: "
            f"{', '.join(recipe.stages[index:])} differ, {', '.join(recipe.stages[:index])} can be shared by "
            f"transfgu train --reuse {uri} --run {uri}-{number} {' '.join(flags)}",
            code="recipe-mismatch",
        )
