"""One launch of a sweep: what is missing runs, is tried again where it failed, and ends in a table.

Begun twice, at the same time or one after the other, on the same trials or on some of them, it ends in the same
records: a trial that another launch trains is waited for, not trained twice.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stadapter.ablation.progress import Terminal
from stadapter.results import table
from stadapter.results.sources import Answer
from stadapter.trials import files, lock, record, status
from stadapter.trials.stop import GentleStop
from stadapter.trials.sweep import DEFAULT_STORE, FIGURE, SWEEP, Sweep, Trial, records

if TYPE_CHECKING:
    from stadapter.cluster.resources import Resources
    from stadapter.tracking.mirror import Mirror
    from stadapter.training.options import TrainOptions


@dataclass(frozen=True)
class Request:
    """What a command asks for. Where nothing is missing it needs neither `train_options` nor `resources`."""

    sweep: Sweep
    selected: Sequence[Trial]  # in the order in which they should run
    missing: frozenset[str]  # ids of those among them that have no result yet
    output: Path
    options: argparse.Namespace
    train_options: TrainOptions | None = None
    resources: Resources | None = None
    estimate_s: float | None = None  # of the trials that are missing, where there is one


def launch(request: Request) -> int:
    """Run it, print and keep the table; returns the exit code."""
    sweep, output, options = request.sweep, request.output, request.options
    before = records(sweep, output)
    terminal = Terminal(sweep, sum(result is not None for result in before))
    mirror = None
    if options.tracking_uri != "none":
        from stadapter.tracking.mirror import Mirror

        mirror = Mirror(sweep, output, options.tracking_uri, say=terminal.say)
        mirror.start(wait=False)  # Ray starts meanwhile
        for trial, result in zip(sweep.trials, before, strict=True):
            if result is not None:
                mirror.trial_finished(trial)
    stop = GentleStop(sweep.folder(output))
    cut_off = False
    with stop:
        try:
            Launch(request, terminal, mirror, stop).run()
        except KeyboardInterrupt:
            cut_off = True
        finally:
            terminal.close()
        return _conclude(request, terminal, mirror, stopped=stop.asked or cut_off)


class Launch:
    """The rounds of a launch: each runs every trial that is missing, free, and has not failed too often."""

    def __init__(self, request: Request, terminal: Terminal, mirror: Mirror | None, stop: GentleStop) -> None:
        self.request, self.terminal, self.mirror, self.stop = request, terminal, mirror, stop
        self.done = {t.id for t in request.selected if record.read_result(t.folder(request.output)) is not None}
        self.waited_for: set[str] = set()
        self.broken = self._broken()
        self.met_another = False  # in the last round
        self.unwritten: files.WriteError | None = None  # what the ledger lacks

    def run(self) -> None:
        allowed = self.request.options.max_failures
        with contextlib.ExitStack() as stack:
            cluster = None
            while not self.stop.asked:
                missing = self._missing()
                free = [trial for trial in missing if not lock.owner_of(self._folder(trial))]
                if not missing:
                    break
                if free:
                    # Late, since Ray takes seconds to load.
                    from stadapter.cluster.ray_runtime import Cluster
                    from stadapter.cluster.runner import run_trials

                    request = self.request
                    assert request.train_options is not None and request.resources is not None
                    if cluster is None:
                        cluster = stack.enter_context(Cluster(request.resources))
                        at_once = min(cluster.trials_at_once(), len(free))
                        self.terminal.starting(len(free), at_once, request.resources, request.output)
                    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
                    run_trials(cluster, free, request.output, request.train_options, self.event, self.stop, command)
                    if self.unwritten is not None:
                        raise self.unwritten
                self._wait_for_others()
        for trial in self.request.selected:
            folder = self._folder(trial)
            if trial.id not in self.done and not self.stop.asked and status.exhausted(folder, allowed):
                failures = status.read_failures(folder)
                self.terminal.gave_up(trial, failures.count, failures.last)

    def _folder(self, trial: Trial) -> Path:
        return trial.folder(self.request.output)

    def _missing(self) -> list[Trial]:
        allowed = self.request.options.max_failures
        found = []
        for trial in self.request.selected:
            if trial.id in self.done:
                continue
            if record.read_result(self._folder(trial)) is not None:  # by another launch
                self.event("finished", trial, {})
            elif not status.exhausted(self._folder(trial), allowed):
                found.append(trial)
        return found

    def _wait_for_others(self) -> None:
        """While all that is missing is in other hands, sleep a little; say once for whom."""
        missing = self._missing()
        owners = {trial.id: lock.owner_of(self._folder(trial)) for trial in missing}
        for trial in missing:
            if (owner := owners[trial.id]) and trial.id not in self.waited_for:
                self.waited_for.add(trial.id)
                self.terminal.event("busy", trial, {"message": f"waiting for {owner}"})
        if missing and (self.met_another or all(owners.values())) and not self.stop.asked:
            time.sleep(lock.POLL_S)
        self.met_another = False

    def _broken(self) -> set[Path]:
        """The checkpoints that were found damaged, and set aside."""
        return {path for trial in self.request.selected for path in self._folder(trial).glob("*.broken")}

    def event(self, kind: str, trial: Trial, details: dict[str, Any]) -> None:
        folder = self._folder(trial)
        for path in set(folder.glob("*.broken")) - self.broken:
            self.broken.add(path)
            self.terminal.event("note", trial, {"message": f"a damaged checkpoint was set aside: {path.name}"})
        if kind == "finished":
            self.done.add(trial.id)
            details = {"record": record.read_result(folder)}
        elif kind == "failed":
            allowed = self.request.options.max_failures
            try:
                failures = status.count_failure(folder, allowed, details["message"])
            except files.WriteError as error:  # raised when the round is over: Ray is in the middle of it
                self.unwritten = error
            else:
                details = details | {"again": failures.count < allowed}
        if kind == "busy":
            self.met_another = True  # `_wait_for_others` says it, and says it once
            self.terminal.running.pop(trial.id, None)
            return
        self.terminal.event(kind, trial, details)
        if self.mirror is None:
            return
        if kind == "started":
            self.mirror.trial_started(trial)
        elif kind in ("epoch", "stopped"):
            self.mirror.trial_epoch(trial)
        elif kind == "finished":
            self.mirror.trial_finished(trial)
        else:
            self.mirror.trial_failed(trial, details["message"])


def _keep(sweep: Sweep, folder: Path, found: table.Records) -> list[Path]:
    """Write the tables and the figure of a sweep; returns their paths."""
    tables = {"table.txt": table.to_text, "table.md": table.to_markdown, "table.csv": table.to_csv}
    contents = {folder / file: render(sweep, found).encode() for file, render in tables.items()}
    # A figure takes longer than all else in a launch that finds nothing missing. It is written first: tables that are
    # up to date say that it is, too.
    figure = folder / FIGURE
    if not figure.exists() or any(not path.exists() or path.read_bytes() != new for path, new in contents.items()):
        from stadapter.results.figure import to_png

        files.write_atomically(figure, to_png(Answer(sweep, found)))
    for path, content in contents.items():
        files.write_atomically(path, content)
    return [*contents, figure]


def _conclude(request: Request, terminal: Terminal, mirror: Mirror | None, *, stopped: bool) -> int:
    sweep, output, options = request.sweep, request.output, request.options
    found = records(sweep, output)
    folder = sweep.folder(output)
    print(f"\n{sweep.question}\n\n{table.to_text(sweep, found)}")
    kept = _keep(sweep, folder, found)
    asked_for = {trial.id for trial in request.selected}
    left = [t for t, result in zip(sweep.trials, found, strict=True) if result is None and t.id in asked_for]
    holes = sum(result is None for result in found)
    if mirror is not None:
        ended = "KILLED" if stopped and left else "FAILED" if left else "KILLED" if holes else "FINISHED"
        mirror.finish([folder / SWEEP, *kept], ended)
    if request.train_options is not None:
        from stadapter.ablation.plan import compare_with_reality

        ran = [trial for trial in request.selected if trial.id in request.missing]
        if line := compare_with_reality(request.estimate_s, ran, output):
            print(line)
    python = min(sys.executable, os.path.relpath(sys.executable), key=len)
    again = files.without_passwords(shlex.join([python, *(word for word in sys.argv if word != "--force")]))
    if left and stopped:
        print(
            f"{len(left)} of {len(found)} trials have no result. This continues them from their checkpoints:\n  {again}"
        )
        return 130
    if left:
        names = ", ".join(trial.name for trial in left)
        print(f"{len(left)} of {len(found)} trials have no result: {names}.")
        print(f"They failed {options.max_failures} times each, and are left alone until --force or another")
        print("--max-failures counts anew. Why, in full, is in error.txt in their folders under")
        print(f"{output / 'trials'}")
        print("--force would run finished trials again, too; this goes on with these alone, from their checkpoints:")
        print(f"  {again} --max-failures {options.max_failures + 1}")
        return 1
    if holes:
        print(f"{holes} of {len(found)} trials have no result; --only left them out.")
    print(f"Tables: {folder}\nNext:")
    if mirror is not None:
        uri = shlex.quote(files.without_passwords(options.tracking_uri))
        store = "" if options.tracking_uri == DEFAULT_STORE else f" --tracking-uri {uri}"
        print(f"  {python} -m stadapter ui{store}    # compare the runs in MLflow")
    another = "ablate_kernel.py" if sweep.name == "width" else "ablate_width.py"
    print(f"  {python} experiments/{another}    # another question")
    return 0
