"""The events of a running sweep and its outcome, and the interface of those that want to see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from stadapter.ablation.exit_codes import DONE, FAILED, STOPPED
from stadapter.cluster.resources import Resources
from stadapter.trials.record import Record
from stadapter.trials.sweep import Sweep, Trial

Kind = Literal["started", "epoch", "finished", "failed", "stopped", "busy", "note", "given up"]


@dataclass(frozen=True)
class TrialEvent:
    """One thing that happened to a trial.

    "busy" means that another launch trains it, and that its end is waited for. One such event names that launch in its
    message; those without a message need not be shown.
    """

    kind: Kind
    trial: Trial
    message: str = ""  # why it failed or was given up, which launch has it, or the note
    metrics: Mapping[str, Any] = field(default_factory=dict)  # of an "epoch": a line of metrics.jsonl
    record: Record | None = None  # of one that "finished"
    is_retried: bool = False  # of one that "failed"


@dataclass(frozen=True)
class Outcome:
    """A sweep after a launch."""

    sweep: Sweep
    records: tuple[Record | None, ...]  # one per trial of the sweep, in its order; None where there is no result
    left: tuple[Trial, ...]  # the trials asked for that have no result
    ran: tuple[Trial, ...]  # the trials that had none before
    stopped: bool  # by a signal
    folder: Path  # of the tables
    files: tuple[Path, ...]  # the tables and the figure
    estimate_s: float | None = None  # of `ran`, as estimated before

    @property
    def exit_code(self) -> int:
        """The exit code that this outcome stands for."""
        if not self.left:
            return DONE
        return STOPPED if self.stopped else FAILED


class Observer(Protocol):
    """Sees a sweep run, in the process that runs it. The methods are called in this order.

    `note` may come at any time, also from another thread; `stopping` from a signal handler, where print() is not safe.
    """

    def note(self, text: str) -> None:
        """Take a remark of one or several lines, such as the precision that was chosen."""

    def sweep_began(self, sweep: Sweep, finished: int) -> None:
        """The input was checked; `finished` trials have a result already."""

    def round_began(self, trials: int, at_once: int, resources: Resources, output: Path) -> None:
        """Ray runs, and so many trials start in it."""

    def trial_changed(self, event: TrialEvent) -> None:
        """Something happened to a trial."""

    def stopping(self, text: str) -> None:
        """The first signal came: running trials write a checkpoint and end."""

    def trials_ended(self, records: Sequence[Record | None]) -> None:
        """No trial runs any more; tables are written next. One record per trial, None where there is none."""


class Silent:
    """An observer that shows nothing."""

    def note(self, text: str) -> None:
        pass

    def sweep_began(self, sweep: Sweep, finished: int) -> None:
        pass

    def round_began(self, trials: int, at_once: int, resources: Resources, output: Path) -> None:
        pass

    def trial_changed(self, event: TrialEvent) -> None:
        pass

    def stopping(self, text: str) -> None:
        pass

    def trials_ended(self, records: Sequence[Record | None]) -> None:
        pass
