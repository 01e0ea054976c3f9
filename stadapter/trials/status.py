"""The state of each trial in the output folder: done, running, failed so often, resumable, or still to do.

Reading a thousand finished trials takes 0.1 s (benchmarks/README.md).
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stadapter.config import ConfigError
from stadapter.trials import files, lock, record
from stadapter.trials.record import Record
from stadapter.trials.sweep import FIGURE, SWEEP, Sweep, Trial

FAILURES = "failures.json"  # in a trial's folder: how often it failed, under which --max-failures, and why last
STATES = ("done", "running", "failed", "resumable", "to do")
TABLES = ("table.txt", "table.md", "table.csv")


@dataclass(frozen=True)
class Failures:
    """The failures of a trial, over all launches."""

    count: int = 0
    allowed: int | None = None  # the --max-failures under which they were counted: another value counts anew
    last: str = ""


@dataclass(frozen=True)
class Entry:
    """A trial and its state in the output folder."""

    trial: Trial
    result: Record | None
    epochs: int  # recorded so far
    resumable: bool  # there is a checkpoint
    failures: Failures
    owner: lock.Owner | None

    @property
    def state(self) -> str:
        """The state in one word of STATES, to count by. A failed trial may be resumable as well: see `status`."""
        if self.result is not None:
            return "done"
        if self.owner is not None:
            return "running"
        if self.failures.count:
            return "failed"
        return "resumable" if self.resumable else "to do"

    @property
    def status(self) -> str:
        """The state in words, with the owner, the number of failures and the epochs done."""
        if self.result is not None:
            return "done"
        if self.owner is not None:
            return f"running in {self.owner}"
        failed = f"failed {self.failures.count} times" if self.failures.count > 1 else "failed once"
        state = f"resumable ({self.epochs} of {self.trial.recipe.optim.epochs} epochs done)" if self.resumable else ""
        return ", ".join(part for part in (failed if self.failures.count else "", state) if part) or "to do"


def entries(sweep: Sweep, output: Path) -> list[Entry]:
    """Return the state of every trial of a sweep, in its order."""
    return [entry(trial, output) for trial in sweep.trials]


def count_states(found: Sequence[Entry]) -> str:
    """Return how many trials are in which state, such as `3 done, 1 to do`."""
    counts = Counter(one.state for one in found)
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])


def entry(trial: Trial, output: Path) -> Entry:
    """Return the state of a trial."""
    folder = trial.folder(output)
    result = record.read_result(folder)
    if result is not None:
        return Entry(trial, result, trial.recipe.optim.epochs, False, Failures(), None)
    if not folder.exists():
        return Entry(trial, None, 0, False, Failures(), lock.owner_of(folder))
    resumable = (folder / record.CHECKPOINT).exists()
    epochs = len(record.read_metrics(folder))
    return Entry(trial, None, epochs, resumable, read_failures(folder), lock.owner_of(folder))


def read_failures(folder: Path) -> Failures:
    """Return the failures of the trial in `folder`."""
    path = folder / FAILURES
    return Failures(**json.loads(path.read_text())) if path.exists() else Failures()


def count_failure(folder: Path, allowed: int, why: str) -> Failures:
    """Write one more failure of the trial into its folder, and return all of them. Raises WriteError if it cannot."""
    before = read_failures(folder)
    failures = Failures((before.count if before.allowed == allowed else 0) + 1, allowed, why)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / FAILURES, failures.__dict__)
    return failures


def is_exhausted(folder: Path, allowed: int) -> bool:
    """Return True if the trial has failed `allowed` times."""
    failures = read_failures(folder)
    return failures.allowed == allowed and failures.count >= allowed


def select(trials: Sequence[Trial], words: Sequence[str] | None) -> list[Trial]:
    """Return the trials whose name (`kernel 3x3x3 seed 0`) holds any of the words; all of them without words.

    `seed 1` does not match `seed 10`. Raises ConfigError if a word matches no trial.
    """
    if not words:
        return list(trials)
    chosen: set[str] = set()
    for word in words:
        pattern = re.compile(rf"(?<!\d){re.escape(word.strip())}(?!\d)")
        found = {trial.id for trial in trials if pattern.search(trial.name)}
        if not found or not word.strip():
            names = [trial.name for trial in trials]
            shown = ", ".join(names[:6]) + (f", ... ({len(names)} in all)" if len(names) > 6 else "")
            raise ConfigError(f"--only '{word}': no trial of this sweep has that in its name; there are {shown}")
        chosen |= found
    return [trial for trial in trials if trial.id in chosen]


def set_aside(trials: Sequence[Trial], output: Path) -> list[Path]:
    """Move the folders of finished trials to <output>/replaced, forget failures, and return where the folders are.

    Raises ConfigError if one of the trials is being written.
    """
    for trial in trials:
        if owner := lock.owner_of(trial.folder(output)):
            raise ConfigError(f"--force: {trial.name} is being trained by {owner}; wait for its end, or stop it")
    moved = []
    for trial in trials:
        folder = trial.folder(output)
        if not folder.exists():
            continue
        try:
            with lock.writing(folder):
                (folder / FAILURES).unlink(missing_ok=True)
                if (folder / record.RESULT).exists():
                    moved.append(_move_aside(folder, output))
        except lock.Busy as error:
            raise ConfigError(f"--force: {trial.name}: {error}; wait for its end, or stop it") from None
    return moved


def keep_tables(before: Sweep, now: Sweep, output: Path) -> Path | None:
    """Copy the tables of the sweep `before` aside if those of `now` will lack some of its trials.

    Returns the folder of the copies, or None if nothing was copied.
    """
    left_out = {trial.id for trial in before.trials} - {trial.id for trial in now.trials}
    folder = now.folder(output)
    tables = [folder / name for name in (SWEEP, FIGURE, *TABLES) if (folder / name).exists()]
    if not left_out or len(tables) < 2:
        return None
    kept = _free_name(output, folder.name)
    kept.mkdir(parents=True)
    for file in tables:
        files.write_atomically(kept / file.name, file.read_bytes())
    return kept


def _move_aside(folder: Path, output: Path) -> Path:
    target = _free_name(output, folder.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(folder, target)
    return target


def _free_name(output: Path, name: str) -> Path:
    target = output / "replaced" / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    while target.exists():
        target = target.with_name(target.name + "+")
    return target
