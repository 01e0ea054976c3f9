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
import io
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save as safetensors_bytes
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from stadapter import machine, record
from stadapter.config import ConfigError, DataConfig, Recipe, flatten, identity
from stadapter.cost import cost_of
from stadapter.data.annotations import ClipList, load_clips
from stadapter.data.bad_clips import BadClips
from stadapter.data.cache import open_cache
from stadapter.data.clips import ClipDataset, Elsewhere, steps_per_epoch, test_loader, train_loader
from stadapter.data.decoding import Backend
from stadapter.data.flags import DEFAULT_MAX_BAD_SHARE, DEFAULT_TIME_LIMIT_S
from stadapter.data.reading import Reading
from stadapter.data.storage import DEFAULT_SPILL_GB, default_spill
from stadapter.evaluate import evaluate
from stadapter.model import (
    VideoClassifier,
    build_model,
    cast_frozen,
    load_trainable_state,
    trainable_parameters,
    trainable_state,
)
from stadapter.optim import diverged, dropout_mask, learning_rate, make_optimizer, summed_loss

TEST_BATCH_FACTOR = 4  # without a graph, a pass of this many times the clips fits the same memory
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TrainingError(RuntimeError):
    """The training cannot go on, and its numbers must not be used. One line: what, when, and what to try."""


