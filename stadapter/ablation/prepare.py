"""From a sweep and its options to a request that can be launched; all input is checked on the way.

torch loads only if a trial is missing. The command for a finished sweep stays light: it took 0.5 s for 60 trials.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stadapter.ablation.options import SweepOptions
from stadapter.ablation.plan.gpus import gpu_named
from stadapter.cluster.join import join_cluster
from stadapter.cluster.resources import Resources
from stadapter.config import ConfigError
from stadapter.data.cache.disk_need import describe, disk_need
from stadapter.data.lists.clip_list import ClipList
from stadapter.data.lists.formats import load_clips
from stadapter.training.options import GPU_CLIPS_PER_PASS, TrainOptions
from stadapter.trials import record, status
from stadapter.trials.sweep import Sweep, Trial


@dataclass(frozen=True)
class Training:
    """The part of a request that only missing trials need."""

    options: TrainOptions
    resources: Resources
    estimate_s: float | None  # of all missing trials together; None where no rate is known
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """A sweep whose input was checked. `training` is None where every selected trial has a result."""

    sweep: Sweep
    selected: Sequence[Trial]  # in the order in which they should run
    missing: frozenset[str]  # ids of those among them that have no result yet
    output: Path
    options: SweepOptions
    training: Training | None = None


def prepare(sweep: Sweep, options: SweepOptions) -> Request:
    """Check the input and decide what runs where. Writes nothing and starts nothing, but may fetch weights.

    Raises ConfigError if a trial could not run, or if a finished one saw other clips.
    """
    output = options.output.resolve()
    selected = status.select(sweep.trials, options.only)
    _check_writable(options.output, output)
    entries = status.entries(sweep, output)
    missing = missing_trials(selected, entries, force=options.force)
    missing_ids = frozenset(trial.id for trial in missing)
    data_root = options.training.data_root
    if not missing:
        clips = {split: load_clips(sweep.recipe.data, data_root, split) for split in ("train", "test")}
        _check_same_clips(entries, missing_ids, clips, output)
        return Request(sweep, selected, missing_ids, output, options)

    num_gpus = count_gpus(options)
    dead, macs = _check_arms(sweep, options, num_gpus)
    clips = {split: load_clips(sweep.recipe.data, data_root, split) for split in ("train", "val", "test")}
    if options.address is None:
        _fetch_weights(sweep, options)
    _check_same_clips(entries, missing_ids, clips, output)
    training = Training(
        make_train_options(options, num_gpus),
        make_resources(options, num_gpus),
        _estimate(missing, entries, options, num_gpus),
        (*_notes(sweep, dead, clips, options), *_precision_note(sweep, options, num_gpus)),
    )
    # The longest first: none of them then runs alone at the end.
    order = sorted(selected, key=lambda trial: -macs[trial.arm] * trial.recipe.optim.epochs)
    return Request(sweep, order, missing_ids, output, options, training)


def missing_trials(selected: Sequence[Trial], entries: Sequence[status.Entry], *, force: bool) -> list[Trial]:
    """Return the selected trials that are to run: those without a result, all of them with `force`."""
    done = {entry.trial.id for entry in entries if entry.result is not None}
    return [trial for trial in selected if force or trial.id not in done]


def count_gpus(options: SweepOptions, *, join: bool = True) -> int:
    """Return how many GPUs the sweep uses. Counts those of the cluster, joining it, or with join=False of this machine.

    Raises ConfigError if the options ask for what is not there.
    """
    if options.address is not None and join:
        there, where = join_cluster(options.address), f"the cluster at {options.address}"
    else:
        import torch

        there, where = torch.cuda.device_count(), "this machine"
    wanted = there if options.num_gpus is None else options.num_gpus
    if wanted > there:
        raise ConfigError(f"--num-gpus {wanted}: {where} has {there}; --num-gpus 0 runs without")
    options.check_gpus(wanted)
    return wanted


def make_resources(options: SweepOptions, num_gpus: int) -> Resources:
    """Return how much of the machine or cluster a sweep on `num_gpus` GPUs uses."""
    return Resources(
        num_gpus,
        options.processes(num_gpus),
        _cores_per_process(options, num_gpus),
        options.trials_per_gpu if num_gpus else 1,
        options.address,
        options.dashboard_port,
        options.decode_on_cluster,
    )


def make_train_options(options: SweepOptions, num_gpus: int) -> TrainOptions:
    """Return the options of each training of a sweep on `num_gpus` GPUs."""
    workers = options.num_workers
    if workers is None:
        workers = _cores_per_process(options, num_gpus) - 1 if num_gpus else 0
    remote_loader = None
    if options.decode_on_cluster:
        from stadapter.cluster.decoding import decode_on_cluster

        remote_loader = decode_on_cluster
    return dataclasses.replace(
        options.training,
        num_workers=workers,
        clips_per_pass=options.training.clips_per_pass or (GPU_CLIPS_PER_PASS if num_gpus else None),
        remote_loader=remote_loader,
    )


def _cores_per_process(options: SweepOptions, num_gpus: int) -> int:
    if options.cpus_per_process:
        return options.cpus_per_process
    if not num_gpus:
        return 1
    if options.address is None:
        cores = (os.cpu_count() or 1) // num_gpus
    else:
        from stadapter.cluster.ray_runtime import cores_per_gpu

        cores = cores_per_gpu()  # the trials run on the cluster's nodes, not here
    return max(1, cores // options.trials_per_gpu)


def _check_arms(sweep: Sweep, options: SweepOptions, num_gpus: int) -> tuple[dict[str, int], dict[str, int]]:
    """Raise ConfigError if a trial could not run. Returns each arm's dead parameters, and its MACs per view."""
    from stadapter.data.transforms import check_transforms
    from stadapter.model.cost import cost_of

    costs = {arm: cost_of(recipe) for arm, recipe in {t.arm: t.recipe for t in sweep.trials}.items()}
    for data in {trial.recipe.data for trial in sweep.trials}:
        check_transforms(data)
    if options.training.token_cache_gb:
        from stadapter.training.token_cache import check_pixels

        for trial in sweep.trials:
            check_pixels(trial.recipe)
    processes, global_batch = options.processes(num_gpus), sweep.recipe.optim.global_batch
    if global_batch % processes:
        raise ConfigError(f"optim.global_batch = {global_batch}: cannot be shared equally by {processes} processes")
    return (
        {arm: cost.dead_params for arm, cost in costs.items()},
        {arm: cost.macs_per_view for arm, cost in costs.items()},
    )


