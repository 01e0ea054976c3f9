"""The overhead of a sweep: between two trials, when all trials have finished, and with many trials.

    python -m benchmarks.sweep

The trials train for a fraction of a second on 16 small clips, one after the other. The time between two trials runs
from one record's `finished` to the next one's `started`. The plain way is a process per trial (`stadapter train`); its
cost is the process's time less the training time in its record.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stadapter import config, recipes
from stadapter.config import Recipe
from stadapter.data.lists.embedded_rendering import MOTION_CLASSES, render_clip, write_mp4
from stadapter.data.lists.formats import load_clips
from stadapter.results import table
from stadapter.trials import record, status
from stadapter.trials.record import Record
from stadapter.trials.sweep import Arm, Sweep, make_sweep, records, save_sweep

ROOT = Path(__file__).parent.parent
RELAUNCHED, MANY = 60, 1000
TINY: dict[str, Any] = {
    "data.dataset": "folder",
    "data.num_classes": 2,
    "data.num_frames": 4,
    "backbone.weights": "seed:0",
    "adapter.bottleneck_width": 8,
    "adapter.blocks": (4, 5),
    "optim.epochs": 1,
    "optim.warmup_epochs": 0.5,
    "optim.global_batch": 4,
}


def write_clips(root: Path) -> Path:
    for split, count in (("train", 16), ("val", 4)):
        for number in range(count):
            motion = number % 2
            folder = root / split / MOTION_CLASSES[motion]
            folder.mkdir(parents=True, exist_ok=True)
            index = motion + len(MOTION_CLASSES) * (number // 2)
            write_mp4(folder / f"{number}.mp4", render_clip("train" if split == "train" else "val", index))
    return root


def flags(clips: Path) -> list[str]:
    values = {path: ",".join(map(str, v)) if isinstance(v, tuple) else v for path, v in TINY.items()}
    overrides = [word for path, value in values.items() for word in ("--set", f"{path}={value}")]
    return ["--recipe", "embedded", *overrides, "--data-root", str(clips)]


def between_trials_s(clips: Path, output: Path, trials: int, recipe: Recipe) -> list[float]:
    """Return the seconds between consecutive trials of a sweep that runs one at a time."""
    from stadapter.cluster.ray_runtime import Cluster
    from stadapter.cluster.resources import Resources
    from stadapter.cluster.runner import run_trials
    from stadapter.training.options import TrainOptions

    sweep = make_sweep("none", "?", recipe, [Arm("only", {})], trials)
    with Cluster(Resources(cpus_per_process=os.cpu_count() or 1)) as cluster:
        run_trials(cluster, sweep.trials, output, TrainOptions(data_root=clips), lambda *event: None)
    found = sorted((r for r in records(sweep, output) if r is not None), key=lambda result: result.started)
    assert len(found) == trials
    return [after.started - before.finished for before, after in itertools.pairwise(found)]


def process_per_trial_s(clips: Path, output: Path, trials: int) -> list[float]:
    costs = []
    for seed in range(trials):
        command = [sys.executable, "-m", "stadapter", "train", *flags(clips), "--seed", str(seed)]
        began = time.time()
        subprocess.run([*command, "--output", str(output / str(seed))], check=True, capture_output=True)
        took = time.time() - began
        result = record.read_result(output / str(seed))
        assert result is not None
        costs.append(took - result.seconds)
    return costs


def pretend_finished(sweep: Sweep, output: Path, result: Record) -> None:
    """Write copies of one real record, as if all trials of the sweep had finished."""
    sweep.folder(output).mkdir(parents=True)
    save_sweep(sweep, output)
    for trial in sweep.trials:
        folder = trial.folder(output)
        record.prepare_folder(folder, trial.recipe)
        done = dataclasses.replace(result, trial_id=trial.id, recipe=config.flatten(trial.recipe))
        record.write_result(folder, done)
        epoch = {"epoch": 1, "step": 4, "time": result.finished, "train_loss": 0.7, "val_top1": 50.0, "seconds": 1.0}
        (folder / record.METRICS).write_text(json.dumps(epoch) + "\n")


def relaunch_s(clips: Path, output: Path, recipe: Recipe, result: Record, store: str) -> float:
    """Return the seconds of the command for a sweep of 60 finished trials, launched a second time."""
    seeds = RELAUNCHED // 4
    arms = [Arm(f"kernel {k}x3x3", {"adapter.kernel_size": (k, 3, 3)}) for k in (1, 3, 5, 7)]
    if not output.exists():
        pretend_finished(make_sweep("kernel", "?", recipe, arms, seeds), output, result)
    command = [sys.executable, str(ROOT / "experiments" / "ablate_kernel.py"), *flags(clips), "--seeds", str(seeds)]
    command += ["--output", str(output), "--tracking-uri", store]
    subprocess.run(command, check=True, capture_output=True)
    began = time.time()
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"{RELAUNCHED} finished before" in said
    return time.time() - began


def many_trials_s(output: Path, recipe: Recipe, result: Record) -> dict[str, float]:
    """Return the seconds of each operation on a thousand finished trials."""
    from stadapter.commands.main import main
    from stadapter.tracking.mirror import sync

    arms = [Arm(f"width {width}", {"adapter.bottleneck_width": width}) for width in range(1, 101)]
    sweep = make_sweep("width", "?", recipe, arms, MANY // 100)
    pretend_finished(sweep, output, result)
    took = {}
    began = time.time()
    assert all(status.entry(trial, output).status == "done" for trial in sweep.trials)
    took["the ledger"] = time.time() - began
    began = time.time()
    table.to_text(sweep, records(sweep, output))
    took["the table"] = time.time() - began
    began = time.time()
    with contextlib.redirect_stdout(io.StringIO()):
        main(["table", "--output", str(output)])
    took["`table`"] = time.time() - began
    for what in ("`sync` into a new SQLite store", "`sync` again"):
        began = time.time()
        sync(sweep, output, f"sqlite:///{output}/mlflow.db")
        took[what] = time.time() - began
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{output}/mlflow.db")
    began = time.time()
    experiment = client.get_experiment_by_name("stadapter")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], "tags.trial_id LIKE '%'", max_results=2 * MANY)
    took["MLflow finds them"] = time.time() - began
    assert len({run.data.tags["trial_id"] for run in found}) == MANY
    return took


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=12, metavar="N", help="that train (default: %(default)s)")
    options = parser.parse_args(arguments)
    recipe = config.replace(recipes.embedded, **TINY)
    rows: list[tuple[str, float, float | None]] = []
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        clips = write_clips(here / "clips")
        gaps = between_trials_s(clips, here / "runs", options.trials, recipe)
        plain = process_per_trial_s(clips, here / "plain", min(3, options.trials))
        rows.append(("per trial: between two on Ray (median)", statistics.median(gaps), 0.2))
        rows.append(("per trial: the longest such gap", max(gaps), None))
        rows.append(("per trial: a process each (median)", statistics.median(plain), None))
        result = record.read_result(here / "plain" / "0")
        assert result is not None
        assert result.fingerprints["train"] == load_clips(recipe.data, clips, "train").fingerprint()
        for store, name in (("none", "without MLflow"), (f"sqlite:///{here}/mlflow.db", "with MLflow")):
            took = relaunch_s(clips, here / "done", recipe, result, store)
            rows.append((f"{RELAUNCHED} finished trials, launched again {name}", took, 5))
        for what, took in many_trials_s(here / "many", recipe, result).items():
            rows.append((f"{MANY:,} finished trials: {what}", took, None))
    print(f"{datetime.date.today()}, {options.trials} trials of {result.device}\n")
    print("| | seconds | target |\n|---|---:|---:|")
    for what, took, target in rows:
        print(f"| {what} | {took:.2f} | {'' if target is None else f'{target:g}'} |")
    return int(any(target is not None and took > target for _, took, target in rows))


if __name__ == "__main__":
    sys.exit(main())
