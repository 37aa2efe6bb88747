"""Show two or more runs side by side: the settings that differ, scores, classes, and durations of stages."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transfgu.cli.command_line import Parser
from transfgu.cli.status import State, state_of
from transfgu.fields import written
from transfgu.store import storage
from transfgu.store.artifacts import Run

_ABSENT = "-"


def parser() -> Parser:
    """Return the parser of `transfgu compare RUN RUN`."""
    made = Parser(__doc__ or "", "compare", "RUN RUN [RUN ...]")
    made.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs: the --run of `transfgu train`")
    made.add_argument("--json", action="store_true", help="print JSON: runs, recipe, scores, classes, seconds")
    return made


def compared(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the values in which runs differ, and their scores: one value per run, in their order.

    Returns:
        `runs` (URIs); `recipe`, the fields that differ, by dotted name; `scores`; `classes`, IoU in percent by name
            (None if a run does not have the class, or has no score); `seconds` by stage (None: not complete); `reused`,
            the stages that a run takes from another.

    Raises:
        UserError: a folder has no run, or a damaged one.
    """
    states = [state_of(run) for run in runs]
    flat = [state.recipe.flat() for state in states]
    fields = {name: [values[name] for values in flat] for name in flat[0]}
    classes = [state.metrics.get("iou") or {} for state in states]
    scores = {
        "mIoU, %": [state.metrics.get("mean_iou") for state in states],
        "pixel accuracy, %": [state.metrics.get("pixel_accuracy") for state in states],
        "model of epoch": [_epoch(state) for state in states],
    }
    stages = dict.fromkeys(stage for state in states for stage in state.recipe.stages)
    return {
        "runs": [storage.shown(run.uri) for run in runs],
        "recipe": {n: v for n, v in fields.items() if any(x != v[0] for x in v) and not n.startswith("compute.")},
        "scores": scores,
        "classes": {n: [c.get(n) for c in classes] for n in dict.fromkeys(name for c in classes for name in c)},
        "seconds": {
            s: [state.complete[s].seconds if s in state.complete else None for state in states] for s in stages
        },
        "reused": [list(run.reused()) for run in runs],
    }


def _epoch(state: State) -> int | None:
    training = state.complete.get("training")
    return training.outcome.details.get("model of epoch") if training else None


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return :func:`compared` as text: one column per run, and the difference if there are two runs."""
    two = len(found["runs"]) == 2
    names = [chr(ord("A") + i) for i in range(len(found["runs"]))]
    rows: list[list[str]] = [["", *names, *(["B - A"] if two else [])]]

    def numbers(name: str, values: Sequence[float | int | None], digits: int) -> list[str]:
        shown = [_ABSENT if v is None else f"{v:.{digits}f}" for v in values]
        first, second = values[0], values[-1]
        known = two and first is not None and second is not None
        return [f"  {name}", *shown, f"{second - first:+.{digits}f}" if known else ""]  # type: ignore[operator]

    rows.append(["settings that differ" if found["recipe"] else "no setting differs"])
    rows += [[f"  {name}", *(written(v) or '""' for v in values)] for name, values in found["recipe"].items()]
    rows.append(["scores"])
    rows += [numbers(name, values, 0 if "epoch" in name else 2) for name, values in found["scores"].items()]
    if found["classes"]:
        rows.append(["IoU by class, %"])
        rows += [numbers(name, values, 2) for name, values in found["classes"].items()]
    rows.append(["seconds by stage (* taken from another run)"])
    for stage, values in found["seconds"].items():
        row = numbers(stage, values, 1)
        for column, reused in enumerate(found["reused"], 1):
            row[column] += "*" if stage in reused else ""
        rows.append(row)
    table = [row for row in rows if len(row) > 1]
    widths = [max(len(row[i]) for row in table if i < len(row)) for i in range(max(map(len, table)))]
    text = [f"{name}  {uri}" for name, uri in zip(names, found["runs"], strict=True)]
    for row in rows:
        first = row[0].ljust(widths[0]) if len(row) > 1 else row[0]
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False))
        text.append("  ".join([first, *cells]).rstrip())
    return text


def main(words: Sequence[str]) -> None:
    """Print the comparison."""
    given = parser().parse(words)
    found = compared([Run(uri) for uri in given.runs])
    print(json.dumps(found, indent=1) if given.json else "\n".join(lines(found)))
