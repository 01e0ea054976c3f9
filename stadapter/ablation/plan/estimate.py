"""The time that trainings will take, estimated without data, weights, GPUs or Ray.

A training's operations are taken as

    2 * MACs * (training clips * epochs * (1 + share of blocks with a graph + share of trained parameters)
                + validation clips * epochs + test clips * test views)

and divided by the rate that finished trials on the same device reached, or else by the vendor's peak times UTILISATION.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stadapter.ablation.plan.gpus import GPUS, gpu_named
from stadapter.ablation.plan.memory import HALF
from stadapter.config import ConfigError, Recipe
from stadapter.data.lists.formats import load_clips
from stadapter.model.build import meta_model
from stadapter.model.cost import Cost, cost_of
from stadapter.training import hardware
from stadapter.trials.status import Entry
from stadapter.trials.sweep import Trial

UTILISATION = 0.35  # of the vendor's peak, where no trial has finished yet
UNKNOWN_SIZE = 100_000  # training clips that hours are given for where the data set's lists are not there


@dataclass(frozen=True)
class Work:
    """The clips of one training."""

    train: int  # per epoch, views of repeated augmentation included
    val: int
    test: int
    is_known: bool  # False: UNKNOWN_SIZE training clips, and nothing else


def work_of(recipe: Recipe, data_root: str | Path | None) -> Work:
    """Return the clips of the data set's lists, or UNKNOWN_SIZE clips where the lists are not there."""
    try:
        sizes = [len(load_clips(recipe.data, data_root, split)) for split in ("train", "val", "test")]
    except ConfigError:
        if data_root is not None:
            raise
        return Work(UNKNOWN_SIZE, 0, 0, False)
    return Work(sizes[0] * recipe.data.repeated_augmentation, sizes[1], sizes[2], True)


def operations(recipe: Recipe, cost: Cost, work: Work) -> float:
    """Return the floating-point operations of a training with its validations and its test."""
    model = meta_model(recipe)
    depth = len(model.vit.blocks)
    graph = (depth - max(0, model.first_trained_block())) / depth
    step = 1 + graph + cost.trainable_params / cost.total_params
    views = recipe.data.test_temporal_views * recipe.data.test_spatial_views
    clips = recipe.optim.epochs * (work.train * step + work.val) + work.test * views
    return 2.0 * cost.macs_per_view * clips


def rate_of(entries: Sequence[Entry], recipe: Recipe, gpu: str | None) -> tuple[float | None, str]:
    """Return the operations per second of one process, and the source of that number in words.

    `gpu` None means this machine's CPU, for which no rate (None) is known before a trial has finished on it.
    """
    rates, here = [], hardware.device_name(torch.device("cpu"))
    for entry in entries:
        if (done := entry.result) is None or done.precision != recipe.optim.precision:
            continue
        if done.prefix_cache:  # cached tokens: it did not compute all that `operations` counts
            continue
        if (done.device != here) if gpu is None else (gpu_named(done.device) != gpu):
            continue
        recipe_of_trial = entry.trial.recipe
        sizes = {split: used.clips for split, used in done.data.items()}
        train = sizes["train"] * recipe_of_trial.data.repeated_augmentation
        work = Work(train, sizes["test"], sizes["test"], True)  # a record does not tell the validation list's size
        rates.append(operations(recipe_of_trial, cost_of(recipe_of_trial), work) / done.seconds / (done.processes or 1))
    if rates:
        return statistics.median(rates), f"calibrated from {len(rates)} finished trials"
    if gpu is None:
        return None, "no trial has finished on this CPU yet, so no rate is known"
    peak = GPUS[gpu].half_tflops if recipe.optim.precision in HALF else GPUS[gpu].float32_tflops
    source = f"{peak:g} TFLOP/s ({GPUS[gpu].source}) at {100 * UTILISATION:.0f} % utilisation, an assumption"
    return peak * 1e12 * UTILISATION, source


def estimate_seconds(
    trials: Sequence[Trial], entries: Sequence[Entry], data_root: str | Path | None, gpu: str | None, processes: int
) -> float | None:
    """Return the seconds that these trials will take one after the other; None if no rate is known."""
    total = 0.0
    for arm in {trial.arm: trial for trial in trials}.values():
        rate, _ = rate_of(entries, arm.recipe, gpu)
        if rate is None:
            return None
        count = sum(trial.arm == arm.arm for trial in trials)
        work = work_of(arm.recipe, data_root)
        total += count * operations(arm.recipe, cost_of(arm.recipe), work) / rate / processes
    return total
