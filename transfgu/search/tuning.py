"""Connect a search's records with Ray Tune: Optuna proposes trials, and ASHA selects the ones to stop.

The records are the state of a search. Both start from them, so a killed search continues.
"""

import json
import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from transfgu.errors import UserError, counted, in_words
from transfgu.runtime.progress import Progress
from transfgu.search import space as search_space
from transfgu.search.space import Parameters, Space
from transfgu.search.trials import Ledger, Search, Trial

VALUE, EPOCH = "value", "epoch"
"""What a trial reports to Tune: its objective so far, NaN without a score, and its number of epochs."""

_OF_STORAGE = ("disk-full", "storage-failed")
_NO_END = 10**9  # epochs; each trial ends after its own number of epochs


def axes(space: Space) -> dict[str, optuna.distributions.BaseDistribution]:
    """Return the ranges of a search as Optuna's distributions, by field."""
    found: dict[str, optuna.distributions.BaseDistribution] = {}
    for r in space.ranges:
        low, high = r.values[0], r.values[-1]
        if r.kind == "randint":
            found[r.name] = optuna.distributions.IntDistribution(int(low), int(high))
        elif r.listed:
            found[r.name] = optuna.distributions.CategoricalDistribution(r.listed)
        else:
            found[r.name] = optuna.distributions.FloatDistribution(low, high, log=r.log)
    return found


def reported(trial: Trial, objective: str, epochs: int | None = None) -> float:
    """Return a trial's value after `epochs` epochs (default: all); NaN without a score."""
    value = trial.value(objective, epochs)
    return math.nan if value is None else value


class Proposals(OptunaSearch):
    """Proposes trials that were started and not finished, then new ones, and writes a record of each."""

    def __init__(self, search: Search, ledger: Ledger) -> None:
        """Pass finished trials to Optuna.

        Args:
            search: its searcher is the source of new values: `grid` and `random` know all of them, `tpe` is a
                tree-structured Parzen estimator over all fields jointly, whose first ten trials are random.
            ledger: records of the search.
        """
        self._search, self._ledger = search, ledger
        unfinished = ledger.unfinished()
        self._waiting = [trial.number for trial in unfinished]
        new: list[Parameters] = []
        if search.searcher == "grid":
            new = search.space.grid()[len(ledger.trials) : search.count]
        elif search.searcher == "random":
            new = [search.space.draw(search.recipe.seed, n) for n in range(len(ledger.trials), search.count)]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        seed = np.random.SeedSequence([search.recipe.seed, len(ledger.trials)]).generate_state(1)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Running trials count as bad ones, so that trials at the same time differ.
            sampler = optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=int(seed))
        points = [*(trial.parameters for trial in unfinished), *new]
        super().__init__(axes(search.space), metric=VALUE, mode="max", sampler=sampler, points_to_evaluate=points)
        for trial in ledger.trials.values():
            if trial.status != "running":
                scores = [reported(trial, search.objective, epoch + 1) for epoch in range(len(trial.history))]
                value = reported(trial, search.objective)
                failed = math.isnan(value) or trial.status == "failed"
                self.add_evaluated_point(trial.parameters, value, error=failed, intermediate_values=scores)

    def suggest(self, trial_id: str) -> Any:
        """Return the number and the values of the next trial."""
        number = self._waiting.pop(0) if self._waiting else len(self._ledger.trials)
        if number >= self._search.count or self._ledger.storage_error:
            return self.FINISHED
        parameters: Parameters = super().suggest(trial_id) or {}
        if number not in self._ledger.trials:
            try:
                epochs = search_space.apply(self._search.recipe, parameters).training.epochs
            except UserError:  # the trial reports it
                epochs = self._search.recipe.training.epochs
            self._ledger.save(Trial(number=number, parameters=parameters, epochs=epochs))
        return {"number": number, "parameters": self._ledger.trials[number].parameters}


class Recorder(FIFOScheduler):
    """Writes every epoch into the trial's record, and records whether ASHA stops the trial there.

    A stopped trial ends itself after reading its record. If Tune killed the trial's process, Ray Train's controller
    would be killed, too, and without a dashboard its workers would keep their CPUs.
    """

    def __init__(self, search: Search, ledger: Ledger, progress: Progress) -> None:
        """Pass the epochs of all records to ASHA.

        Args:
            search: its scheduler determines whether trials are stopped.
            ledger: records of the search.
            progress: receives a line for each finished trial.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._search, self._ledger, self._progress = search, ledger, progress
        self._asha = ASHAScheduler(
            time_attr=EPOCH,
            metric=VALUE,
            mode="max",
            max_t=_NO_END,
            grace_period=search.grace,
            reduction_factor=search.reduction,
            stop_last_trials=False,
        )
        for trial in ledger.trials.values():
            for epoch in range(1, len(trial.history) + 1):
                self._stops(trial, epoch)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Handle an epoch's row, or the end of a trial."""
        record = self._ledger.trials[trial.config["number"]]
        if "end" in result:
            end = json.loads(result["end"])
            record.stages = record.stages or end["stages"]
            if end["code"] in _OF_STORAGE and record.status == "running":
                # It says nothing about the trial's values: the record stays, and the same command continues the trial.
                self._ledger.storage_error = UserError(end["reason"], end["code"])
            else:
                self._end(record, "failed" if end["reason"] else "finished", end["reason"])
        elif record.add(json.loads(result["row"])):
            epoch = len(record.history)
            if self._stops(record, epoch) and self._search.scheduler == "asha" and epoch < record.epochs:
                self._end(record, "stopped", f"not among the best 1/{self._search.reduction} after epoch {epoch}")
            else:
                self._ledger.save(record)
        return str(TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Record that the trial's own process was lost too often."""
        record = self._ledger.trials[trial.config["number"]]
        self._end(record, "failed", in_words(trial.get_error() or RuntimeError("its process was lost")))

    def _stops(self, record: Trial, epoch: int) -> bool:
        """Pass a trial's value to ASHA; returns True if ASHA stops the trial."""
        controller: Any = None
        known: Any = SimpleNamespace(trial_id=record.number)  # the same after a restart, unlike Tune's own name
        if epoch == 1:
            self._asha.on_trial_add(controller, known)
        result = {EPOCH: epoch, VALUE: reported(record, self._search.objective, epoch)}
        return bool(self._asha.on_trial_result(controller, known, result) == TrialScheduler.STOP)

    def _end(self, record: Trial, status: str, reason: str) -> None:
        """Record how the trial ended; an earlier reason is kept."""
        if record.status != "running":
            self._ledger.save(record)
            return
        record.status, record.reason = status, reason
        self._ledger.save(record)
        value = record.value(self._search.objective)
        score = "" if value is None else f", {self._search.objective} {value:.2f}"
        values = " ".join(f"{name.rpartition('.')[2]}={value:.4g}" for name, value in record.parameters.items())
        reason = f" ({record.reason})" if record.reason else ""
        self._progress.note(
            f"trial {record.number} {record.status}{reason}: {counted(len(record.history), 'epoch')}{score}; {values}"
        )
        done = sum(t.status != "running" for t in self._ledger.trials.values())
        self._progress.update(done, self._search.count, "trials")
