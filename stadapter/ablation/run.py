"""A sweep from Python: `run_sweep(sweep, options)` runs what is missing and returns the outcome.

from stadapter.ablation import Arm, SweepOptions, run_sweep
from stadapter.trials.sweep import make_sweep

sweep = make_sweep("width", "How wide?", recipe, [Arm("8", {"adapter.bottleneck_width": 8}), ...], seeds=2)
outcome = run_sweep(sweep, SweepOptions(output=Path("runs"), tracking_uri=None))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stadapter.ablation.launch import Launch
from stadapter.ablation.observer import Observer, Outcome, Silent
from stadapter.ablation.options import SweepOptions, check_port
from stadapter.ablation.prepare import Request, prepare
from stadapter.config import ConfigError
from stadapter.results import table
from stadapter.results.sources import Answer
from stadapter.trials import files, lock, status
from stadapter.trials.record import Record
from stadapter.trials.stop import GentleStop
from stadapter.trials.sweep import FIGURE, SWEEP, Sweep, load_sweep, records, save_sweep

if TYPE_CHECKING:
    from stadapter.tracking.mirror import Mirror


def run_sweep(sweep: Sweep, options: SweepOptions, observer: Observer | None = None) -> Outcome:
    """Run the trials of a sweep that have no result yet, and write its tables.

    Prints nothing: `observer` sees what happens. In the main thread, the first SIGINT, SIGTERM or SIGUSR1 lets running
    trials write a checkpoint; the second ends them at once. Either way the outcome says that it was stopped.

    Raises ConfigError if the input cannot work (nothing was started then), and WriteError if a result could not be
    written. A trial that fails raises nothing: it is tried again, and in the end it is among those `left`.
    """
    observer = Silent() if observer is None else observer
    if options.dashboard_port is not None:
        check_port("--dashboard-port", options.dashboard_port)
    request = prepare(sweep, options)
    _describe_in_folder(request, observer)
    if request.training is not None:
        for note in request.training.notes:
            observer.note(note)
    before = records(sweep, request.output)
    observer.sweep_began(sweep, sum(result is not None for result in before))
    mirror = _start_mirror(request, before, observer)
    stop = GentleStop(sweep.folder(request.output), observer.stopping)
    cut_off = False
    with stop:
        try:
            Launch(request, observer, mirror, stop).run()
        except KeyboardInterrupt:
            cut_off = True
        return _conclude(request, observer, mirror, stopped=stop.asked or cut_off)


def _describe_in_folder(request: Request, observer: Observer) -> None:
    """Write sweep.json. Records to replace and tables of other trials are kept aside."""
    sweep, output = request.sweep, request.output
    folder = sweep.folder(output)
    try:
        if request.options.force and (moved := status.set_aside(request.selected, output)):
            observer.note(f"--force: {len(moved)} old records are in {moved[0].parent}")
        folder.mkdir(parents=True, exist_ok=True)
        if request.training is not None:  # tables alone need no lock
            lock.check_flock(output / "locks")
        if (folder / SWEEP).exists() and (kept := status.keep_tables(load_sweep(folder), sweep, output)):
            observer.note(
                f"note: {folder} now holds the tables of these arms and seeds; those it held before are in {kept}"
            )
        save_sweep(sweep, output)
    except OSError as error:
        raise ConfigError(
            f"--output {request.options.output}: cannot be written ({error.strerror}); choose another folder"
        ) from None


def _start_mirror(request: Request, before: list[Record | None], observer: Observer) -> Mirror | None:
    if request.options.tracking_uri is None:
        return None
    # Late: MLflow takes seconds to load.
    from stadapter.tracking.mirror import Mirror

    mirror = Mirror(request.sweep, request.output, request.options.tracking_uri, say=observer.note)
    mirror.start(wait=False)  # Ray starts meanwhile
    for trial, result in zip(request.sweep.trials, before, strict=True):
        if result is not None:
            mirror.trial_finished(trial)
    return mirror


def _conclude(request: Request, observer: Observer, mirror: Mirror | None, *, stopped: bool) -> Outcome:
    sweep, training = request.sweep, request.training
    found = tuple(records(sweep, request.output))
    observer.trials_ended(found)
    folder = sweep.folder(request.output)
    kept = _write_tables(sweep, folder, found)
    asked_for = {trial.id for trial in request.selected}
    without = [trial for trial, result in zip(sweep.trials, found, strict=True) if result is None]
    left = tuple(trial for trial in without if trial.id in asked_for)
    if mirror is not None:
        ended = "KILLED" if stopped and left else "FAILED" if left else "KILLED" if without else "FINISHED"
        mirror.finish([folder / SWEEP, *kept], ended)
    ran = tuple(trial for trial in request.selected if trial.id in request.missing)
    estimate_s = None if training is None else training.estimate_s
    return Outcome(sweep, found, left, ran, stopped, folder, tuple(kept), estimate_s)


def _write_tables(sweep: Sweep, folder: Path, found: table.Records) -> list[Path]:
    """Write the tables and the figure of a sweep and return their paths."""
    tables = {"table.txt": table.to_text, "table.md": table.to_markdown, "table.csv": table.to_csv}
    contents = {folder / file: render(sweep, found).encode() for file, render in tables.items()}
    # A figure takes longer than all else in a launch that finds nothing missing, so it is drawn only if a table
    # changed. It is written first: up-to-date tables then prove an up-to-date figure.
    figure = folder / FIGURE
    if not figure.exists() or any(not path.exists() or path.read_bytes() != new for path, new in contents.items()):
        from stadapter.results.figure import to_png  # late: matplotlib takes a second to load

        files.write_atomically(figure, to_png(Answer(sweep, found)))
    for path, content in contents.items():
        files.write_atomically(path, content)
    return [*contents, figure]
