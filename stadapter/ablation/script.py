"""The command line that every ablation script shares: from a question to a table.

    from stadapter.ablation import Arm, main

    if __name__ == "__main__":
        main(__doc__, name="kernel", values=("1", "3"), make_arm=...)

Importing this, and `--help`, stay light. So does a sweep that has finished: torch and Ray load when a trial is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stadapter import config, recipes
from stadapter.ablation.exit_codes import exit_code_of
from stadapter.ablation.flags import Values, check_gpu_flags, check_numbers, check_port, make_parser
from stadapter.ablation.launch import Request, launch
from stadapter.cluster.join import join_cluster
from stadapter.cluster.resources import Resources
from stadapter.config import ConfigError, Recipe
from stadapter.training.flags import reading_flags, speed_flags
from stadapter.training.options import GPU_CLIPS_PER_PASS
from stadapter.trials import record, status
from stadapter.trials.sweep import SWEEP, Arm, Axis, Sweep, Trial, load_sweep, make_sweep, save_sweep

if TYPE_CHECKING:
    from stadapter.data.clips import RemoteLoader
    from stadapter.data.lists.clip_list import ClipList
    from stadapter.training.options import TrainOptions


def main(
    doc: str,
    name: str,
    values: Values,
    make_arm: Callable[[Recipe, str], Arm],
    arguments: list[str] | None = None,
    axis: Axis | None = None,
) -> None:
    """Run the ablation script's command line and exit.

    `doc` is the script's docstring, its first paragraph the question, the one after 'Expected:' what should come out.
    `make_arm` turns the recipe and one of `values` (or of the words given to --values) into an arm; what it cannot
    read is a ConfigError. `values` may be a function of the recipe, where the arms worth comparing depend on it.
    `axis` is that of the figure, where the arms have an `x`.
    """
    options = make_parser(doc, name, values).parse_args(arguments)
    sys.exit(
        exit_code_of(
            lambda: _run(doc, name, values, make_arm, axis, options),
            "stopped at once; the same command goes on from there",
        )
    )


def _run(
    doc: str,
    name: str,
    values: Values,
    make_arm: Callable[[Recipe, str], Arm],
    axis: Axis | None,
    options: argparse.Namespace,
) -> int:
    check_numbers(options)
    if options.dashboard_port is not None:
        check_port("--dashboard-port", options.dashboard_port)
    recipe = _recipe(options)
    words = options.values or (values(recipe) if callable(values) else values)
    question, expected = _question_of(doc)
    arms = [make_arm(recipe, word) for word in words]
    sweep = make_sweep(name, question, recipe, arms, options.seeds, expected, axis)
    selected = status.select(sweep.trials, options.only)
    output = options.output.resolve()
    if not options.plan:
        _check_writable(options.output, output)
    entries = {trial.id: status.entry(trial, output) for trial in sweep.trials}
    if options.plan:
        from stadapter.ablation.plan import show_plan

        return show_plan(sweep, selected, list(entries.values()), options)

    # Everything that can be wrong with the input shows before anything is started or written.
    missing = [trial for trial in selected if options.force or entries[trial.id].result is None]
    if missing:
        num_gpus = _num_gpus(options)
        costs = _check(sweep, options, num_gpus)
    clips = _clips(sweep, options.data_root, ("train", "val", "test") if missing else ("train", "test"))
    if missing and options.address is None:
        _fetch_weights(sweep, options)
    seen = {split: clips[split].fingerprint() for split in ("train", "test")}
    missing_ids = frozenset(trial.id for trial in missing)
    for trial in sweep.trials:
        found = entries[trial.id].result
        if found is not None and trial.id not in missing_ids:
            record.check_data(trial.folder(output), found.fingerprints, seen)
    request = Request(sweep, selected, missing_ids, output, options)
    if missing:
        dead, macs = costs
        train_options, resources = _train_options(options, num_gpus), _resources(options, num_gpus)
        # The longest first: none of them then runs alone at the end.
        order = sorted(selected, key=lambda trial: -macs[trial.arm] * trial.recipe.optim.epochs)
        estimate_s = _estimate(missing, list(entries.values()), options, num_gpus)
        request = Request(sweep, order, missing_ids, output, options, train_options, resources, estimate_s)
    try:
        if options.force and (moved := status.set_aside(selected, output)):
            print(f"--force: {len(moved)} old records are in {moved[0].parent}")
        _describe_sweep(sweep, output)
    except OSError as error:
        raise ConfigError(
            f"--output {options.output}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    if missing:
        import torch

        from stadapter.training import hardware

        _notes(sweep, dead, clips, options)
        if options.address is None:
            print(hardware.set_up(torch.device("cuda" if num_gpus else "cpu"), sweep.recipe.optim.precision))
    return launch(request)


def _recipe(options: argparse.Namespace) -> Recipe:
    fields = dict(config.parse_override(text) for text in options.overrides)
    if "seed" in fields:
        raise ConfigError("--set seed: seeds are 0 ... N - 1 of --seeds N")
    name = options.recipe
    if name is None:
        # Only here, or when a trial is missing: to count GPUs takes torch, which takes seconds.
        num_gpus = _num_gpus(options) if options.num_gpus is None else options.num_gpus
        name = "ssv2_clip_b16" if num_gpus else "embedded"
    return recipes.with_weights(config.replace(recipes.get(name), **fields), options.weights)


def _question_of(doc: str) -> tuple[str, str]:
    """A script's question, its first paragraph, and what its paragraph 'Expected:' says."""
    paragraphs = [paragraph.replace("\n", " ") for paragraph in doc.strip().split("\n\n")]
    expected = next((p.removeprefix("Expected: ") for p in paragraphs if p.startswith("Expected: ")), "")
    return paragraphs[0], expected


