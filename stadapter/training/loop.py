"""The training loop: one, whether it runs in a plain process, under torchrun, or as a Ray Train worker.

    python -m stadapter train --recipe embedded --output runs/try
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
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from stadapter.config import Recipe, flatten, identity
from stadapter.data.bad_clips import BadClips
from stadapter.data.clips import steps_per_epoch, test_loader, train_loader
from stadapter.data.lists.formats import ClipList, load_clips
from stadapter.model import model_file
from stadapter.model.build import build_model, cast_frozen
from stadapter.model.cost import cost_of
from stadapter.model.state import trainable_parameters
from stadapter.training import hardware
from stadapter.training.evaluate import evaluate
from stadapter.training.optim import diverged, dropout_mask, learning_rate, make_optimizer, summed_loss
from stadapter.training.options import TrainOptions
from stadapter.training.runtime import PRECISIONS, ProcessGroup, make_dataset
from stadapter.training.state import Clock, Run, TrainComponents
from stadapter.training.token_cache import kept_splits, open_token_cache
from stadapter.trials import provenance, record
from stadapter.trials.record import ClipsUsed, Record

TEST_BATCH_FACTOR = 4  # without a graph, a pass of this many times the clips fits the same memory


class TrainingError(RuntimeError):
    """The training cannot go on, and its numbers must not be used. One line: what, when, and what to try."""


Report = Callable[[dict[str, Any]], None]


def train(
    recipe: Recipe,
    folder: Path,
    train_options: TrainOptions | None = None,
    group: ProcessGroup | None = None,
    on_epoch: Report | None = None,
    on_step: Report | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Record:
    """Train and test one recipe in `folder`, from its last checkpoint if there is one; returns the record.

    Called by every process of the `group`, which stands already. `on_epoch` is called in every process
    with the epoch's metrics, `on_step` in rank 0. `should_stop` is asked in rank 0 after every step (and, with a single
    process, between the batches of a test); when it says so, all processes raise Stopped. A finished folder returns its
    record without training.
    Raises ConfigError for what cannot work, a folder of another recipe or of other clips included, TrainingError for a
    loss that is not finite, and record.WriteError where the folder cannot be written any more.
    """
    # A process's first optimiser imports it, which takes a second: before the clock runs, it is no training's time.
    from torch import _dynamo  # noqa: F401

    train_options, group, clock = train_options or TrainOptions(), group or ProcessGroup(), Clock()
    optim, data = recipe.optim, recipe.data
    clips = {split: load_clips(data, train_options.data_root, split) for split in ("train", "val", "test")}
    seen = {split: clips[split].fingerprint() for split in ("train", "test")}
    finished = record.read_result(folder)
    if finished is not None:
        record.check_config(folder, recipe)
        record.check_data(folder, finished.fingerprints, seen)
        return finished
    hardware.reset_peak_memory(group.device)
    chosen = hardware.set_up(group.device, optim.precision)
    epoch_steps = steps_per_epoch(len(clips["train"]), optim.global_batch, data.repeated_augmentation)
    if group.rank == 0:
        record.prepare_folder(folder, recipe)
    components = _make_components(recipe, train_options, group)
    token_cache = open_token_cache(
        components.model, recipe, train_options.token_cache_gb, train_options.decoder, group.device
    )
    components = dataclasses.replace(components, token_cache=token_cache)
    bad = {split: BadClips(split, len(clips[split]), train_options.max_bad_share) for split in ("train", "test")}
    run = Run(folder, components, bad["train"], seen, epoch_steps, train_options.checkpoint_every_s, should_stop, clock)
    run.resume()
    total_steps = optim.epochs * epoch_steps
    steps = _load_steps(clips["train"], bad["train"], components, train_options, range(run.steps_done, total_steps))

    while run.epochs_done < optim.epochs:
        epoch_metrics = _train_epoch(run, steps, on_step)
        if group.world_size > 1:
            bad["train"].gather()
        of_val = BadClips("val", len(clips["val"]), train_options.max_bad_share)
        validation = _test(run, clips["val"], of_val, train_options, all_views=False)
        metrics = {
            **epoch_metrics,
            **{f"val_{name}": value for name, value in validation.items()},
            "seconds": run.clock.seconds(),
            "time": time.time(),
        }
        run.end_epoch(metrics)
        if on_epoch is not None:
            on_epoch(metrics)

    tested = _test(run, clips["test"], bad["test"], train_options, all_views=True)
    cost = cost_of(recipe)
    result = Record(
        trial_id=identity(recipe),
        recipe=flatten(recipe),
        metrics=tested,
        epoch=optim.epochs,
        # The last step may break the weights behind the last training loss.
        diverged=not math.isfinite(tested["loss"])
        or diverged(
            [line["train_loss"] for line in record.read_metrics(folder)], *(data.label_groups or [data.num_classes])
        ),
        **dataclasses.asdict(cost),
        views=data.test_temporal_views * data.test_spatial_views,
        seconds=run.clock.seconds(),
        cpu_seconds=run.clock.cpu_seconds(),
        launches=run.launches,
        peak_memory_mib=hardware.peak_memory_mib(group.device),
        device=hardware.device_name(group.device),
        processes=group.world_size,
        threads=torch.get_num_threads(),
        precision=optim.precision,
        chosen=chosen,
        compiled=train_options.compile,
        recomputed=train_options.recompute,
        prefix_cache=token_cache.summary() if token_cache else None,
        bad_clips={split: found.summary() for split, found in bad.items()},
        data={split: ClipsUsed(fingerprint, len(clips[split])) for split, fingerprint in seen.items()},
        decoder="pyav" if train_options.decoder == "auto" else train_options.decoder,
        started=run.clock.began,
        finished=time.time(),
        **provenance.provenance(),
    )
    if group.rank == 0:
        model_file.save(
            folder / record.TRAINED,
            components.model,
            recipe,
            frozen_sha256=components.frozen_sha256,
            data=result.to_json()["data"],
            metrics=tested,
            class_names=clips["test"].class_names,
        )
        record.write_result(folder, result)
    return result


def _make_components(recipe: Recipe, train_options: TrainOptions, group: ProcessGroup) -> TrainComponents:
    optim = recipe.optim
    model = build_model(recipe, weights_file=train_options.weights_file)
    frozen_sha256 = model_file.frozen_digest(model) if group.rank == 0 else ""
    model = model.to(group.device)
    model.recompute = train_options.recompute
    if train_options.compile:
        model.compile()
    if optim.precision != "float32":
        cast_frozen(model, PRECISIONS[optim.precision])
    replica: torch.nn.Module = model
    if group.world_size > 1:
        devices = [group.device.index] if group.device.type == "cuda" else None
        # Only what is trained has a gradient, so only that is reduced. Every process builds the same weights from the
        # same seed or file; DistributedDataParallel still sends rank 0's once, which rules out a mix.
        replica = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    scaler = torch.amp.GradScaler(group.device.type, enabled=optim.precision == "float16")
    return TrainComponents(recipe, group, model, replica, make_optimizer(model, optim), scaler, frozen_sha256)


def _load_steps(
    clips: ClipList, bad: BadClips, components: TrainComponents, train_options: TrainOptions, steps: range
) -> Iterator[list[dict[str, Any]]]:
    """This process's share of each global batch, as the list of passes that fit its memory."""
    recipe, group = components.recipe, components.group
    share = recipe.optim.global_batch // group.world_size
    clips_per_pass = min(train_options.clips_per_pass or share, share)
    rows = components.token_cache.open_rows(clips) if components.token_cache else None
    batches = bad.watch(
        train_loader(
            make_dataset(clips, recipe.data, recipe.seed, train_options, train=True, rows=rows),
            recipe.optim.global_batch,
            steps=steps,
            rank=group.rank,
            world_size=group.world_size,
            micro_batch=clips_per_pass,
            num_workers=train_options.num_workers,
            pin_memory=group.device.type == "cuda",
            remote_loader=train_options.remote_loader,
        )
    )
    passes = math.ceil(share / clips_per_pass)
    for _ in steps:
        yield [next(batches) for _ in range(passes)]


