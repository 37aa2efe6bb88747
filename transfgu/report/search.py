"""Write the report of a search: which values scored well, in one HTML file.

It is made from the records of the trials only, and loads nothing from elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from transfgu.recipe import FIELDS
from transfgu.report import charts, page
from transfgu.report.charts import Axis, Mark
from transfgu.search import space
from transfgu.search.space import Range
from transfgu.search.trials import OBJECTIVES, Search, Trial, best, ranked
from transfgu.store import storage

_OBJECTIVE = {"mean_iou": "mIoU, %", "label_free": "label_free, %"}
_MARGIN = 0.05  # of an axis beyond its values


def write(search: Search, trials: Sequence[Trial], metrics: Mapping[str, Any]) -> str:
    """Write `report.html` into the search's folder; returns its URI.

    Args:
        search: settings of the search.
        trials: records of its trials.
        metrics: the content of the search's `metrics.json`.
    """
    uri = search.file("report.html")
    storage.write_bytes(uri, render(search, trials, metrics).encode())
    return uri


def render(search: Search, trials: Sequence[Trial], metrics: Mapping[str, Any]) -> str:
    """Return the report as HTML; arguments as in :func:`write`."""
    winner = best(trials, search.objective)
    objective = _OBJECTIVE[search.objective]
    return page.template("search.html").render(
        search=search,
        metrics=metrics,
        objective=objective,
        winner=winner.summary() if winner else None,
        ranges=[_Searched.of(r, search) for r in search.space.ranges],
        rows=[_Row.of(trial) for trial in ranked(trials, search.objective)],
        names=[_short(name) for name in search.space.names],
        parallel=_parallel(search, trials, winner) if winner else None,
        responses=_responses(search, trials, winner) if winner else [],
        curves=_curves(search, trials, winner) if winner else None,
        rank=_rank(trials, winner) if winner else None,
        yaml=space.apply(search.recipe, winner.parameters).to_yaml() if winner else "",
    )


@dataclass(frozen=True, kw_only=True)
class _Searched:
    """A searched field as text."""

    name: str
    range: str
    start: str
    doc: str

    @classmethod
    def of(cls, r: Range, search: Search) -> "_Searched":
        flat = search.recipe.flat()
        if r.name == space.ALPHA:
            start = "{:g}, rising by {:g} to {:g}".format(
                *(flat[f"training.alpha_{n}"] for n in ("start", "step", "end"))
            )
            return cls(
                name=r.name,
                range=str(r).partition("=")[2],
                start=start,
                doc="weight of the negative labels, constant",
            )
        return cls(name=r.name, range=str(r).partition("=")[2], start=f"{flat[r.name]:g}", doc=FIELDS[r.name].doc)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """The row of a trial in the table, as text."""

    number: int
    values: list[str]
    scores: list[str]
    epochs: int
    status: str
    reason: str

    @classmethod
    def of(cls, trial: Trial) -> "_Row":
        return cls(
            number=trial.number,
            values=[f"{value:.4g}" for value in trial.parameters.values()],
            scores=["–" if v is None else f"{v:.2f}" for v in map(trial.value, OBJECTIVES)],
            epochs=len(trial.history),
            status=trial.summary()["status"],
            reason=trial.reason,
        )


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _kind(trial: Trial, winner: Trial | None) -> str:
    if winner and trial.number == winner.number:
        return "best"
    return "finished" if trial.status == "finished" else "stopped"


def _scored(search: Search, trials: Sequence[Trial]) -> list[tuple[Trial, float]]:
    pairs = [(trial, trial.value(search.objective)) for trial in trials]
    return [(trial, value) for trial, value in pairs if value is not None]


def _axis(name: str, values: Sequence[float], *, log: bool = False) -> Axis:
    """Return an axis that is slightly longer than the range of the values."""
    low, high = min(values), max(values)
    if log:
        return Axis(name=name, low=low, high=high, log=True)
    margin = _MARGIN * (high - low) or max(abs(high), 1.0) * _MARGIN
    return Axis(name=name, low=low - margin, high=high + margin)


def _range_axis(r: Range) -> Axis:
    if r.log:
        return Axis(name=_short(r.name), low=float(r.values[0]), high=float(r.values[1]), log=True)
    return _axis(_short(r.name), [float(v) for v in r.values])


def _parallel(search: Search, trials: Sequence[Trial], winner: Trial) -> Markup:
    scored = _scored(search, trials)
    axes = [_range_axis(r) for r in search.space.ranges]
    axes.append(_axis(_OBJECTIVE[search.objective], [value for _, value in scored]))
    marks = [
        Mark(
            points=[(float(i), float(v)) for i, v in enumerate([*trial.parameters.values(), value])],
            kind=_kind(trial, winner),
            name=f"trial {trial.number}",
        )
        for trial, value in scored
    ]
    return charts.parallel_chart("Values and score of each trial", axes, marks)


def _responses(search: Search, trials: Sequence[Trial], winner: Trial) -> list[tuple[str, Markup]]:
    scored = _scored(search, trials)
    y = _axis(_OBJECTIVE[search.objective], [value for _, value in scored])
    drawn = []
    for r in search.space.ranges:
        marks = [
            Mark(
                points=[(float(trial.parameters[r.name]), value)],
                kind=_kind(trial, winner),
                name=f"{trial.parameters[r.name]:.3g}",
            )
            for trial, value in scored
        ]
        title = f"{_OBJECTIVE[search.objective]} against {r.name}"
        drawn.append((title, charts.scatter_chart(title, marks, x=_range_axis(r), y=y)))
    return drawn


def _curves(search: Search, trials: Sequence[Trial], winner: Trial) -> Markup:
    points = {
        trial.number: [
            (float(row["epoch"]), float(row[search.objective]))
            for row in trial.history
            if row.get(search.objective) is not None
        ]
        for trial in trials
    }
    marks = [
        Mark(points=points[trial.number], kind=_kind(trial, winner), name=f"trial {trial.number}")
        for trial in trials
        if points[trial.number]
    ]
    flat = [point for found in points.values() for point in found]
    last = max(trial.epochs for trial in trials)
    x = Axis(name="epoch", low=1.0, high=float(max(last, 2)), whole=True)
    y = _axis(_OBJECTIVE[search.objective], [value for _, value in flat])
    return charts.curves_chart(f"{_OBJECTIVE[search.objective]} by epoch, one line per trial", marks, x=x, y=y)


def _rank(trials: Sequence[Trial], winner: Trial) -> Markup | None:
    """Return a chart of the label-free objective against mIoU; None without labels."""
    rows = [(trial, trial.history[-1]) for trial in trials if trial.history]
    pairs = [
        (trial, float(row["label_free"]), float(row["mean_iou"]))
        for trial, row in rows
        if row.get("label_free") is not None and row["mean_iou"] is not None
    ]
    if not pairs:
        return None
    marks = [Mark(points=[(x, y)], kind=_kind(trial, winner), name=f"trial {trial.number}") for trial, x, y in pairs]
    return charts.scatter_chart(
        "mIoU against label_free, after the last epoch of each trial",
        marks,
        x=_axis("label_free, %", [x for _, x, _ in pairs]),
        y=_axis("mIoU, %", [y for _, _, y in pairs]),
    )