def _num_gpus(options: argparse.Namespace) -> int:
    """How many GPUs the sweep uses, or a ConfigError where the flags ask for what is not there."""
    if options.address is not None and not options.plan:
        there, where = join_cluster(options.address), f"the cluster at {options.address}"
    else:
        import torch

        there, where = torch.cuda.device_count(), "this machine"
    wanted = there if options.num_gpus is None else options.num_gpus
    if wanted > there:
        raise ConfigError(f"--num-gpus {wanted}: {where} has {there}; --num-gpus 0 runs without")
    check_gpu_flags(options, wanted)
    return wanted


def processes_per_trial(options: argparse.Namespace, num_gpus: int, global_batch: int) -> int:
    processes: int = options.gpus_per_trial if num_gpus else options.processes_per_trial or 1
    if global_batch % processes:
        raise ConfigError(f"optim.global_batch = {global_batch}: cannot be shared equally by {processes} processes")
    return processes


def _check(sweep: Sweep, options: argparse.Namespace, num_gpus: int) -> tuple[dict[str, int], dict[str, int]]:
    """ConfigError where a trial could not run. Returns each arm's dead parameters, and its MACs per view."""
    from stadapter.data.transforms import check_transforms
    from stadapter.model.cost import cost_of

    costs = {arm: cost_of(recipe) for arm, recipe in {t.arm: t.recipe for t in sweep.trials}.items()}
    for data in {trial.recipe.data for trial in sweep.trials}:
        check_transforms(data)
    if options.cache_prefix:
        from stadapter.training.token_cache import check_pixels

        for trial in sweep.trials:
            check_pixels(trial.recipe)
    processes_per_trial(options, num_gpus, sweep.recipe.optim.global_batch)
    return (
        {arm: cost.dead_params for arm, cost in costs.items()},
        {arm: cost.macs_per_view for arm, cost in costs.items()},
    )


def _fetch_weights(sweep: Sweep, options: argparse.Namespace) -> None:
    """The trials find the weights in the library's cache then, and none downloads them twice."""
    from stadapter.backbone.load import load_backbone

    for backbone in {trial.recipe.backbone for trial in sweep.trials}:
        load_backbone(backbone, sweep.recipe.data.frame_size, weights_file=options.weights)


