"""What a person sees while a sweep runs: one line per event, and below them a live count where there is a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stadapter.trials.record import Record, bad_clips_in_words
from stadapter.trials.sweep import Sweep, Trial

if TYPE_CHECKING:
    from stadapter.cluster.resources import Resources


class Terminal:
    """Prints to standard output; the live count only if that is a terminal, so that a log file stays readable."""

    def __init__(self, sweep: Sweep, done: int) -> None:
        self.sweep, self.done, self.failed = sweep, done, 0
        self.started = time.monotonic()
        self.running: dict[str, int] = {}  # trial id -> epochs done
        self.epochs_done_here = 0
        self.width = max(len(trial.name) for trial in sweep.trials)
        self.live = sys.stdout.isatty()
        trials = len(sweep.trials)
        self.say(f"{sweep.question}\n")
        reused = f", {done} finished before" if done else ""
        self.say(
            f"recipe {sweep.recipe.name}: {len(sweep.arms)} arms x {trials // len(sweep.arms)} seeds "
            f"= {trials} trials{reused}"
        )

    def starting(self, trials: int, at_once: int, resources: Resources, output: Path) -> None:
        on = f"{resources.num_gpus} GPUs" if resources.num_gpus else "the CPU"
        if resources.trials_per_gpu > 1:
            on += f", {resources.trials_per_gpu} on each"
        shared = f", {resources.processes_per_trial} processes each" if resources.processes_per_trial > 1 else ""
        self.say(f"running {trials} on {on}, {at_once} at a time{shared}; kept in {output}\n")

    def event(self, kind: str, trial: Trial, details: dict[str, Any]) -> None:
        if kind == "started":
            self.running[trial.id] = 0
            text = ""
        elif kind == "epoch":
            self.running[trial.id] = details["epoch"]
            self.epochs_done_here += 1
            text = (
                f"epoch {details['epoch']}/{trial.recipe.optim.epochs}  loss {details['train_loss']:.3f}  "
                f"val top-1 {details['val_top1']:.1f} %  {details['clips_per_s']:.0f} clips/s"
            )
        elif kind == "finished":
            self.running.pop(trial.id, None)
            self.done += 1
            done: Record = details["record"]
            text = f"top-1 {done.metrics['top1']:.1f} %  in {done.seconds:.0f} s"
            if bad := bad_clips_in_words(done):
                text += f"  ({bad})"
        elif kind == "note":
            text = details["message"]
        else:
            self.running.pop(trial.id, None)
            text = details["message"] + ("; to be tried again" if details.get("again") else "")
        self._line(kind, trial, text)

    def gave_up(self, trial: Trial, failures: int, why: str) -> None:
        self.failed += 1
        times = f"{failures} times" if failures > 1 else "once"
        self._line("given up", trial, f"failed {times}, the last time: {why}")

    def _line(self, kind: str, trial: Trial, text: str) -> None:
        self.say(f"{self._clock()}  {kind:<8}  {trial.name:<{self.width}}  {text}".rstrip())

    def say(self, text: str) -> None:
        """Print a line above the live count."""
        self._clear()
        print(text, flush=True)
        self._draw()

    def close(self) -> None:
        self._clear()
        self.live = False

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        return f"{minutes:3d}:{seconds:02d}"

    def _draw(self) -> None:
        if not self.live or not (self.running or self.epochs_done_here):
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