def _train_epoch(run: Run, steps: Iterator[list[dict[str, Any]]], on_step: Report | None) -> dict[str, Any]:
    """What is left of one pass over the training clips; the epoch's metrics, equal in every process."""
    components, epoch, epoch_steps = run.components, run.epochs_done, run.epoch_steps
    optim, group = components.recipe.optim, components.group
    total_steps, warmup_steps = optim.epochs * epoch_steps, round(optim.warmup_epochs * epoch_steps)
    first_step = run.steps_done
    components.model.train()
    rate = learning_rate(first_step - 1, total_steps, warmup_steps, optim.peak_lr) if first_step else 0.0
    started, seconds_before = time.time(), run.epoch_seconds
    for passes in itertools.islice(steps, (epoch + 1) * epoch_steps - first_step):
        step = run.steps_done
        rate = learning_rate(step, total_steps, warmup_steps, optim.peak_lr)
        for param_group in components.optimizer.param_groups:
            param_group["lr"] = rate * param_group["lr_factor"]
        loss_and_wish = torch.stack([_backward(components, passes, step).double(), run.wish()])
        if group.world_size > 1:
            dist.all_reduce(loss_and_wish)  # at once: all processes stop at the same step, none waits for one that has
        loss, wish = loss_and_wish.tolist()
        run.loss_sum += loss
        if not math.isfinite(mean_loss := loss / optim.global_batch):
            raise TrainingError(
                f"the loss became {mean_loss} at step {step} (epoch {epoch + 1}, learning rate {rate:.2g}); "
                "lower optim.base_lr, lengthen optim.warmup_epochs or set optim.clip_norm"
            )
        if optim.clip_norm is not None:
            components.scaler.unscale_(components.optimizer)
            torch.nn.utils.clip_grad_norm_(trainable_parameters(components.model).values(), optim.clip_norm)
        components.scaler.step(components.optimizer)
        components.scaler.update()
        components.optimizer.zero_grad(set_to_none=True)
        run.steps_done += 1
        run.epoch_seconds = seconds_before + time.time() - started
        if on_step is not None and group.rank == 0:
            pace_s = (time.time() - started) / (run.steps_done - first_step)
            left_s = pace_s * (total_steps - run.steps_done)
            clips_per_s = optim.global_batch / pace_s
            on_step({"epoch": epoch + 1, "loss": mean_loss, "clips_per_s": clips_per_s, "left_s": left_s})
        run.obey(wish)
    clips = epoch_steps * optim.global_batch
    return {
        "epoch": epoch + 1,
        "step": run.steps_done,
        "train_loss": run.loss_sum / clips,
        "lr": rate,
        "clips_per_s": clips / run.epoch_seconds,
    }


