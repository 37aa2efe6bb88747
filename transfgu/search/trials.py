"""Keep the records of a search's trials, and find the best trial in them.

`transfgu.search.tuning` passes the records to Ray Tune's searcher and scheduler, so a killed search continues from
them.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from transfgu import formats
from transfgu.errors import UserError, counted
from transfgu.methods import STAGES
from transfgu.recipe import Recipe, field_name
from transfgu.search import space as search_space
from transfgu.search.space import Parameters, Space
from transfgu.store import storage
from transfgu.training.checkpoints import merit

OBJECTIVES = ("mean_iou", "label_free")
SEARCHERS = ("random", "grid", "tpe")
SCHEDULERS = ("asha", "none")
STATUSES = ("finished", "stopped", "failed", "running")


@dataclass(frozen=True, kw_only=True)
class Search:
    """Settings of a search; checked when built."""

    recipe: Recipe
    """The recipe from which trials start."""
    uri: str
    """The search's folder."""
    space: Space
    trials: int
    objective: str = "mean_iou"
    searcher: str = "random"
    scheduler: str = "asha"
    grace: int = 1
    """Epochs before ASHA first compares trials."""
    reduction: int = 4
    """ASHA continues the best 1/reduction of trials."""
    concurrent: int = 0
    """Trials at a time; 0: as many as fit in the cluster."""
    workers_per_trial: int = 1
    gpus_per_trial: float = 0.0
    """0: one per worker, if there are GPUs."""
    hours: float = 0.0
    """0: no limit."""

    def __post_init__(self) -> None:
        positive = {"--trials": self.trials, "--workers-per-trial": self.workers_per_trial, "--grace": self.grace}
        for name, number in positive.items():
            if number <= 0:
                raise UserError(f"{name} must be positive, not {number}", code="flag-range")
        for name, limit in (
            ("--concurrent", self.concurrent),
            ("--gpus-per-trial", self.gpus_per_trial),
            ("--hours", self.hours),
        ):
            if not limit >= 0:
                raise UserError(f"{name} must not be negative, not {limit:g}", code="flag-range")
        if self.reduction < 2:
            raise UserError(f"--reduction must be at least 2, not {self.reduction}", code="flag-range")
        for name, value, known in (
            ("--objective", self.objective, OBJECTIVES),
            ("--searcher", self.searcher, SEARCHERS),
            ("--scheduler", self.scheduler, SCHEDULERS),
        ):
            if value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, not {value}", code="flag-invalid")
        if self.searcher == "grid":
            self.space.grid()
        elif listed := next((r for r in self.space.ranges if r.kind == "grid"), None):
            raise UserError(
                f"--search {listed} needs --searcher grid; for another searcher write {listed.name}=choice(...)",
                code="search-grid-unlisted",
            )
        layout = self.recipe.dataset.layout
        if self.objective == "mean_iou" and layout == "folder" and not self.recipe.labels:
            raise UserError(
                "--objective mean_iou requires labels, but there are none: give --labels, or --objective label_free",
                code="labels-missing",
            )

    @property
    def count(self) -> int:
        """The number of trials, limited by the size of a grid."""
        return min(self.trials, len(self.space.grid())) if self.searcher == "grid" else self.trials

    def file(self, name: str) -> str:
        """Return the URI of a file of the search."""
        return storage.join(self.uri, name)

    def identity(self) -> dict[str, Any]:
        """Return the settings that must be the same when a search is continued."""
        fields = {name: value for name, value in self.recipe.flat().items() if not name.startswith("compute.")}
        own = ("objective", "searcher", "scheduler", "grace", "reduction")
        return {**fields, "--search": self.space.shown(), **{f"--{name}": getattr(self, name) for name in own}}


