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
from stadapter.training.options import Operation
from stadapter.training.runtime import PRECISIONS, World, make_dataset
from stadapter.training.state import Clock, Learner, Run
from stadapter.training.token_cache import kept_splits, open_prefix
from stadapter.trials import files, provenance, record

TEST_BATCH_FACTOR = 4  # without a graph, a pass of this many times the clips fits the same memory


class TrainingError(RuntimeError):
    """The training cannot go on, and its numbers must not be used. One line: what, when, and what to try."""


Report = Callable[[dict[str, Any]], None]


def train(
    recipe: Recipe,
    folder: Path,
    operation: Operation | None = None,
    world: World | None = None,
    on_epoch: Report | None = None,
    on_step: Report | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Train and test one recipe in `folder`, from its last checkpoint if there is one; returns the record.

    Called by every process of the `world`, whose process group stands already. `on_epoch` is called in every process
    with the epoch's metrics, `on_step` in rank 0. `should_stop` is asked in rank 0 after every step (and, in a world of
    one, between the batches of a test); when it says so, all processes raise Stopped. A finished folder returns its
    record without training.
    Raises ConfigError for what cannot work, a folder of another recipe or of other clips included, TrainingError for a
    loss that is not finite, and record.WriteError where the folder cannot be written any more.
    """
    # A process's first optimiser imports it, which takes a second: before the clock runs, it is no training's time.
    from torch import _dynamo  # noqa: F401

    operation, world, clock = operation or Operation(), world or World(), Clock()
    optim, data = recipe.optim, recipe.data
    clips = {split: load_clips(data, operation.data_root, split) for split in ("train", "val", "test")}
    seen = {split: clips[split].fingerprint() for split in ("train", "test")}
    finished = record.read_result(folder)
    if finished is not None:
        record.check_config(folder, recipe)
        record.check_data(folder, record.fingerprints(finished), seen)
        return finished
    hardware.reset_peak_memory(world.device)
    chosen = hardware.set_up(world.device, optim.precision)
    epoch_steps = steps_per_epoch(len(clips["train"]), optim.global_batch, data.repeated_augmentation)
    if world.rank == 0:
        record.prepare_folder(folder, recipe)
    learner = _make_learner(recipe, operation, world)
    prefix = open_prefix(learner.model, recipe, operation.cache_prefix_gb, operation.decoder, world.device)
    learner = dataclasses.replace(learner, prefix=prefix)
    bad = {split: BadClips(split, len(clips[split]), operation.max_bad_share) for split in ("train", "test")}
    run = Run(folder, learner, bad["train"], seen, epoch_steps, operation.checkpoint_every_s, should_stop, clock)
    run.resume()
    total_steps = optim.epochs * epoch_steps
    steps = _load_steps(clips["train"], bad["train"], learner, operation, range(run.steps_done, total_steps))

    while run.epochs_done < optim.epochs:
        epoch_metrics = _train_epoch(run, steps, on_step)
        if world.size > 1:
            bad["train"].gather()
        of_val = BadClips("val", len(clips["val"]), operation.max_bad_share)
        validation = _test(run, clips["val"], of_val, operation, all_views=False)
        metrics = {
            **epoch_metrics,
            **{f"val_{name}": value for name, value in validation.items()},
            "seconds": run.clock.seconds(),
            "time": time.time(),
        }
        run.end_epoch(metrics)
        if on_epoch is not None:
            on_epoch(metrics)

    tested = _test(run, clips["test"], bad["test"], operation, all_views=True)
    cost = cost_of(recipe)
    result = {
        "trial_id": identity(recipe),
        "recipe": flatten(recipe),
        "metrics": tested,
        "epoch": optim.epochs,
        # The last step may break the weights behind the last training loss.
        "diverged": not math.isfinite(tested["loss"])
        or diverged(
            [line["train_loss"] for line in record.read_metrics(folder)], *(data.label_groups or [data.num_classes])
        ),
        **dataclasses.asdict(cost),
        "views": data.test_temporal_views * data.test_spatial_views,
        "seconds": run.clock.seconds(),
        "cpu_seconds": run.clock.cpu_seconds(),
        "launches": run.launches,
        "peak_memory_mib": hardware.peak_memory_mib(world.device),
        "device": hardware.device_name(world.device),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "precision": optim.precision,
        "chosen": chosen,
        "compiled": operation.compile,
        "recomputed": operation.recompute,
        "prefix_cache": prefix and prefix.summary(),
        "bad_clips": {split: found.summary() for split, found in bad.items()},
        "data": {split: {"fingerprint": fingerprint, "clips": len(clips[split])} for split, fingerprint in seen.items()}
        | {"decoder": "pyav" if operation.decoder == "auto" else operation.decoder},
        "started": run.clock.began,
        "finished": time.time(),
        **provenance.provenance(),
    }
    if world.rank == 0:
        model_file.save(
            folder / record.TRAINED,
            learner.model,
            recipe,
            frozen_sha256=learner.frozen_sha256,
            data=result["data"],
            metrics=tested,
            class_names=clips["test"].class_names,
        )
        files.write_json(folder / record.RESULT, result)
    return result


def _make_learner(recipe: Recipe, operation: Operation, world: World) -> Learner:
    optim = recipe.optim
    model = build_model(recipe, weights_file=operation.weights_file)
    frozen_sha256 = model_file.frozen_digest(model) if world.rank == 0 else ""
    model = model.to(world.device)
    model.recompute = operation.recompute
    if operation.compile:
        model.compile()
    if optim.precision != "float32":
        cast_frozen(model, PRECISIONS[optim.precision])
    replica: torch.nn.Module = model
    if world.size > 1:
        devices = [world.device.index] if world.device.type == "cuda" else None
        # Only what is trained has a gradient, so only that is reduced. Every process builds the same weights from the
        # same seed or file; DistributedDataParallel still sends rank 0's once, which rules out a mix.
        replica = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=optim.precision == "float16")
    return Learner(recipe, world, model, replica, make_optimizer(model, optim), scaler, frozen_sha256)


def _load_steps(
    clips: ClipList, bad: BadClips, learner: Learner, operation: Operation, steps: range
) -> Iterator[list[dict[str, Any]]]:
    """This process's share of each global batch, as the list of passes that fit its memory."""
    recipe, world = learner.recipe, learner.world
    share = recipe.optim.global_batch // world.size
    clips_per_pass = min(operation.clips_per_pass or share, share)
    rows = learner.prefix.open_rows(clips) if learner.prefix else None
    batches = bad.watch(
        train_loader(
            make_dataset(clips, recipe.data, recipe.seed, operation, train=True, rows=rows),
            recipe.optim.global_batch,
            steps=steps,
            rank=world.rank,
            world=world.size,
            micro_batch=clips_per_pass,
            num_workers=operation.num_workers,
            pin_memory=world.device.type == "cuda",
            elsewhere=operation.elsewhere,
        )
    )
    passes = math.ceil(share / clips_per_pass)
    for _ in steps:
        yield [next(batches) for _ in range(passes)]


