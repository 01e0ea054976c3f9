"""The rounds of a launch: each runs every trial that is missing, free, and has not failed too often.

Two launches of the same trials, at once or one after the other, end in the same records: a trial that another launch
trains is waited for, not trained twice.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stadapter.ablation.observer import Observer, TrialEvent
from stadapter.ablation.prepare import Request
from stadapter.trials import files, lock, record, status
from stadapter.trials.stop import GentleStop
from stadapter.trials.sweep import Trial

if TYPE_CHECKING:
    from stadapter.cluster.ray_runtime import Cluster
    from stadapter.tracking.mirror import Mirror


class Launch:
    """The state of a launch between its rounds."""

    def __init__(self, request: Request, observer: Observer, mirror: Mirror | None, stop: GentleStop) -> None:
        self.request, self.observer, self.mirror, self.stop = request, observer, mirror, stop
        self.done = {t.id for t in request.selected if record.read_result(t.folder(request.output)) is not None}
        self.waited_for: set[str] = set()
        self.broken = {path for trial in request.selected for path in self._broken_checkpoints(trial)}
        self.met_another_launch = False  # in the last round
        self.unwritten: files.WriteError | None = None  # raised when the round is over: Ray is in the middle of it

    def run(self) -> None:
        """Run rounds until nothing is missing or an end is asked for. Raises WriteError if a failure cannot be kept."""
        with contextlib.ExitStack() as stack:
            cluster = None
            while not self.stop.asked and (missing := self._missing()):
                free = [trial for trial in missing if not lock.owner_of(self._folder(trial))]
                if free:
                    cluster = self._run_round(free, cluster, stack)
                self._wait_for_others()
        for trial in self.request.selected:
            if trial.id not in self.done and not self.stop.asked and self._is_given_up(trial):
                failures = status.read_failures(self._folder(trial))
                times = f"{failures.count} times" if failures.count > 1 else "once"
                self._show(TrialEvent("given up", trial, f"failed {times}, the last time: {failures.last}"))

    def _run_round(self, trials: list[Trial], cluster: Cluster | None, stack: contextlib.ExitStack) -> Cluster:
        """Run the trials, each once, in the cluster, which starts in the first round."""
        # Late: Ray takes seconds to load, and a finished sweep needs none.
        from stadapter.cluster.ray_runtime import Cluster
        from stadapter.cluster.runner import run_trials

        request, training = self.request, self.request.training
        assert training is not None
        if cluster is None:
            cluster = stack.enter_context(Cluster(training.resources))
            at_once = min(cluster.trials_at_once(), len(trials))
            self.observer.round_began(len(trials), at_once, training.resources, request.output)
        run_trials(cluster, trials, request.output, training.options, self.event, self.stop, request.options.command)
        if self.unwritten is not None:
            raise self.unwritten
        return cluster

    def _missing(self) -> list[Trial]:
        """Return the trials to run. Those that another launch has finished meanwhile are shown as finished."""
        found = []
        for trial in self.request.selected:
            if trial.id in self.done:
                continue
            if record.read_result(self._folder(trial)) is not None:
                self.event("finished", trial, {})
            elif not self._is_given_up(trial):
                found.append(trial)
        return found

    def _wait_for_others(self) -> None:
        """Sleep a little if every missing trial is trained by other launches; say once by which."""
        missing = self._missing()
        owners = {trial.id: lock.owner_of(self._folder(trial)) for trial in missing}
        for trial in missing:
            if (owner := owners[trial.id]) and trial.id not in self.waited_for:
                self.waited_for.add(trial.id)
                self._show(TrialEvent("busy", trial, f"waiting for {owner}"))
        if missing and (self.met_another_launch or all(owners.values())) and not self.stop.asked:
            time.sleep(lock.POLL_S)
        self.met_another_launch = False

    def event(self, kind: str, trial: Trial, details: dict[str, Any]) -> None:
        """Take an event of `run_trials`: keep the books, show it, mirror it."""
        self._show_broken_checkpoints(trial)
        message = details.get("message", "")
        if kind == "started":
            self._show(TrialEvent("started", trial))
        elif kind == "epoch":
            self._show(TrialEvent("epoch", trial, metrics=details))
        elif kind == "finished":
            self.done.add(trial.id)
            self._show(TrialEvent("finished", trial, record=record.read_result(self._folder(trial))))
        elif kind == "stopped":
            self._show(TrialEvent("stopped", trial, message))
        elif kind == "busy":
            self.met_another_launch = True
            self._show(TrialEvent("busy", trial))  # `_wait_for_others` names the other launch, once
        else:
            self._show(TrialEvent("failed", trial, message, is_retried=self._count_failure(trial, message)))
        self._mirror(kind, trial, message)

    def _count_failure(self, trial: Trial, why: str) -> bool:
        """Write the failure down; return True if the trial will be tried again."""
        allowed = self.request.options.max_failures
        try:
            return status.count_failure(self._folder(trial), allowed, why).count < allowed
        except files.WriteError as error:
            self.unwritten = error
            return False

    def _mirror(self, kind: str, trial: Trial, message: str) -> None:
        if self.mirror is None:
            return
        if kind == "started":
            self.mirror.trial_started(trial)
        elif kind in ("epoch", "stopped"):
            self.mirror.trial_epoch(trial)
        elif kind == "finished":
            self.mirror.trial_finished(trial)
        elif kind == "failed":
            self.mirror.trial_failed(trial, message)

    def _show_broken_checkpoints(self, trial: Trial) -> None:
        for path in self._broken_checkpoints(trial) - self.broken:
            self.broken.add(path)
            self._show(TrialEvent("note", trial, f"a damaged checkpoint was set aside: {path.name}"))

    def _broken_checkpoints(self, trial: Trial) -> set[Path]:
        return set(self._folder(trial).glob("*.broken"))

    def _show(self, event: TrialEvent) -> None:
        self.observer.trial_changed(event)

    def _is_given_up(self, trial: Trial) -> bool:
        return status.is_exhausted(self._folder(trial), self.request.options.max_failures)

    def _folder(self, trial: Trial) -> Path:
        return trial.folder(self.request.output)
