"""The share of `make demo` that is neither training nor testing.

    python -m benchmarks.demo

Runs the command of `make demo` into a new folder with a new MLflow store, and times its output. "Inside" is the time in
which at least one trial was between its record's `started` and `finished`: making its model, its steps, validations,
checkpoints and test. The rest is "outside": interpreters, imports, checks, rendering of missing clips, Ray, MLflow, the
table. The exit code is 1 if the share outside misses its target.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stadapter.training import hardware
from stadapter.trials import record

ROOT = Path(__file__).parent.parent
TARGET_SHARE = 0.15
Span = tuple[float, float]  # began, ended; seconds since 1970


@dataclass(frozen=True)
class Share:
    """The wall time of a command in parts, in seconds."""

    total: float
    inside: float  # at least one trial ran
    before: float  # until the first trial
    between: float
    after: float  # since the last trial

    @property
    def outside(self) -> float:
        return self.total - self.inside


def share_of(command: Span, trials: Sequence[Span]) -> Share:
    """Divide the time of a command. Raises ValueError if there is no trial, or one that ran outside the command."""
    began, ended = command
    ordered = sorted(trials)
    if not ordered or any(not began <= start <= end <= ended for start, end in ordered):
        raise ValueError(f"trials {ordered} did not all run within {command}")
    between, busy_until = 0.0, ordered[0][0]
    for start, end in ordered:
        between += max(0.0, start - busy_until)
        busy_until = max(busy_until, end)
    before, after = ordered[0][0] - began, ended - busy_until
    return Share(ended - began, ended - began - before - between - after, before, between, after)


def run(command: list[str]) -> tuple[Span, list[tuple[float, str]]]:
    """Run a command and pass its output on. Returns its begin and end, and the time and text of each line."""
    lines = []
    began = time.time()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.time(), line))
            print(line, end="", flush=True)
    ended = time.time()
    if process.returncode:
        sys.exit(f"the command failed with exit code {process.returncode}: nothing was measured")
    return (began, ended), lines


def spans(output: Path) -> list[Span]:
    """Return when each finished trial in this folder of runs began and ended."""
    results = [record.read_result(path.parent) for path in output.glob(f"trials/*/{record.RESULT}")]
    return [(result.started, result.finished) for result in results if result is not None]


def stages(command: Span, lines: Sequence[tuple[float, str]], trials: Sequence[Span]) -> list[tuple[str, float]]:
    """Return the stages before the first and after the last trial with their seconds, by the times of output."""
    said = {word: next(at for at, text in lines if text.startswith(word)) for word in ("recipe ", "running ", "arm ")}
    first, last = min(start for start, _ in trials), max(end for _, end in trials)
    at = [command[0], said["recipe "], said["running "], first]
    names = ["imports and checks", "MLflow's store, Ray's start", "the trials' processes start"]
    found = [(name, until - since) for name, since, until in zip(names, at, at[1:], strict=False)]
    return [
        *found,
        ("Ray's end, the table", said["arm "] - last),
        ("MLflow's end, the exit", command[1] - said["arm "]),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="keep the runs here; must be empty or missing")
    options = parser.parse_args(arguments)
    if options.output and options.output.exists() and any(options.output.iterdir()):
        parser.error(f"--output {options.output}: is not empty, and finished trials are not run again")
    with tempfile.TemporaryDirectory() as scratch:
        output = (options.output or Path(scratch) / "runs").resolve()
        load = os.getloadavg()[0]
        command = [sys.executable, "experiments/ablate_kernel.py", "--output", str(output)]
        span, lines = run([*command, "--tracking-uri", f"sqlite:///{scratch}/mlflow.db"])
        trials = spans(output)
    is_cold = any(text.startswith("rendering the embedded world") for _, text in lines)
    share = share_of(span, trials)
    print(f"\n{datetime.date.today()}, {hardware.cpu_name()}, {os.cpu_count()} cores, load {load:.1f} before,")
    print(f"{os.getloadavg()[0]:.1f} after; clips {'rendered in this run' if is_cold else 'there already'}\n")
    print("| | seconds | % |\n|---|---:|---:|")
    rows = [("in all", share.total), (f"at least one of {len(trials)} trials ran", share.inside)]
    rows += [("outside", share.outside), ("— before the first trial", share.before)]
    rows += [("— between two", share.between), ("— after the last", share.after)]
    rows += [(f"—— {name}", seconds) for name, seconds in stages(span, lines, trials)]
    for name, seconds in rows:
        print(f"| {name} | {seconds:.1f} | {100 * seconds / share.total:.1f} |")
    missed = share.outside > TARGET_SHARE * share.total
    print(f"\noutside: target below {100 * TARGET_SHARE:.0f} %, {'missed' if missed else 'met'}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