@dataclass(kw_only=True)
class Trial:
    """One trial's record."""

    number: int
    """From 0 on."""
    parameters: Parameters
    epochs: int
    """Epochs of its recipe."""
    status: str = "running"
    """`running` (also if the search was stopped meanwhile), `finished`, `stopped` by the scheduler, or `failed`."""
    reason: str = ""
    """Reason of a failure or stop."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row per epoch, as reported by training."""
    stages: list[str] = field(default_factory=list)
    """Stages that were computed for this trial."""
    repeated: int = 0
    """Epochs that were trained twice, because a checkpoint was lost."""

    def add(self, row: dict[str, Any]) -> bool:
        """Add the row of an epoch; returns False if the epoch is known, as after a restart from a checkpoint."""
        if row["epoch"] <= len(self.history):
            self.repeated += row != self.history[row["epoch"] - 1]
            return False
        self.history.append(row)
        return True

    def value(self, objective: str, epochs: int | None = None) -> float | None:
        """Return the objective after `epochs` epochs (default: all); None without a score.

        For `mean_iou` it is the mIoU of the epoch with the highest mIoU + accuracy so far, whose decoder a run would
        keep. Without labels the last decoder is kept, so `label_free` is that of the last epoch.
        """
        rows = [row for row in self.history[:epochs] if row.get(objective) is not None]
        if not rows:
            return None
        chosen = max(rows, key=merit) if objective == "mean_iou" else rows[-1]
        return float(chosen[objective])

    def summary(self) -> dict[str, Any]:
        """Return the trial's row of `trials.json`."""
        best = max((row for row in self.history if row["mean_iou"] is not None), key=merit, default=None)
        last = self.history[-1] if self.history else {}
        return {
            "number": self.number,
            "parameters": self.parameters,
            "mean_iou": self.value("mean_iou"),
            "best_epoch": best["epoch"] if best else None,
            "last_mean_iou": last.get("mean_iou"),
            "label_free": self.value("label_free"),
            "epochs": len(self.history),
            "status": "unfinished" if self.status == "running" else self.status,
            "reason": self.reason,
            "repeated_epochs": self.repeated,
            "seconds": round(sum(row["seconds"] for row in self.history), 3),
            "stages": self.stages,
        }


def _read_trial(uri: str) -> Trial:
    """Return a trial's record; raise UserError if it is damaged or has a newer format."""
    name, remedy = storage.shown(uri), "delete it: the search runs that trial again"
    tree = formats.read_json(storage.read_bytes(uri), name, remedy)
    with formats.damage(name, remedy):
        trial = Trial(**tree)
        if trial.status not in STATUSES or not all(row["epoch"] for row in trial.history):
            raise ValueError(trial.status)
    parameters = {n if n == search_space.ALPHA else field_name(n): value for n, value in trial.parameters.items()}
    return replace(trial, parameters=parameters)


class Ledger:
    """The records of a search in its folder, `trials/0000.json` and so on; only one process writes them."""

    def __init__(self, uri: str) -> None:
        """Read the records of an earlier attempt in the search's folder `uri`."""
        self._uri = uri
        with ThreadPoolExecutor(16) as pool:
            found = sorted(
                pool.map(_read_trial, storage.list_files(storage.join(uri, "trials"))), key=lambda trial: trial.number
            )
        self.trials: dict[int, Trial] = {trial.number: trial for trial in found}
        self.storage_error: UserError | None = None
        """Failure of storage in this attempt, in a trial or of a record; no new trial is started."""

    @staticmethod
    def read(uri: str, number: int) -> Trial:
        """Read the record of trial `number` in the search's folder `uri`."""
        return _read_trial(Ledger._file(uri, number))

    @staticmethod
    def _file(uri: str, number: int) -> str:
        return storage.join(uri, f"trials/{number:04d}.json")

    def save(self, trial: Trial) -> None:
        """Write a new or changed record.

        Raises:
            UserError: it can't be written; it is also `storage_error` then, because Ray Tune wraps it in its own error.
        """
        self.trials[trial.number] = trial
        content = json.dumps(formats.stamp(asdict(trial)), indent=1)
        try:
            storage.write_bytes(self._file(self._uri, trial.number), content.encode())
        except UserError as error:
            self.storage_error = error
            raise

    def unfinished(self) -> list[Trial]:
        """Return the trials that an earlier attempt started and did not finish."""
        return [trial for trial in self.trials.values() if trial.status == "running"]


def best(trials: Iterable[Trial], objective: str) -> Trial | None:
    """Return the best finished trial; without finished trials, the best of all."""
    scored = [trial for trial in trials if trial.status != "failed" and trial.value(objective) is not None]
    ended = [trial for trial in scored if trial.status == "finished"]

    def value(trial: Trial) -> float:
        return trial.value(objective) or 0.0

    return max(ended or scored, key=value, default=None)


