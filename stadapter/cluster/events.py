"""Tune's callbacks as events of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stadapter.cluster.failure import read_error
from stadapter.cluster.ray_environment import tune
from stadapter.trials.stop import GentleStop
from stadapter.trials.sweep import Trial

# A kind, the trial, and details:
# - "started": none;
# - "epoch": the metrics of the epoch;
# - "finished", "stopped": an empty `message`;
# - "failed": the cause as `message`; the folder has error.txt;
# - "busy": another process writes the folder; the `message` names it.
Event = Callable[[str, Trial, dict[str, Any]], None]


class Events(tune.Callback):
    """Tune's callbacks, passed on as events of the sweep."""

    def __init__(
        self, trials: Sequence[Trial], folders: Sequence[Path], on_event: Event, stop: GentleStop | None
    ) -> None:
        self.trials, self.folders, self.on_event, self.stop = trials, folders, on_event, stop
        self.started: set[int] = set()
        self.ended: dict[int, tuple[str, str]] = {}  # kind and message, by the trial's number

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks for a restart that never comes; a mirror's connections cannot be pickled

    def setup(self, *arguments: Any, **info: Any) -> None:
        if self.stop is not None:
            self.stop.listen()  # Tune has just taken SIGUSR1

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        if self.stop is None or not self.stop.asked:
            self.started.add(trial.config["trial"])
            self.on_event("started", self.trials[trial.config["trial"]], {})

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        if "ended" in result:
            self.ended[trial.config["trial"]] = result["ended"], result["message"]
        elif "epoch" in result:
            self.on_event("epoch", self.trials[trial.config["trial"]], result)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        number = trial.config["trial"]
        kind, message = self.ended[number]
        if number in self.started:
            self.on_event(kind, self.trials[number], {"message": message})

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        number = trial.config["trial"]
        message = read_error(self.folders[number]) or "its process died (out of memory, or killed)"
        self.on_event("failed", self.trials[number], {"message": message})