def _estimate(
    missing: list[Trial], entries: list[status.Entry], options: argparse.Namespace, num_gpus: int
) -> float | None:
    from stadapter.ablation.gpus import gpu_named
    from stadapter.ablation.plan import estimate_seconds

    gpu = None
    if num_gpus:
        import torch

        if options.address is not None or (gpu := gpu_named(torch.cuda.get_device_name())) is None:
            return None  # not this machine's GPUs, or one of which nothing is known
    processes = options.gpus_per_trial if num_gpus else options.processes_per_trial or 1
    return estimate_seconds(missing, entries, options, gpu, processes)


def _clips(sweep: Sweep, root: str | Path | None, splits: Sequence[str]) -> dict[str, ClipList]:
    from stadapter.data.lists.formats import load_clips

    return {split: load_clips(sweep.recipe.data, root, split) for split in splits}  # type: ignore[arg-type]  # Split


def _resources(options: argparse.Namespace, num_gpus: int) -> Resources:
    return Resources(
        num_gpus,
        options.gpus_per_trial if num_gpus else options.processes_per_trial or 1,
        _cores_per_process(options, num_gpus),
        options.trials_per_gpu if num_gpus else 1,
        options.address,
        options.dashboard_port,
        options.decode_on_cluster,
    )


def _cores_per_process(options: argparse.Namespace, num_gpus: int) -> int:
    if options.cpus_per_process:
        return int(options.cpus_per_process)
    if not num_gpus:
        return 1
    if options.address is None:
        cores = (os.cpu_count() or 1) // num_gpus
    else:
        from stadapter.cluster.ray_runtime import cores_per_gpu

        cores = cores_per_gpu()  # the trials run on its nodes, not here
    return max(1, cores // options.trials_per_gpu)


def _train_options(options: argparse.Namespace, num_gpus: int) -> TrainOptions:
    from stadapter.training.options import TrainOptions

    workers = options.num_workers
    if workers is None:
        workers = _cores_per_process(options, num_gpus) - 1 if num_gpus else 0
    return TrainOptions(
        data_root=options.data_root,
        weights_file=options.weights and options.weights.resolve(),
        num_workers=workers,
        clips_per_pass=options.clips_per_pass or (GPU_CLIPS_PER_PASS if num_gpus else None),
        remote_loader=_remote_loader(options),
        checkpoint_every_s=options.checkpoint_every,
        **speed_flags(options),
        **reading_flags(options),
    )


def _remote_loader(options: argparse.Namespace) -> RemoteLoader | None:
    if not options.decode_on_cluster:
        return None
    from stadapter.cluster.decoding import decode_on_cluster

    return decode_on_cluster


def _check_writable(given: Path, output: Path) -> None:
    """ConfigError where the folder cannot be made or written; nothing is made yet."""
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "it is read-only" if there.is_dir() else "it is no folder"
        raise ConfigError(f"--output {given}: cannot be written ({there}: {reason}); choose another folder")


def _describe_sweep(sweep: Sweep, output: Path) -> None:
    """Write sweep.json. The folder's tables become those of this command; ones with other trials are kept aside."""
    folder = sweep.folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / SWEEP).exists() and (kept := status.keep_tables(load_sweep(folder), sweep, output)):
        print(f"note: {folder} now holds the tables of these arms and seeds; those it held before are in {kept}")
    save_sweep(sweep, output)


def _notes(sweep: Sweep, dead: dict[str, int], clips: dict[str, ClipList], options: argparse.Namespace) -> None:
    for arm, count in dead.items():
        if count:
            print(
                f"note: {arm}: behind the last attention only CLS is read, so the last block's adapter there can never"
            )
            print(f"      receive a gradient; its {count:,} parameters are neither trained nor counted as trainable")
    if options.cache_gb:
        from stadapter.data.cache.disk_need import describe, disk_need

        recipe = _recipe(options)
        need = disk_need(clips, recipe.data, recipe.optim.epochs, options.seeds)
        print(describe(need, options.cache_gb, options.seeds))
    if options.cache_prefix:
        from stadapter.training import token_cache

        arms = {trial.arm: trial.recipe for trial in sweep.trials}
        kept = {clips[split].fingerprint(): len(clips[split]) for split in token_cache.kept_splits(sweep.recipe.data)}
        print("\n".join(token_cache.describe(list(arms.values()), options.cache_prefix, sum(kept.values()))))