def rank_correlation(trials: Iterable[Trial], epoch: int | None = None) -> tuple[float | None, int]:
    """Return Spearman's correlation of `label_free` with mIoU, and its number of trials.

    Args:
        trials: failed ones are left out.
        epoch: compare all after this epoch; None: finished trials after their last.
    """
    from scipy.stats import spearmanr

    rows = [
        trial.history[-1 if epoch is None else epoch - 1]
        for trial in trials
        if (trial.status == "finished" if epoch is None else len(trial.history) >= epoch)
    ]
    pairs = [
        (r["label_free"], r["mean_iou"]) for r in rows if r.get("label_free") is not None and r["mean_iou"] is not None
    ]
    if len(pairs) < 3 or any(len(set(column)) == 1 for column in zip(*pairs, strict=True)):
        return None, len(pairs)
    return float(spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs)


def write_results(search: Search, trials: Sequence[Trial], stages: Mapping[str, Any]) -> dict[str, Any]:
    """Write `trials.json`, `best.yaml` (if a trial has a score) and `metrics.json` into the search's folder.

    Args:
        search: settings of the search.
        trials: records of its trials.
        stages: `seconds`, `items` and `skipped` of the shared stages, as in a run's `metrics.json`.

    Returns:
        The content of `metrics.json`.
    """
    write = partial(_write, search.uri)
    write("trials.json", json.dumps([trial.summary() for trial in trials], indent=1))
    winner = best(trials, search.objective)
    if winner:
        value = winner.value(search.objective)
        recipe = search_space.apply(search.recipe, winner.parameters)
        head = (
            f"# Trial {winner.number} of {len(trials)}: {search.objective} {value:.2f} after {len(winner.history)} of "
            f"{counted(winner.epochs, 'epoch')}.\n# Train it: transfgu train --recipe {search.file('best.yaml')}\n"
        )
        write("best.yaml", head + recipe.to_yaml())
    metrics = {
        "preset": search.recipe.preset,
        "objective": search.objective,
        "best": winner.summary() if winner else None,
        "trials": {status: sum(t.status == status for t in trials) for status in STATUSES},
        "epochs": {"trained": sum(len(t.history) for t in trials), "asked": sum(t.epochs for t in trials)},
        "rank_correlation": {
            "finished": dict(zip(("spearman", "trials"), rank_correlation(trials), strict=True)),
            "epoch 1": dict(zip(("spearman", "trials"), rank_correlation(trials, 1), strict=True)),
        },
        "stages": dict(stages),
        "stages_of_single_trials": {
            stage: count for stage in STAGES if (count := sum(t.stages.count(stage) for t in trials))
        },
    }
    write("metrics.json", json.dumps(metrics, indent=1))
    return metrics


def _write(uri: str, name: str, text: str) -> None:
    storage.write_bytes(storage.join(uri, name), text.encode())


def table(search: Search, trials: Iterable[Trial]) -> list[str]:
    """Return the trials as lines of text, best first, failed ones last."""
    names = [name.rpartition(".")[2] for name in search.space.names]
    rows = [["trial", *names, "mIoU", "label_free", "epochs", "status"]]
    for trial in ranked(trials, search.objective):
        values = [f"{value:.4g}" for value in trial.parameters.values()]
        scores = ["" if v is None else f"{v:.2f}" for v in map(trial.value, OBJECTIVES)]
        status = trial.summary()["status"] + (f": {trial.reason}" if trial.reason else "")
        rows.append([str(trial.number), *values, *scores, str(len(trial.history)), status])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)), row[-1]])
        for row in rows
    ]


def ranked(trials: Iterable[Trial], objective: str) -> list[Trial]:
    """Return finished trials from best to worst, then stopped and unfinished ones, then failed ones."""

    def key(trial: Trial) -> tuple[int, float]:
        value = trial.value(objective)
        rank = {"finished": 0, "failed": 2}.get(trial.status, 1)
        return rank, math.inf if value is None else -value

    return sorted(trials, key=key)