def _fetch_weights(sweep: Sweep, options: SweepOptions) -> None:
    """Download the weights into the hub's cache once, so that no two trials download them."""
    from stadapter.backbone.load import load_backbone

    for backbone in {trial.recipe.backbone for trial in sweep.trials}:
        load_backbone(backbone, sweep.recipe.data.frame_size, weights_file=options.training.weights_file)


def _estimate(
    missing: Sequence[Trial], entries: Sequence[status.Entry], options: SweepOptions, num_gpus: int
) -> float | None:
    from stadapter.ablation.plan.estimate import estimate_seconds

    gpu = None
    if num_gpus:
        import torch

        if options.address is not None or (gpu := gpu_named(torch.cuda.get_device_name())) is None:
            return None  # not this machine's GPUs, or one of which nothing is known
    return estimate_seconds(missing, entries, options.training.data_root, gpu, options.processes(num_gpus))


def _check_same_clips(
    entries: Sequence[status.Entry], missing: frozenset[str], clips: Mapping[str, ClipList], output: Path
) -> None:
    """Raise ConfigError if a finished trial saw other clips than the data set has now."""
    seen = {split: clips[split].fingerprint() for split in ("train", "test")}
    for entry in entries:
        if entry.result is not None and entry.trial.id not in missing:
            record.check_data(entry.trial.folder(output), entry.result.fingerprints, seen)


def _check_writable(given: Path, output: Path) -> None:
    """Raise ConfigError if the folder cannot be made or written. Nothing is made yet."""
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "it is read-only" if there.is_dir() else "it is no folder"
        raise ConfigError(f"--output {given}: cannot be written ({there}: {reason}); choose another folder")


def _notes(sweep: Sweep, dead: dict[str, int], clips: Mapping[str, ClipList], options: SweepOptions) -> list[str]:
    """Return remarks on dead adapters and on the disk that caches will need."""
    notes = [
        f"note: {arm}: behind the last attention only CLS is read, so the last block's adapter there can never\n"
        f"      receive a gradient; its {count:,} parameters are neither trained nor counted as trainable"
        for arm, count in dead.items()
        if count
    ]
    if cache_gb := options.training.cache_gb:
        seeds = len({trial.seed for trial in sweep.trials})
        need = disk_need(clips, sweep.recipe.data, sweep.recipe.optim.epochs, seeds)
        notes.append(describe(need, cache_gb, seeds))
    if token_cache_gb := options.training.token_cache_gb:
        from stadapter.training import token_cache

        arms = {trial.arm: trial.recipe for trial in sweep.trials}
        kept = {clips[split].fingerprint(): len(clips[split]) for split in token_cache.kept_splits(sweep.recipe.data)}
        notes += token_cache.describe(list(arms.values()), token_cache_gb, sum(kept.values()))
    return notes


def _precision_note(sweep: Sweep, options: SweepOptions, num_gpus: int) -> list[str]:
    if options.address is not None:
        return []  # the trials run on other machines
    import torch

    from stadapter.training import hardware

    return [hardware.set_up(torch.device("cuda" if num_gpus else "cpu"), sweep.recipe.optim.precision)]
