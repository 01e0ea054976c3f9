"""The training loop: one, whether it runs in a plain process, under torchrun, or as a Ray Train worker.

    stadapter train --recipe embedded --output runs/try
    torchrun --nproc-per-node 8 -m stadapter train --recipe ssv2_clip_b16 --data-root /data/ssv2 --output runs/ssv2

Every random choice is a function of (seed, step or epoch, clip), never of the process that makes it, and the global
batch is part of the recipe. So the number of processes, of loader workers and of clips per pass changes speed and
memory, and the numbers only by the order of floating-point sums.

Shapes: B clips in a pass, G clips in a global batch, T frames, D width, K classes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from stadapter import config
from stadapter.config import Recipe, flatten, identity
from stadapter.data.bad_clips import BadClips
from stadapter.data.clips import steps_per_epoch
from stadapter.data.lists.formats import ClipList, load_clips
from stadapter.model import model_file
from stadapter.model.cost import cost_of
from stadapter.model.state import trainable_parameters
from stadapter.training import hardware
from stadapter.training.batches import train_steps
from stadapter.training.evaluate import evaluate_clips
from stadapter.training.hardware import PRECISIONS, autocast
from stadapter.training.optim import diverged, dropout_mask, learning_rate, summed_loss
from stadapter.training.options import TrainOptions
from stadapter.training.process_group import ProcessGroup
from stadapter.training.state import Action, Clock, TrainComponents, TrainState, make_components
from stadapter.trials import provenance, record
from stadapter.trials.record import ClipsUsed, Record, Unreadable

TEST_BATCH_FACTOR = 4  # without a graph, a pass of this many times the clips fits the same memory

Passes = list[dict[str, Any]]  # the batches that make up one process's share of a step
Report = Callable[[dict[str, Any]], None]


class TrainingError(RuntimeError):
    """The training cannot go on, and its numbers must not be used. One line: the reason, when, and the remedy."""


def train(
    recipe: Recipe,
    folder: Path,
    train_options: TrainOptions | None = None,
    group: ProcessGroup | None = None,
    on_epoch: Report | None = None,
    on_step: Report | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Record:
    """Train and test one recipe in `folder`, going on from its last checkpoint; returns the record.

    Every process of the `group` calls this, after joining it. `on_epoch` is called in every process with the epoch's
    metrics, `on_step` in rank 0. `should_stop` is called in rank 0 after every step and between the batches of a test;
    if it returns True, all processes raise Stopped after that step (in a test, only a single process does). A folder
    that is finished returns its record without training.

    Raises ConfigError if the recipe and options cannot work or the folder holds another training, TrainingError if a
    loss is not finite, BadClipsError if too many clips cannot be read, and WriteError if the folder cannot be written.
    """
    # Import torch._dynamo now: the first optimiser would (1 s), and that must not count as training time.
    from torch import _dynamo  # noqa: F401

    train_options, group, clock = train_options or TrainOptions(), group or ProcessGroup(), Clock()
    clips = {split: load_clips(recipe.data, train_options.data_root, split) for split in ("train", "val", "test")}
    fingerprints = {split: clips[split].fingerprint() for split in ("train", "test")}
    if (finished := _finished(folder, recipe, fingerprints)) is not None:
        return finished

    hardware.reset_peak_memory(group.device)
    chosen = hardware.set_up(group.device, recipe.optim.precision)
    epoch_steps = steps_per_epoch(len(clips["train"]), recipe.optim.global_batch, recipe.data.repeated_augmentation)
    if group.rank == 0:
        record.prepare_folder(folder, recipe)
    components = make_components(recipe, train_options, group)
    bad = BadClips("train", len(clips["train"]), train_options.max_bad_share)
    checkpoint_every_s = train_options.checkpoint_every_s
    state = TrainState(folder, components, bad, fingerprints, epoch_steps, checkpoint_every_s, should_stop, clock)
    state.resume()

    to_do = range(state.steps_done, state.total_steps)
    rows = components.token_cache.open_rows(clips["train"]) if components.token_cache and to_do else None
    steps = train_steps(clips["train"], bad, recipe, train_options, group, to_do, rows)
    while state.epochs_done < recipe.optim.epochs:
        metrics = train_epoch(state, steps, on_step)
        if group.world_size > 1:
            bad.gather()
        metrics |= _validate(state, clips["val"], train_options)
        metrics |= {"seconds": clock.seconds(), "time": time.time()}
        state.end_epoch(metrics)
        if on_epoch is not None:
            on_epoch(metrics)

    tested, bad_tested = _test(state, recipe, clips["test"], train_options)
    result = _make_record(state, train_options, clips, tested, bad_tested, chosen)
    if group.rank == 0:
        _write(state, result, clips["test"].class_names)
    return result


def _finished(folder: Path, recipe: Recipe, fingerprints: Mapping[str, str]) -> Record | None:
    """Return the record of a finished folder, else None. Raises ConfigError if it is of another training."""
    finished = record.read_result(folder)
    if finished is not None:
        record.check_config(folder, recipe)
        record.check_data(folder, finished.fingerprints, fingerprints)
    return finished


def train_epoch(state: TrainState, steps: Iterator[Passes], on_step: Report | None) -> dict[str, Any]:
    """Take the steps that are left of an epoch; returns its metrics, equal in every process."""
    group, optim = state.components.group, state.components.recipe.optim
    first_step, seconds_before, started = state.steps_done, state.epoch_seconds, time.time()
    state.components.model.train()
    for passes in itertools.islice(steps, (state.epochs_done + 1) * state.epoch_steps - first_step):
        mean_loss, action = _train_step(state, passes)
        state.epoch_seconds = seconds_before + time.time() - started
        if on_step is not None and group.rank == 0:
            on_step(_progress(state, mean_loss, (time.time() - started) / (state.steps_done - first_step)))
        state.act_on(action)
    clips = state.epoch_steps * optim.global_batch
    return {
        "epoch": state.epochs_done + 1,
        "step": state.steps_done,
        "train_loss": state.loss_sum / clips,
        "lr": _rate(state, state.steps_done - 1),
        "clips_per_s": clips / state.epoch_seconds,
    }


def _train_step(state: TrainState, passes: Passes) -> tuple[float, Action]:
    """Take one optimiser step; returns the mean loss of the global batch, and the action that all processes take."""
    components, step = state.components, state.steps_done
    optim = components.recipe.optim
    rate = _rate(state, step)
    for param_group in components.optimizer.param_groups:
        param_group["lr"] = rate * param_group["lr_factor"]
    loss = _backward(components, passes, step)
    loss_sum, action = _sum_over_processes(loss, state.next_action(), components.group)
    state.loss_sum += loss_sum
    mean_loss = loss_sum / optim.global_batch
    if not math.isfinite(mean_loss):
        raise TrainingError(
            f"the loss became {mean_loss} at step {step} (epoch {state.epochs_done + 1}, learning rate {rate:.2g}); "
            "lower optim.base_lr, lengthen optim.warmup_epochs or set optim.clip_norm"
        )
    if optim.clip_norm is not None:
        components.scaler.unscale_(components.optimizer)
        torch.nn.utils.clip_grad_norm_(trainable_parameters(components.model).values(), optim.clip_norm)
    components.scaler.step(components.optimizer)
    components.scaler.update()
    components.optimizer.zero_grad(set_to_none=True)
    state.steps_done += 1
    return mean_loss, action


def _rate(state: TrainState, step: int) -> float:
    optim = state.components.recipe.optim
    warmup_steps = round(optim.warmup_epochs * state.epoch_steps)
    return learning_rate(step, state.total_steps, warmup_steps, optim.peak_lr)


def _backward(components: TrainComponents, passes: Passes, step: int) -> Tensor:
    """Add up the gradients of the global batch's mean loss; returns the sum of this process's losses, float32 []."""
    recipe, group, replica = components.recipe, components.group, components.replica
    optim, dtype = recipe.optim, PRECISIONS[recipe.optim.precision]
    masks_GD = None
    if optim.head_dropout > 0:
        masks_GD = dropout_mask(recipe.seed, step, optim.global_batch, components.model.width, optim.head_dropout)
    loss_sum = torch.zeros((), device=group.device)
    for number, batch in enumerate(passes, start=1):
        label_B = batch["label"].to(group.device, non_blocking=True)
        mask_BD = None if masks_GD is None else masks_GD[batch["position"]].to(group.device, non_blocking=True)
        accumulate_only = number < len(passes) and isinstance(replica, DistributedDataParallel)
        # Gradients are exchanged once per step, with the last pass.
        with replica.no_sync() if accumulate_only else nullcontext():  # type: ignore[operator]  # checked just above
            with autocast(group.device, dtype):
                logits_BK = _logits(components, batch, mask_BD)
            loss = summed_loss(logits_BK.float(), label_B, recipe.data.label_groups, optim.label_smoothing)
            # DistributedDataParallel averages over processes: the factor makes it the mean over the global batch.
            components.scaler.scale(loss * (group.world_size / optim.global_batch)).backward()
        loss_sum += loss.detach()
    return loss_sum


def _logits(components: TrainComponents, batch: dict[str, Any], mask_BD: Tensor | None) -> Tensor:
    cache = components.token_cache
    if cache is None:
        pixels = batch["pixels"].to(components.group.device, non_blocking=True)
        logits_BK: Tensor = components.replica(pixels, mask_BD)
    else:
        logits_BK = components.replica(cache.tokens(batch, "train"), mask_BD, cache.blocks)
    return logits_BK


def _sum_over_processes(loss: Tensor, action: Action, group: ProcessGroup) -> tuple[float, Action]:
    """Return the loss summed over all processes, and rank 0's action.

    Both travel in one exchange, so all processes stop at the same step and none waits for one that has stopped.
    """
    both = torch.stack([loss.double(), torch.tensor(float(action), dtype=torch.float64, device=group.device)])
    if group.world_size > 1:
        dist.all_reduce(both)
    loss_sum, agreed = both.tolist()
    return loss_sum, Action(int(agreed))


def _progress(state: TrainState, mean_loss: float, step_s: float) -> dict[str, Any]:
    return {
        "epoch": state.epochs_done + 1,
        "loss": mean_loss,
        "clips_per_s": state.components.recipe.optim.global_batch / step_s,
        "left_s": step_s * (state.total_steps - state.steps_done),
    }


def _validate(state: TrainState, clips: ClipList, train_options: TrainOptions) -> dict[str, float]:
    """Return the metrics of the validation clips, one view of each; their names begin with `val_`."""
    recipe = config.replace(state.components.recipe, **{"data.test_temporal_views": 1, "data.test_spatial_views": 1})
    metrics, _ = _test(state, recipe, clips, train_options)
    return {f"val_{name}": value for name, value in metrics.items()}


def _test(
    state: TrainState, recipe: Recipe, clips: ClipList, train_options: TrainOptions
) -> tuple[dict[str, float], Unreadable]:
    components, group = state.components, state.components.group
    share = max(1, recipe.optim.global_batch // group.world_size)
    views = recipe.data.test_temporal_views * recipe.data.test_spatial_views
    clips_per_pass = max(1, min(train_options.clips_per_pass or share, share) * TEST_BATCH_FACTOR // views)
    return evaluate_clips(
        components.model,
        recipe,
        clips,
        train_options,
        group,
        clips_per_pass,
        token_cache=components.token_cache,
        watch=state.stoppable,
    )


def _make_record(
    state: TrainState,
    train_options: TrainOptions,
    clips: Mapping[str, ClipList],
    tested: dict[str, float],
    bad_tested: Unreadable,
    chosen: str,
) -> Record:
    """Return the record of a training that has been tested."""
    components = state.components
    recipe, group, data = components.recipe, components.group, components.recipe.data
    train_losses = [line["train_loss"] for line in record.read_metrics(state.folder)]
    has_diverged = diverged(train_losses, *(data.label_groups or [data.num_classes]))
    return Record(
        trial_id=identity(recipe),
        recipe=flatten(recipe),
        metrics=tested,
        epoch=recipe.optim.epochs,
        diverged=has_diverged or not math.isfinite(tested["loss"]),  # the last step may break the weights
        **dataclasses.asdict(cost_of(recipe)),
        views=data.test_temporal_views * data.test_spatial_views,
        seconds=state.clock.seconds(),
        cpu_seconds=state.clock.cpu_seconds(),
        launches=state.launches,
        peak_memory_mib=hardware.peak_memory_mib(group.device),
        device=hardware.device_name(group.device),
        processes=group.world_size,
        threads=torch.get_num_threads(),
        precision=recipe.optim.precision,
        chosen=chosen,
        compiled=train_options.compile,
        recomputed=train_options.recompute,
        prefix_cache=components.token_cache.summary() if components.token_cache else None,
        bad_clips={"train": state.bad_clips.summary(), "test": bad_tested},
        data={split: ClipsUsed(fingerprint, len(clips[split])) for split, fingerprint in state.fingerprints.items()},
        decoder="pyav" if train_options.decoder == "auto" else train_options.decoder,
        started=state.clock.began,
        finished=time.time(),
        **provenance.provenance(),
    )


def _write(state: TrainState, result: Record, class_names: tuple[str, ...]) -> None:
    """Write the model file, then the record, which makes the folder count as finished."""
    model_file.save(
        state.folder / record.TRAINED,
        state.components.model,
        state.components.recipe,
        frozen_sha256=state.components.frozen_sha256,
        data=result.to_json()["data"],
        metrics=result.metrics,
        class_names=class_names,
    )
    record.write_result(state.folder, result)