def _train_epoch(run: Run, steps: Iterator[list[dict[str, Any]]], on_step: Report | None) -> dict[str, Any]:
    """What is left of one pass over the training clips; the epoch's metrics, equal in every process."""
    learner, epoch, epoch_steps = run.learner, run.epochs_done, run.epoch_steps
    optim, world = learner.recipe.optim, learner.world
    total_steps, warmup_steps = optim.epochs * epoch_steps, round(optim.warmup_epochs * epoch_steps)
    first_step = run.steps_done
    learner.model.train()
    rate = learning_rate(first_step - 1, total_steps, warmup_steps, optim.peak_lr) if first_step else 0.0
    started, seconds_before = time.time(), run.epoch_seconds
    for passes in itertools.islice(steps, (epoch + 1) * epoch_steps - first_step):
        step = run.steps_done
        rate = learning_rate(step, total_steps, warmup_steps, optim.peak_lr)
        for group in learner.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        loss_and_wish = torch.stack([_backward(learner, passes, step).double(), run.wish()])
        if world.size > 1:
            dist.all_reduce(loss_and_wish)  # at once: all processes stop at the same step, none waits for one that has
        loss, wish = loss_and_wish.tolist()
        run.loss_sum += loss
        if not math.isfinite(mean_loss := loss / optim.global_batch):
            raise TrainingError(
                f"the loss became {mean_loss} at step {step} (epoch {epoch + 1}, learning rate {rate:.2g}); "
                "lower optim.base_lr, lengthen optim.warmup_epochs or set optim.clip_norm"
            )
        if optim.clip_norm is not None:
            learner.scaler.unscale_(learner.optimizer)
            torch.nn.utils.clip_grad_norm_(trainable_parameters(learner.model).values(), optim.clip_norm)
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        learner.optimizer.zero_grad(set_to_none=True)
        run.steps_done += 1
        run.epoch_seconds = seconds_before + time.time() - started
        if on_step is not None and world.rank == 0:
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