def _backward(components: TrainComponents, passes: list[dict[str, Any]], step: int) -> Tensor:
    """Gradients of the mean loss of the global batch; returns the sum of this process's losses, float32 []."""
    recipe, group = components.recipe, components.group
    optim, dtype = recipe.optim, PRECISIONS[recipe.optim.precision]
    masks_GD = None
    if optim.head_dropout > 0:
        masks_GD = dropout_mask(recipe.seed, step, optim.global_batch, components.model.width, optim.head_dropout)
    loss_sum = torch.zeros((), device=group.device)
    for number, batch in enumerate(passes, start=1):
        label_B = batch["label"].to(group.device, non_blocking=True)
        mask_BD = None if masks_GD is None else masks_GD[batch["position"]].to(group.device, non_blocking=True)
        replica = components.replica
        accumulate_only = number < len(passes) and isinstance(replica, DistributedDataParallel)
        # Gradients are exchanged once per step, with the last pass.
        with replica.no_sync() if accumulate_only else nullcontext():  # type: ignore[operator]  # checked just above
            with torch.autocast(group.device.type, dtype, enabled=dtype != torch.float32):
                if components.token_cache is None:
                    logits_BK = replica(batch["pixels"].to(group.device, non_blocking=True), mask_BD)
                else:
                    logits_BK = replica(
                        components.token_cache.tokens(batch, "train"), mask_BD, components.token_cache.blocks
                    )
            loss = summed_loss(logits_BK.float(), label_B, recipe.data.label_groups, optim.label_smoothing)
            # DistributedDataParallel averages over processes: the factor makes it the mean over the global batch.
            components.scaler.scale(loss * (group.world_size / optim.global_batch)).backward()
        loss_sum += loss.detach()
    return loss_sum


def _test(
    run: Run, clips: ClipList, bad: BadClips, train_options: TrainOptions, *, all_views: bool
) -> dict[str, float]:
    components = run.components
    recipe, group = components.recipe, components.group
    data = recipe.data
    if not all_views:
        data = dataclasses.replace(data, test_temporal_views=1, test_spatial_views=1)
    views = data.test_temporal_views * data.test_spatial_views
    share = max(1, recipe.optim.global_batch // group.world_size)
    clips_at_once = max(1, min(train_options.clips_per_pass or share, share) * TEST_BATCH_FACTOR // views)
    rows = logits_of = None
    if (token_cache := components.token_cache) is not None and clips.split in kept_splits(data):
        rows = token_cache.open_rows(clips)

        def logits_of(batch: dict[str, Any]) -> Tensor:
            return components.model(token_cache.tokens(batch, clips.split), start=token_cache.blocks).unsqueeze(1)

    batches = test_loader(
        make_dataset(clips, data, recipe.seed, train_options, train=False, rows=rows),
        clips_at_once,
        rank=group.rank,
        world_size=group.world_size,
        num_workers=train_options.num_workers,
        pin_memory=group.device.type == "cuda",
        remote_loader=train_options.remote_loader,
    )
    result = evaluate(
        components.model,
        run.interruptible(bad.watch(batches)),
        group.device,
        PRECISIONS[recipe.optim.precision],
        opposite_pairs=any(clips.reversed),
        label_groups=data.label_groups,
        distributed=group.world_size > 1,
        logits_of=logits_of,
    )
    if group.world_size > 1:
        bad.gather()
    return result
