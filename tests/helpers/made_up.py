"""Output folders with made-up records, for tests that read records. No number here was measured."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from stadapter import config, recipes
from stadapter.config import Recipe
from stadapter.trials import record
from stadapter.trials.record import ClipsUsed, Record
from stadapter.trials.sweep import Arm, Axis, Sweep, Trial, make_sweep, save_sweep

KERNEL = {"kernel 1x3x3": 48.0, "kernel 3x3x3": 96.0, "kernel 5x3x3": 97.0, "kernel 7x3x3": 96.5}
KERNEL_AXIS = Axis("temporal extent of the kernel (frames)")


def kernel_sweep(seeds: int = 2, recipe: Recipe = recipes.embedded) -> Sweep:
    arms = [
        Arm(label, {"adapter.kernel_size": (int(label[7]), 3, 3)}, int(label[7]), "spatial extent 3×3")
        for label in KERNEL
    ]
    question, expected = "Does it matter how far it looks?", "A step, then a plateau."
    return make_sweep("kernel", question, recipe, arms, seeds, expected, KERNEL_AXIS)


def result(trial: Trial, top1: float, **more: Any) -> Record:
    """Return a made-up record with the fields that `train` fills."""
    adapter = trial.recipe.adapter
    params = 1000 + adapter.bottleneck_width * 1000 + 6 * adapter.bottleneck_width * adapter.kernel_size[0] * 9
    params = params * len(adapter.blocks or range(6)) // 6
    values: dict[str, Any] = {
        "trial_id": trial.id,
        "recipe": config.flatten(trial.recipe),
        "metrics": {"top1": top1, "top5": min(100.0, top1 + 20), "loss": 0.3, "direction_top1": (100 + top1) / 2},
        "epoch": trial.recipe.optim.epochs,
        "trainable_params": params,
        "macs_per_view": int(1.6e8 + 50 * params),
        "views": 1,
        "seconds": 40.0 + trial.seed,
        "cpu_seconds": 38.0,
        "peak_memory_mib": 900.0,
        "device": "made up",
        "precision": "float32",
        "data": {"train": ClipsUsed("0" * 16, 720), "test": ClipsUsed("1" * 16, 360)},
        "started": 1.7e9,
        "finished": 1.7e9 + 40,
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
    }
    return Record(**(values | more))


def write(
    sweep: Sweep, output: Path, means: dict[str, float], spread: float = 1.0, leave_out: int | None = None
) -> None:
    """Write a sweep and, for each trial but number `leave_out`, a record around the mean of its arm."""
    sweep.folder(output).mkdir(parents=True, exist_ok=True)
    save_sweep(sweep, output)
    for number, trial in enumerate(sweep.trials):
        if number != leave_out:
            noise = random.Random(f"{trial.id}").gauss(0, spread)
            folder = trial.folder(output)
            record.prepare_folder(folder, trial.recipe)
            record.write_result(folder, result(trial, round(min(100.0, means[trial.arm] + noise), 2)))