def _backward(learner: Learner, passes: list[dict[str, Any]], step: int) -> Tensor:
    """Gradients of the mean loss of the global batch; returns the sum of this process's losses, float32 []."""
    recipe, world = learner.recipe, learner.world
    optim, dtype = recipe.optim, PRECISIONS[recipe.optim.precision]
    masks_GD = None
    if optim.head_dropout > 0:
        masks_GD = dropout_mask(recipe.seed, step, optim.global_batch, learner.model.width, optim.head_dropout)
    loss_sum = torch.zeros((), device=world.device)
    for number, batch in enumerate(passes, start=1):
        label_B = batch["label"].to(world.device, non_blocking=True)
        mask_BD = None if masks_GD is None else masks_GD[batch["position"]].to(world.device, non_blocking=True)
        replica = learner.replica
        accumulate_only = number < len(passes) and isinstance(replica, DistributedDataParallel)
        # Gradients are exchanged once per step, with the last pass.
        with replica.no_sync() if accumulate_only else nullcontext():  # type: ignore[operator]  # checked just above
            with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                if learner.prefix is None:
                    logits_BK = replica(batch["pixels"].to(world.device, non_blocking=True), mask_BD)
                else:
                    logits_BK = replica(learner.prefix.tokens(batch, "train"), mask_BD, learner.prefix.blocks)
            loss = summed_loss(logits_BK.float(), label_B, recipe.data.label_groups, optim.label_smoothing)
            # DistributedDataParallel averages over processes: the factor makes it the mean over the global batch.
            learner.scaler.scale(loss * (world.size / optim.global_batch)).backward()
        loss_sum += loss.detach()
    return loss_sum


def _test(run: Run, clips: ClipList, bad: BadClips, operation: Operation, *, all_views: bool) -> dict[str, float]:
    learner = run.learner
    recipe, world = learner.recipe, learner.world
    data = recipe.data
    if not all_views:
        data = dataclasses.replace(data, test_temporal_views=1, test_spatial_views=1)
    views = data.test_temporal_views * data.test_spatial_views
    share = max(1, recipe.optim.global_batch // world.size)
    clips_at_once = max(1, min(operation.clips_per_pass or share, share) * TEST_BATCH_FACTOR // views)
    rows = logits_of = None
    if (prefix := learner.prefix) is not None and clips.split in kept_splits(data):
        rows = prefix.open_rows(clips)

        def logits_of(batch: dict[str, Any]) -> Tensor:
            return learner.model(prefix.tokens(batch, clips.split), start=prefix.blocks).unsqueeze(1)

    batches = test_loader(
        make_dataset(clips, data, recipe.seed, operation, train=False, rows=rows),
        clips_at_once,
        rank=world.rank,
        world=world.size,
        num_workers=operation.num_workers,
        pin_memory=world.device.type == "cuda",
        elsewhere=operation.elsewhere,
    )
    result = evaluate(
        learner.model,
        run.interruptible(bad.watch(batches)),
        world.device,
        PRECISIONS[recipe.optim.precision],
        opposite_pairs=any(clips.reversed),
        label_groups=data.label_groups,
        distributed=world.size > 1,
        logits_of=logits_of,
    )
    if world.size > 1:
        bad.gather()
    return result
