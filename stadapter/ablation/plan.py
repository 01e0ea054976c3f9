"""What a sweep will cost, before anything is started: counted on meta tensors, without data, weights, GPUs or Ray.

Counted exactly: parameters, multiply-accumulates, bytes reduced per step, bytes of optimiser and checkpoints. Between
two counts: the tensors that autograd keeps, since autocast and the attention kernels that a GPU chooses lie between
plain float32 and fused half precision. Estimated: time. A training's operations are taken as

    2 * MACs * (training clips * epochs * (1 + share of blocks with a graph + share of trained parameters)
                + validation clips * epochs + test clips * test views)

over the rate that finished trials on the same device reached, or else the vendor's peak times UTILISATION.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from stadapter.ablation.flags import check_gpu_flags
from stadapter.ablation.gpus import DEFAULT_GPU, GPUS, gpu_named
from stadapter.config import ConfigError, Recipe
from stadapter.data.lists.formats import load_clips
from stadapter.model.build import meta_model
from stadapter.model.cost import Cost, cost_of
from stadapter.training import hardware
from stadapter.training.options import GPU_CLIPS_PER_PASS
from stadapter.training.token_cache import check_pixels
from stadapter.trials import record
from stadapter.trials.record import Record
from stadapter.trials.status import Entry
from stadapter.trials.sweep import Sweep, Trial

UTILISATION = 0.35  # of the vendor's peak, where no trial has finished yet
USABLE = 0.9  # of a GPU's memory: the rest is the libraries' and the allocator's
UNKNOWN_SIZE = 100_000  # training clips that hours are given for where the data set's lists are not there
MIB = 2**20
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """Clips of one training."""

    train: int  # per epoch, views of repeated augmentation included
    val: int
    test: int
    is_known: bool  # False: UNKNOWN_SIZE training clips, and nothing else


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    fixed: int  # weights, gradients, optimiser
    activations_most: int  # as float32, attention weights included
    activations_least: int  # all of them in the recipe's precision, by attention kernels that keep no weights

    def fits(self, capacity: float) -> str:
        if self.fixed + self.activations_most <= capacity:
            return "fits"
        return "may not fit" if self.fixed + self.activations_least <= capacity else "does not fit"


def work_of(recipe: Recipe, data_root: str | Path | None) -> Work:
    """From the data set's lists, or for UNKNOWN_SIZE clips where they are not there."""
    try:
        sizes = [len(load_clips(recipe.data, data_root, split)) for split in ("train", "val", "test")]
    except ConfigError:
        if data_root is not None:
            raise
        return Work(UNKNOWN_SIZE, 0, 0, False)
    return Work(sizes[0] * recipe.data.repeated_augmentation, sizes[1], sizes[2], True)


def operations(recipe: Recipe, cost: Cost, work: Work) -> float:
    """Floating-point operations of a training with its validations and its test."""
    model = meta_model(recipe)
    depth = len(model.vit.blocks)
    graph = (depth - max(0, model.first_trained_block())) / depth
    step = 1 + graph + cost.trainable_params / cost.total_params
    views = recipe.data.test_temporal_views * recipe.data.test_spatial_views
    clips = recipe.optim.epochs * (work.train * step + work.val) + work.test * views
    return 2.0 * cost.macs_per_view * clips


def memory_of(recipe: Recipe, cost: Cost, clips_per_pass: int, *, recompute: bool = False) -> Memory:
    """Of one process that trains on a GPU."""
    half = HALF.get(recipe.optim.precision)
    frozen = cost.total_params - cost.trainable_params
    fixed = frozen * (2 if half else 4) + cost.trainable_params * 16  # weight, gradient, two moments
    most = _saved_bytes(recipe, torch.float32, clips_per_pass, recompute)
    with _FusedAttention():
        least = _saved_bytes(recipe, half or torch.float32, clips_per_pass, recompute)
    return Memory(fixed, most, min(least, most))  # with few tokens the kernels keep no less


