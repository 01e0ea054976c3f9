"""The terminal's view of a sweep: a line per event, a live count below them, and how it ended."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from stadapter.ablation.observer import Outcome, TrialEvent
from stadapter.ablation.options import SweepOptions
from stadapter.cluster.resources import Resources
from stadapter.results import table
from stadapter.trials import files
from stadapter.trials.record import Record, bad_clips_in_words
from stadapter.trials.stop import write
from stadapter.trials.sweep import DEFAULT_OUTPUT, DEFAULT_STORE, Sweep


class Terminal:
    """An observer that prints. The live count shows only if standard output is a terminal: log files stay readable."""

    def __init__(self) -> None:
        self.sweep: Sweep | None = None
        self.done = self.failed = self.epochs_done_here = 0
        self.started = time.monotonic()
        self.running: dict[str, int] = {}  # trial id -> epochs done
        self.live = sys.stdout.isatty()

    def note(self, text: str) -> None:
        """Print a text above the live count."""
        self._clear()
        print(text, flush=True)
        self._draw()

    def sweep_began(self, sweep: Sweep, finished: int) -> None:
        self.sweep, self.done, self.started = sweep, finished, time.monotonic()
        trials = len(sweep.trials)
        self.note(f"{sweep.question}\n")
        reused = f", {finished} finished before" if finished else ""
        self.note(
            f"recipe {sweep.recipe.name}: {len(sweep.arms)} arms x {trials // len(sweep.arms)} seeds "
            f"= {trials} trials{reused}"
        )

    def round_began(self, trials: int, at_once: int, resources: Resources, output: Path) -> None:
        on = f"{resources.num_gpus} GPUs" if resources.num_gpus else "the CPU"
        if resources.trials_per_gpu > 1:
            on += f", {resources.trials_per_gpu} on each"
        shared = f", {resources.processes_per_trial} processes each" if resources.processes_per_trial > 1 else ""
        self.note(f"running {trials} on {on}, {at_once} at a time{shared}; kept in {output}\n")

    def trial_changed(self, event: TrialEvent) -> None:
        assert self.sweep is not None
        self._count(event)
        if event.kind == "busy" and not event.message:
            return
        width = max(len(trial.name) for trial in self.sweep.trials)
        self.note(f"{self._clock()}  {event.kind:<8}  {event.trial.name:<{width}}  {event_text(event)}".rstrip())

    def stopping(self, text: str) -> None:
        write(1, text)

    def trials_ended(self, records: Sequence[Record | None]) -> None:
        assert self.sweep is not None
        self.close()
        print(f"\n{self.sweep.question}\n\n{table.to_text(self.sweep, records)}")

    def close(self) -> None:
        """Clear the live count, for good."""
        self._clear()
        self.live = False

    def _count(self, event: TrialEvent) -> None:
        if event.kind == "started":
            self.running[event.trial.id] = 0
        elif event.kind == "epoch":
            self.running[event.trial.id] = event.metrics["epoch"]
            self.epochs_done_here += 1
        elif event.kind != "note":
            self.running.pop(event.trial.id, None)
        self.done += event.kind == "finished"
        self.failed += event.kind == "given up"

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        return f"{minutes:3d}:{seconds:02d}"

    def _draw(self) -> None:
        if not self.live or self.sweep is None or not (self.running or self.epochs_done_here):
            return
        total = len(self.sweep.trials)
        parts = [f"{self.done}/{total} done", f"{len(self.running)} running"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        per_trial = self.sweep.recipe.optim.epochs
        epochs_left = (total - self.done - self.failed) * per_trial - sum(self.running.values())
        if self.epochs_done_here:
            left_s = (time.monotonic() - self.started) / self.epochs_done_here * epochs_left
            parts.append(f"about {left_s / 60:.0f} min left" if left_s >= 60 else "less than a minute left")
        line = f"{self._clock()}  " + "  ".join(parts)
        print(line[: shutil.get_terminal_size().columns - 1], end="", flush=True)

    def _clear(self) -> None:
        if self.live:
            print("\r\033[K", end="")


def event_text(event: TrialEvent) -> str:
    """Return what a line says about an event behind its time, kind and trial."""
    if event.kind == "epoch":
        at = event.metrics
        return (
            f"epoch {at['epoch']}/{event.trial.recipe.optim.epochs}  loss {at['train_loss']:.3f}  "
            f"val top-1 {at['val_top1']:.1f} %  {at['clips_per_s']:.0f} clips/s"
        )
    if event.record is not None:
        text = f"top-1 {event.record.metrics['top1']:.1f} %  in {event.record.seconds:.0f} s"
        return f"{text}  ({bad})" if (bad := bad_clips_in_words(event.record)) else text
    return event.message + ("; to be tried again" if event.is_retried else "")


def conclusion(outcome: Outcome, options: SweepOptions) -> list[str]:
    """Return the lines below the table: what is missing and the command that goes on, or what to look at next."""
    found = outcome.records
    lines = [line] if (line := planned_and_taken(outcome)) else []
    without_result = f"{len(outcome.left)} of {len(found)} trials have no result"
    if outcome.left and outcome.stopped:
        return [*lines, f"{without_result}. This continues them from their checkpoints:", f"  {_same_command()}"]
    if outcome.left:
        return [
            *lines,
            f"{without_result}: {', '.join(trial.name for trial in outcome.left)}.",
            f"They failed {options.max_failures} times each, and are left alone until --force or another",
            "--max-failures counts anew. Why, in full, is in error.txt in their folders under",
            f"{options.output.resolve() / 'trials'}",
            "--force would run finished trials again, too; this goes on with these alone, from their checkpoints:",
            f"  {_same_command()} --max-failures {options.max_failures + 1}",
        ]
    if holes := sum(result is None for result in found):
        lines.append(f"{holes} of {len(found)} trials have no result; --only left them out.")
    return [*lines, f"Tables: {outcome.folder}", "Next:", *_next_commands(options)]


def planned_and_taken(outcome: Outcome) -> str:
    """Compare the time of the trials that ran with the estimate; empty without one, or if a trial has no result."""
    ids = {trial.id for trial in outcome.ran}
    results = [result for trial, result in zip(outcome.sweep.trials, outcome.records, strict=True) if trial.id in ids]
    if outcome.estimate_s is None or not results or None in results:
        return ""
    took_s = sum(result.seconds for result in results if result is not None)
    return (
        f"Planned: {outcome.estimate_s / 3600:.3g} hours for these {len(results)} trials; taken: {took_s / 3600:.3g}."
    )


def _same_command() -> str:
    """Return the command that was typed, without --force and without passwords."""
    python = min(sys.executable, os.path.relpath(sys.executable), key=len)
    return files.without_passwords(shlex.join([python, *(word for word in sys.argv if word != "--force")]))


def front_door() -> str:
    """Return how `stadapter` can be typed here: its name if it is on the PATH, else its path, else as a module."""
    script = Path(sys.executable).with_name("stadapter")
    if not script.exists():
        return f"{min(sys.executable, os.path.relpath(sys.executable), key=len)} -m stadapter"
    on_path = shutil.which("stadapter")
    if on_path is not None and Path(on_path).samefile(script):
        return "stadapter"
    return min(str(script), os.path.relpath(script), key=len)


def _next_commands(options: SweepOptions) -> list[str]:
    output = "" if options.output == DEFAULT_OUTPUT else f" --output {shlex.quote(str(options.output))}"
    lines = [f"  {front_door()} report{output}    # all sweeps of this folder on one page"]
    if options.tracking_uri is not None:
        uri = shlex.quote(files.without_passwords(options.tracking_uri))
        store = "" if options.tracking_uri == DEFAULT_STORE else f" --tracking-uri {uri}"
        lines.insert(0, f"  {front_door()} ui{store}    # compare the runs in MLflow")
    return lines