@dataclass(frozen=True)
class World:
    """The processes that share one training. `rank` 0 writes."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Operation:
    """Where and how a training runs: nothing here may change its numbers."""

    data_root: str | Path | None = None  # a folder or an address
    weights_file: Path | None = None
    num_workers: int = 0  # loader processes per training process; 0 decodes in the loop
    clips_per_pass: int | None = None  # upper bound per process, for memory; None: its share of the global batch
    max_bad_share: float = DEFAULT_MAX_BAD_SHARE  # of a list's clips; above it, unreadable clips stop the training
    clip_time_limit_s: float = DEFAULT_TIME_LIMIT_S  # after which reading a clip is given up
    spill_gb: float = DEFAULT_SPILL_GB  # local copies of clips that lie at addresses
    decoder: Backend = "auto"
    cache_gb: float = 0  # decoded frames on this node's disk; 0 keeps none
    elsewhere: Elsewhere | None = None  # makes batches on other machines, in place of loader processes

    def __post_init__(self) -> None:
        if self.clips_per_pass is not None and self.clips_per_pass < 1:
            raise ConfigError(f"--clips-per-pass {self.clips_per_pass}: must be at least 1")
        if self.num_workers < 0:
            raise ConfigError(f"--num-workers {self.num_workers}: must be at least 0")


def join_world() -> World:
    """The world torchrun describes in the environment, its process group started; a world of one without torchrun."""
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    rank, size, local = (int(os.environ.get(name, default)) for name, default in torchrun.items())
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)


Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class _Learner:
    """What one process trains with."""

    recipe: Recipe
    world: World
    model: VideoClassifier
    replica: torch.nn.Module  # the model, or its DistributedDataParallel wrapper
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler  # does nothing unless the precision is float16


def train(
    recipe: Recipe,
    folder: Path,
    operation: Operation | None = None,
    world: World | None = None,
    on_epoch: Report | None = None,
    on_step: Report | None = None,
) -> dict[str, Any]:
    """Train and test one recipe in `folder`, from its last checkpoint if there is one; returns the record.

    Called by every process of the `world`, whose process group stands already. `on_epoch` is called in every process
    with the epoch's metrics, `on_step` in rank 0. A finished folder returns its record without training.
    Raises ConfigError for what cannot work, a folder of another recipe or of other clips included, and TrainingError
    for a loss that is not finite.
    """
    operation, world = operation or Operation(), world or World()
    started, cpu_started = time.time(), time.process_time()
    optim, data = recipe.optim, recipe.data
    clips = {split: load_clips(data, operation.data_root, split) for split in ("train", "val", "test")}
    seen = {split: clips[split].fingerprint() for split in ("train", "test")}
    finished = record.read_result(folder)
    if finished is not None:
        record.check_config(folder, recipe)
        record.check_data(folder, record.fingerprints(finished), seen)
        return finished
    machine.reset_peak_memory(world.device)
    machine.set_fast_float32(world.device)
    epoch_steps = steps_per_epoch(len(clips["train"]), optim.global_batch, data.repeated_augmentation)
    if world.rank == 0:
        record.prepare_folder(folder, recipe)
    learner = _make_learner(recipe, operation, world)
    bad = {split: BadClips(split, len(clips[split]), operation.max_bad_share) for split in ("train", "test")}
    first_epoch, seconds_before = _resume(folder, learner, bad["train"], seen)
    steps = _load_steps(
        clips["train"], bad["train"], learner, operation, range(first_epoch * epoch_steps, optim.epochs * epoch_steps)
    )

    for epoch in range(first_epoch, optim.epochs):
        epoch_metrics = _train_epoch(learner, itertools.islice(steps, epoch_steps), epoch, epoch_steps, on_step)
        if world.size > 1:
            bad["train"].gather()
        of_val = BadClips("val", len(clips["val"]), operation.max_bad_share)
        validation = _test(learner, clips["val"], of_val, operation, all_views=False)
        metrics = {
            **epoch_metrics,
            **{f"val_{name}": value for name, value in validation.items()},
            "seconds": seconds_before + time.time() - started,
            "time": time.time(),
        }
        if world.rank == 0:
            _append_metrics(folder, metrics)
            _save_checkpoint(folder, learner, bad["train"], seen, epoch + 1, metrics["seconds"])
        if on_epoch is not None:
            on_epoch(metrics)

    tested = _test(learner, clips["test"], bad["test"], operation, all_views=True)
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
        "seconds": seconds_before + time.time() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "peak_memory_mib": machine.peak_memory_mib(world.device),
        "device": machine.device_name(world.device),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "precision": optim.precision,
        "bad_clips": {split: found.summary() for split, found in bad.items()},
        "data": {split: {"fingerprint": fingerprint, "clips": len(clips[split])} for split, fingerprint in seen.items()}
        | {"decoder": "pyav" if operation.decoder == "auto" else operation.decoder},
        "started": started,
        "finished": time.time(),
        **machine.provenance(),
    }
    if world.rank == 0:
        header = {"recipe": json.dumps(flatten(recipe)), "trial_id": identity(recipe)}
        state = {name: tensor.contiguous() for name, tensor in trainable_state(learner.model).items()}
        record.write_atomically(folder / record.TRAINED, safetensors_bytes(state, header))
        record.write_json(folder / record.RESULT, result)
    return result


def _make_learner(recipe: Recipe, operation: Operation, world: World) -> _Learner:
    optim = recipe.optim
    model = build_model(recipe, weights_file=operation.weights_file).to(world.device)
    if optim.precision != "float32" and world.device.type == "cuda":
        cast_frozen(model, PRECISIONS[optim.precision])
    replica: torch.nn.Module = model
    if world.size > 1:
        devices = [world.device.index] if world.device.type == "cuda" else None
        # Only what is trained has a gradient, so only that is reduced. Every process builds the same weights from the
        # same seed or file; DistributedDataParallel still sends rank 0's once, which rules out a mix.
        replica = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=optim.precision == "float16")
    return _Learner(recipe, world, model, replica, make_optimizer(model, optim), scaler)


def _dataset(clips: ClipList, data: DataConfig, seed: int, operation: Operation, *, train: bool) -> ClipDataset:
    # The whole embedded world fits in memory, and the next trial in this process finds it there.
    in_memory = data.dataset.startswith("embedded_") and operation.num_workers == 0
    reading = Reading(
        decoder=operation.decoder,
        time_limit_s=operation.clip_time_limit_s,
        in_memory=in_memory,
        spill=default_spill(operation.spill_gb),
        cache=open_cache(clips.root, operation.cache_gb, operation.decoder, data.decoded_short_side),
    )
    return ClipDataset(clips, data, seed, train=train, reading=reading)


def _load_steps(
    clips: ClipList, bad: BadClips, learner: _Learner, operation: Operation, steps: range
) -> Iterator[list[dict[str, Any]]]:
    """This process's share of each global batch, as the list of passes that fit its memory."""
    recipe, world = learner.recipe, learner.world
    share = recipe.optim.global_batch // world.size
    clips_per_pass = min(operation.clips_per_pass or share, share)
    batches = bad.watch(
        train_loader(
            _dataset(clips, recipe.data, recipe.seed, operation, train=True),
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


def _train_epoch(
    learner: _Learner, steps: Iterable[list[dict[str, Any]]], epoch: int, epoch_steps: int, on_step: Report | None
) -> dict[str, Any]:
    """One pass over the training clips; the epoch's metrics, equal in every process."""
    optim, world = learner.recipe.optim, learner.world
    total_steps, warmup_steps = optim.epochs * epoch_steps, round(optim.warmup_epochs * epoch_steps)
    learner.model.train()
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    started = time.time()
    rate = 0.0
    for done, passes in enumerate(steps, start=1):
        step = epoch * epoch_steps + done - 1
        rate = learning_rate(step, total_steps, warmup_steps, optim.peak_lr)
        for group in learner.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        loss = _backward(learner, passes, step).double()
        if world.size > 1:
            dist.all_reduce(loss)  # at once: all processes stop at the same step, and none waits for one that has
        loss_sum += loss
        if not math.isfinite(mean_loss := loss.item() / optim.global_batch):
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
        if on_step is not None and world.rank == 0:
            pace_s = (time.time() - started) / done
            left_s = pace_s * (total_steps - step - 1)
            clips_per_s = optim.global_batch / pace_s
            on_step({"epoch": epoch + 1, "loss": mean_loss, "clips_per_s": clips_per_s, "left_s": left_s})
    seconds = time.time() - started
    clips = epoch_steps * optim.global_batch
    return {
        "epoch": epoch + 1,
        "step": (epoch + 1) * epoch_steps,
        "train_loss": loss_sum.item() / clips,
        "lr": rate,
        "clips_per_s": clips / seconds,
    }


def _backward(learner: _Learner, passes: list[dict[str, Any]], step: int) -> Tensor:
    """Gradients of the mean loss of the global batch; returns the sum of this process's losses, float32 []."""
    recipe, world = learner.recipe, learner.world
    optim, dtype = recipe.optim, PRECISIONS[recipe.optim.precision]
    masks_GD = None
    if optim.head_dropout > 0:
        masks_GD = dropout_mask(recipe.seed, step, optim.global_batch, learner.model.width, optim.head_dropout)
    loss_sum = torch.zeros((), device=world.device)
    for number, batch in enumerate(passes, start=1):
        pixels_BTCHW = batch["pixels"].to(world.device, non_blocking=True)
        label_B = batch["label"].to(world.device, non_blocking=True)
        mask_BD = None if masks_GD is None else masks_GD[batch["position"]].to(world.device, non_blocking=True)
        replica = learner.replica
        accumulate_only = number < len(passes) and isinstance(replica, DistributedDataParallel)
        # Gradients are exchanged once per step, with the last pass.
        with replica.no_sync() if accumulate_only else nullcontext():  # type: ignore[operator]  # checked just above
            with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                logits_BK = replica(pixels_BTCHW, mask_BD)
            loss = summed_loss(logits_BK.float(), label_B, recipe.data.label_groups, optim.label_smoothing)
            # DistributedDataParallel averages over processes: the factor makes it the mean over the global batch.
            learner.scaler.scale(loss * (world.size / optim.global_batch)).backward()
        loss_sum += loss.detach()
    return loss_sum


def _test(
    learner: _Learner, clips: ClipList, bad: BadClips, operation: Operation, *, all_views: bool
) -> dict[str, float]:
    recipe, world = learner.recipe, learner.world
    data = recipe.data
    if not all_views:
        data = dataclasses.replace(data, test_temporal_views=1, test_spatial_views=1)
    views = data.test_temporal_views * data.test_spatial_views
    share = max(1, recipe.optim.global_batch // world.size)
    clips_at_once = max(1, min(operation.clips_per_pass or share, share) * TEST_BATCH_FACTOR // views)
    batches = test_loader(
        _dataset(clips, data, recipe.seed, operation, train=False),
        clips_at_once,
        rank=world.rank,
        world=world.size,
        num_workers=operation.num_workers,
        elsewhere=operation.elsewhere,
    )
    result = evaluate(
        learner.model,
        bad.watch(batches),
        world.device,
        PRECISIONS[recipe.optim.precision],
        opposite_pairs=any(clips.reversed),
        label_groups=data.label_groups,
        distributed=world.size > 1,
    )
    if world.size > 1:
        bad.gather()
    return result


def _append_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Append an epoch, after dropping what a crash left of this epoch or a later one."""
    kept = [line for line in record.read_metrics(folder) if line["epoch"] < metrics["epoch"]]
    text = "".join(json.dumps(line) + "\n" for line in [*kept, metrics])
    record.write_atomically(folder / record.METRICS, text.encode())


def _save_checkpoint(
    folder: Path, learner: _Learner, bad: BadClips, seen: dict[str, str], epochs_done: int, seconds: float
) -> None:
    buffer = io.BytesIO()
    checkpoint = {
        "epochs_done": epochs_done,
        "seconds": seconds,
        "trained": trainable_state(learner.model),
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "bad_clips": bad.reasons,
        "data": seen,
    }
    torch.save(checkpoint, buffer)
    record.write_atomically(folder / record.CHECKPOINT, buffer.getvalue())


def _resume(folder: Path, learner: _Learner, bad: BadClips, seen: dict[str, str]) -> tuple[int, float]:
    """Load the last checkpoint, if any, and the bad clips met so far; returns the epochs done and their seconds.

    ConfigError if its epochs saw other clips than those whose fingerprints are `seen`.
    """
    path = folder / record.CHECKPOINT
    if not path.exists():
        return 0, 0.0
    checkpoint = torch.load(path, map_location=learner.world.device, weights_only=True)
    record.check_data(folder, checkpoint.get("data", {}), seen)
    load_trainable_state(learner.model, checkpoint["trained"])
    learner.optimizer.load_state_dict(checkpoint["optimizer"])
    learner.scaler.load_state_dict(checkpoint["scaler"])
    bad.reasons.update(checkpoint["bad_clips"])
    return checkpoint["epochs_done"], checkpoint["seconds"]