class _FusedAttention(TorchFunctionMode):
    """Attention as a GPU's kernels save it, without [M, heads, S, S] weights: meta tensors would take the plain way."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args
        if q.dtype == torch.float32:
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _saved_bytes(recipe: Recipe, dtype: torch.dtype, clips: int, recompute: bool) -> int:
    """What autograd keeps of a forward pass through the blocks, parameters left out: linear in the clips."""
    model = meta_model(recipe).to(dtype)
    model.recompute = recompute
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    T, side = recipe.data.num_frames, recipe.data.frame_size

    def saved(count: int) -> int:
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        pixels = torch.empty(count * T, 3, side, side, dtype=dtype, device="meta")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model.run_blocks(pixels, T)
            total = sum(storage.nbytes() for storage in kept.values())
        del out
        return total

    one, two = saved(1), saved(2)
    return one + (clips - 1) * (two - one)


def rate_of(entries: Sequence[Entry], recipe: Recipe, gpu: str | None) -> tuple[float | None, str]:
    """Operations per second of one process, and where that number is from. `gpu` None: this machine's CPU."""
    rates, here = [], hardware.device_name(torch.device("cpu"))
    for entry in entries:
        if (done := entry.result) is None or done.precision != recipe.optim.precision:
            continue
        if done.prefix_cache:  # it did not compute what `operations` counts
            continue
        if (done.device != here) if gpu is None else (gpu_named(done.device) != gpu):
            continue
        own = entry.trial.recipe
        sizes = {split: used.clips for split, used in done.data.items()}
        train = sizes["train"] * own.data.repeated_augmentation
        work = Work(train, sizes["test"], sizes["test"], True)  # a record does not tell the validation list's size
        rates.append(operations(own, cost_of(own), work) / done.seconds / (done.processes or 1))
    if rates:
        return statistics.median(rates), f"calibrated from {len(rates)} finished trials"
    if gpu is None:
        return None, "no trial has finished on this CPU yet, so no rate is known"
    peak = GPUS[gpu].half_tflops if recipe.optim.precision in HALF else GPUS[gpu].float32_tflops
    source = f"{peak:g} TFLOP/s ({GPUS[gpu].source}) at {100 * UTILISATION:.0f} % utilisation, an assumption"
    return peak * 1e12 * UTILISATION, source


def estimate_seconds(
    trials: Sequence[Trial], entries: Sequence[Entry], options: argparse.Namespace, gpu: str | None, processes: int
) -> float | None:
    """Seconds that these trials will take together, each alone on its devices; None where no rate is known."""
    total = 0.0
    for arm in {trial.arm: trial for trial in trials}.values():
        rate, _ = rate_of(entries, arm.recipe, gpu)
        if rate is None:
            return None
        count = sum(trial.arm == arm.arm for trial in trials)
        work = work_of(arm.recipe, options.data_root)
        total += count * operations(arm.recipe, cost_of(arm.recipe), work) / rate / processes
    return total


