"""What the orchestration of a sweep costs: per trial, and to answer about a thousand trials that have finished.

    python -m benchmarks.sweep

One-process trials on the embedded videos, one step each, on one CPU core: the wall time of many less that of few, less
what the records say the training took, over their difference in number. The plain reference starts a process per trial.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from stadapter import config, recipes, record
from stadapter.ablation.sweep import Cluster, Resources, run_trials
from stadapter.ablation.tracking import sync
from stadapter.ablation.trial import Arm, Trial, make_sweep, records, save_sweep
from stadapter.machine import device_name
from stadapter.train import Operation, train

FEW, MANY = 2, 22
THOUSAND = 1000
TRIVIAL = {"optim.epochs": 1, "optim.warmup_epochs": 0.5, "optim.global_batch": 720, "adapter.blocks": (5,)}


def main() -> None:
    import torch

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        print(f"{device_name(torch.device('cpu'))}\n")
        per_trial, reference = orchestration(place)
        print(f"orchestration, seconds per trial after the first:  {per_trial:.3f}")
        print(f"a process per trial, seconds besides its training: {reference:.1f}")
        for what, seconds in thousand(place).items():
            print(f"{THOUSAND} finished trials, {what}: {seconds:.1f} s")


def orchestration(place: Path) -> tuple[float, float]:
    """Seconds that a trial costs besides its training, on Ray and in a process of its own."""
    base = config.replace(recipes.embedded, **TRIVIAL)
    with Cluster(Resources()) as cluster:

        def run(first: int, count: int) -> tuple[float, float]:
            trials = [Trial("trivial", config.replace(base, seed=first + number)) for number in range(count)]
            began = time.perf_counter()
            run_trials(cluster, trials, place, Operation(), lambda *event: None)
            wall_s = time.perf_counter() - began
            results = [record.read_result(trial.folder(place)) for trial in trials]
            slots = cluster.trials_at_once()
            return wall_s, sum(result["seconds"] for result in results if result is not None) / slots

        run(0, FEW)  # the first pays for the imports of its process
        few_s, few_training_s = run(FEW, FEW)
        many_s, many_training_s = run(2 * FEW, MANY)
    per_trial = ((many_s - few_s) - (many_training_s - few_training_s)) / (MANY - FEW)
    command = [sys.executable, "-m", "stadapter", "train", "--output", str(place / "alone")]
    command += [word for path, value in TRIVIAL.items() for word in ("--set", f"{path}={_flag(value)}")]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    alone_s = time.perf_counter() - began
    result = record.read_result(place / "alone")
    assert result is not None
    return per_trial, alone_s - result["seconds"]


def thousand(place: Path) -> dict[str, float]:
    """Seconds to answer about a thousand trials whose records are copies of one."""
    recipe = config.replace(recipes.embedded, **TRIVIAL)
    model = place / "model"
    train(recipe, model, Operation())
    result = record.read_result(model)
    assert result is not None
    output = place / "thousand"
    arms = [Arm(f"width {width}", {"adapter.bottleneck_width": width}) for width in range(1, 101)]
    sweep = make_sweep("width", "?", recipe, arms, THOUSAND // len(arms))
    for trial in sweep.trials:
        folder = trial.folder(output)
        record.prepare_folder(folder, trial.recipe)
        (folder / record.METRICS).write_bytes((model / record.METRICS).read_bytes())
        copy = result | {"trial_id": trial.id, "recipe": config.flatten(trial.recipe)}
        (folder / record.RESULT).write_text(json.dumps(copy))
    sweep.folder(output).mkdir(parents=True)
    save_sweep(sweep, output)
    store = f"sqlite:///{place}/mlflow.db"
    relaunch = [sys.executable, "experiments/ablate_width.py", "--recipe", "embedded", "--num-gpus", "0"]
    relaunch += ["--output", str(output), "--tracking-uri", "none", "--seeds", str(THOUSAND // len(arms))]
    relaunch += ["--values", *(str(width) for width in range(1, 101))]
    relaunch += [word for path, value in TRIVIAL.items() for word in ("--set", f"{path}={_flag(value)}")]
    return {
        "the same command again": _timed(lambda: subprocess.run(relaunch, check=True, capture_output=True)),
        "reading the ledger": _timed(lambda: records(sweep, output)),
        "copying them to MLflow": _timed(lambda: sync(sweep, output, store)),
        "copying them to MLflow again": _timed(lambda: sync(sweep, output, store)),
    }


def _flag(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