def show_plan(sweep: Sweep, selected: Sequence[Trial], entries: Sequence[Entry], options: argparse.Namespace) -> int:
    """Print it; returns the exit code."""
    if options.cache_prefix:
        for trial in sweep.trials:
            check_pixels(trial.recipe)
    num_gpus = _planned_gpus(options)
    gpu = _gpu(options) if num_gpus else None
    processes = options.gpus_per_trial if num_gpus else options.processes_per_trial or 1
    chosen = {trial.id for trial in selected}
    todo = [e.trial for e in entries if e.trial.id in chosen and (options.force or e.result is None)]
    print(f"{sweep.question}\n")
    print(f"recipe {sweep.recipe.name}: {len(entries)} trials, {len(todo)} to run; nothing is started\n")
    width = max(len(entry.trial.name) for entry in entries)
    for entry in entries:
        status = entry.status if entry.trial.id in chosen else f"{entry.status}, left out by --only"
        if options.force and entry.result is not None and entry.trial.id in chosen:
            status = "done, to run again (--force)"
        print(f"  {entry.trial.name:<{width}}  {entry.trial.id}  {status}")
    clips_per_pass = options.clips_per_pass or (GPU_CLIPS_PER_PASS if num_gpus else sweep.recipe.optim.global_batch)
    clips_per_pass = min(clips_per_pass, sweep.recipe.optim.global_batch // processes)
    rows = [["arm", "trainable", "GMACs/view", "reduced/step", f"memory, {clips_per_pass} clips", "GPU", "h/trial"]]
    hours_in_all: float | None = 0.0
    checkpoint_bytes = 0
    work, sources = work_of(sweep.recipe, options.data_root), set()
    for arm in sweep.arms:
        recipe = next(trial.recipe for trial in sweep.trials if trial.arm == arm.label)
        cost = cost_of(recipe)
        memory = memory_of(recipe, cost, clips_per_pass, recompute=options.recompute)
        rate, source = rate_of(entries, recipe, gpu)
        sources.add(source)
        hours = operations(recipe, cost, work) / rate / processes / 3600 if rate else None
        count = sum(trial.arm == arm.label for trial in todo)
        hours_in_all = None if hours is None or hours_in_all is None else hours_in_all + hours * count
        checkpoint_bytes += count * cost.trainable_params * (2 * 12 + 4)  # two of weight and moments, and the outcome
        rows.append(
            [
                arm.label,
                f"{cost.trainable_params:,}",
                f"{cost.macs_per_view / 1e9:.4g}",
                f"{cost.trainable_params * 4 / MIB:.1f} MiB" if processes > 1 else "-",
                _memory_text(memory),
                memory.fits(USABLE * GPUS[gpu].memory_gib * 2**30) if gpu else "-",
                "-" if hours is None else f"{hours:.3g}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print()
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells))
    print()
    for line in _notes(num_gpus, gpu, processes, work, sources, hours_in_all, checkpoint_bytes, len(todo), options):
        print(line)
    return 0


def _memory_text(memory: Memory) -> str:
    least, most = ((memory.fixed + part) / MIB for part in (memory.activations_least, memory.activations_most))
    return f"{most:,.0f} MiB" if least == most else f"{least:,.0f} to {most:,.0f} MiB"


def _notes(
    num_gpus: int, gpu: str | None, processes: int, work: Work, sources: set[str], hours: float | None,
    checkpoint_bytes: int, todo: int, options: argparse.Namespace,
) -> list[str]:  # fmt: skip
    on = f"{num_gpus} x {gpu}" if gpu else "the CPU"
    lines = [f"Planned for {on}, {processes} {'GPU' if gpu else 'process'}{'s' if processes > 1 else ''} per trial."]
    lines.append("Memory: weights, gradients, optimiser and saved activations, without the libraries' own.")
    if gpu and not options.gpu and not torch.cuda.is_available():
        lines.append(f"No GPU is here and --gpu names none: {DEFAULT_GPU} is assumed.")
    if not work.is_known:
        lines.append(
            f"The data set's lists are not here (--data-root): hours are for {UNKNOWN_SIZE:,} training clips, without "
            "validation and test."
        )
    lines.append(f"Hours: {'; '.join(sorted(sources))}; of computing, if the decoding keeps up.")
    if hours is not None and todo:
        slots = num_gpus * options.trials_per_gpu if gpu else os.cpu_count() or 1
        at_once = max(1, slots // processes)
        kind = "GPU-hours" if gpu else "hours of processes"
        lines.append(
            f"In all: {hours * processes:.3g} {kind} for {todo} trials; {hours / min(at_once, todo):.3g} hours with "
            f"{min(at_once, todo)} at a time."
        )
    disk = f"Disk: {checkpoint_bytes / MIB:,.0f} MiB of checkpoints and results"
    lines.append(disk + (f", and up to {options.cache_gb:g} GB of decoded frames." if options.cache_gb else "."))
    if options.cache_prefix:
        lines.append(
            f"--cache-prefix: up to {options.cache_prefix:g} GB of tokens on each node; the hours are without it, an "
            "upper bound for arms with frozen lower blocks."
        )
    return lines


def _planned_gpus(options: argparse.Namespace) -> int:
    there = torch.cuda.device_count() or (1 if options.gpu else 0)
    planned: int = there if options.num_gpus is None else options.num_gpus
    check_gpu_flags(options, planned)
    if options.gpu and not planned:
        raise ConfigError(f"--gpu {options.gpu}: --num-gpus 0 plans for the CPU; leave one of them out")
    return planned


def _gpu(options: argparse.Namespace) -> str:
    if options.gpu:
        return str(options.gpu)
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if found := gpu_named(name):
            return found
        raise ConfigError(f"--plan: nothing is known of this machine's {name}; name a similar one with --gpu")
    return DEFAULT_GPU


def compare_with_reality(estimate_s: float | None, trials: Sequence[Trial], output: Path) -> str:
    """One line for the end of a sweep; empty where there was no estimate or a trial is missing."""
    results: list[Record | None] = [record.read_result(trial.folder(output)) for trial in trials]
    if estimate_s is None or not results or any(result is None for result in results):
        return ""
    took_s = sum(result.seconds for result in results if result is not None)
    return f"Planned: {estimate_s / 3600:.3g} hours for these {len(trials)} trials; taken: {took_s / 3600:.3g}."
