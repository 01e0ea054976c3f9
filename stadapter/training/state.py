"""One training under way: what it trains with, how far it has come, and how that is kept."""

from __future__ import annotations

import enum
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from stadapter.config import Recipe
from stadapter.data.bad_clips import BadClips
from stadapter.model import model_file
from stadapter.model.build import build_model, cast_frozen
from stadapter.model.classifier import VideoClassifier
from stadapter.model.state import load_trainable_state, trainable_state
from stadapter.training.hardware import PRECISIONS
from stadapter.training.optim import make_optimizer
from stadapter.training.options import TrainOptions
from stadapter.training.process_group import ProcessGroup
from stadapter.training.token_cache import TokenCache, open_token_cache
from stadapter.trials import checkpoint, files, record


class Stopped(Exception):
    """The training was asked to stop, and has written a checkpoint. One line: after which step, and where."""


@dataclass(frozen=True)
class TrainComponents:
    """The model, its DDP wrapper, the optimiser and the gradient scaler of one process."""

    recipe: Recipe
    group: ProcessGroup
    model: VideoClassifier
    replica: torch.nn.Module  # the model, or its DistributedDataParallel wrapper
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler  # does nothing unless the precision is float16
    frozen_sha256: str  # of the frozen weights, before they were cast; only rank 0 computes it
    token_cache: TokenCache | None


def make_components(recipe: Recipe, train_options: TrainOptions, group: ProcessGroup) -> TrainComponents:
    """Build everything that one process trains with, on its device."""
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
        device_ids = [group.device.index] if group.device.type == "cuda" else None
        # Only what is trained has a gradient, so only that is reduced. Every process builds the same weights from the
        # same seed or file; DistributedDataParallel still sends rank 0's once, which rules out a mix.
        replica = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    optimizer = make_optimizer(model, optim)
    scaler = torch.amp.GradScaler(group.device.type, enabled=optim.precision == "float16")
    token_cache = open_token_cache(model, recipe, train_options.token_cache_gb, train_options.decoder, group.device)
    return TrainComponents(recipe, group, model, replica, optimizer, scaler, frozen_sha256, token_cache)


@dataclass
class Clock:
    """The time spent on a training, over all its launches."""

    began: float = field(default_factory=time.time)
    cpu_began: float = field(default_factory=time.process_time)
    seconds_before: float = 0.0
    cpu_seconds_before: float = 0.0

    def seconds(self) -> float:
        return self.seconds_before + time.time() - self.began

    def cpu_seconds(self) -> float:
        return self.cpu_seconds_before + time.process_time() - self.cpu_began


class Action(enum.IntEnum):
    """The next action of all processes after a step.

    Rank 0 decides; its number is summed with the loss, and the others add 0.
    """

    CONTINUE = 0
    CHECKPOINT = 1
    STOP = 2  # with a checkpoint


@dataclass
class TrainState:
    """How far a training has come, and its way to and from the checkpoint.

    `epochs_done` counts the epochs whose metrics are recorded. `steps_done` may be further, inside the next epoch:
    `loss_sum` and `epoch_seconds` hold what that epoch has summed up so far.
    """

    folder: Path
    components: TrainComponents
    bad_clips: BadClips  # of the training list
    fingerprints: dict[str, str]  # of the lists of clips, by split
    epoch_steps: int
    checkpoint_every_s: float
    should_stop: Callable[[], bool] | None
    clock: Clock
    epochs_done: int = 0
    steps_done: int = 0
    loss_sum: float = 0.0  # over the epoch's clips so far
    epoch_seconds: float = 0.0  # of the epoch's steps so far
    launches: int = 1
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def total_steps(self) -> int:
        return self.components.recipe.optim.epochs * self.epoch_steps

    def next_action(self) -> Action:
        """Return what rank 0 wants done after this step; CONTINUE in the other ranks, which do not decide."""
        if self.components.group.rank > 0:
            return Action.CONTINUE
        if self.should_stop is not None and self.should_stop():
            return Action.STOP
        if time.monotonic() - self.saved_at >= self.checkpoint_every_s:
            return Action.CHECKPOINT
        return Action.CONTINUE

    def act_on(self, action: Action) -> None:
        """Continue, write a checkpoint, or write a checkpoint and raise Stopped. All processes take the same action."""
        if action == Action.CONTINUE:
            return
        if self.components.group.world_size > 1:
            self.bad_clips.gather()
        self.save()
        if action == Action.STOP:
            epochs = self.components.recipe.optim.epochs
            raise Stopped(
                f"stopped after step {self.steps_done} of {self.total_steps} (epoch "
                f"{min(self.epochs_done + 1, epochs)} of {epochs}); a checkpoint is in {self.folder}"
            )

    def stoppable(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the batches of a test, stopping early if asked.

        Only a single process can stop here: several cannot agree in the middle of a test, and finish it. Rank 0 still
        calls should_stop(), because that call is also the heartbeat.
        """
        group = self.components.group
        for batch in batches:
            asked = group.rank == 0 and self.should_stop is not None and self.should_stop()
            if asked and group.world_size == 1:
                self.act_on(Action.STOP)
            yield batch

    def end_epoch(self, metrics: dict[str, Any]) -> None:
        """Record the epoch's metrics, and write a checkpoint."""
        if self.components.group.rank == 0:
            self._write_metrics([*self._metrics_of_done_epochs(), metrics])
        self.epochs_done += 1
        self.loss_sum = self.epoch_seconds = 0.0
        self.save()

    def save(self) -> None:
        """Write a checkpoint, in rank 0. Raises WriteError if the disk does not take it."""
        self.saved_at = time.monotonic()
        components = self.components
        if components.group.rank > 0:
            return
        state = {
            "epochs_done": self.epochs_done,
            "steps_done": self.steps_done,
            "loss_sum": self.loss_sum,
            "epoch_seconds": self.epoch_seconds,
            "launches": self.launches,
            "seconds": self.clock.seconds(),
            "cpu_seconds": self.clock.cpu_seconds(),
            "trained": trainable_state(components.model),
            "optimizer": components.optimizer.state_dict(),
            "scaler": components.scaler.state_dict(),
            "bad_clips": self.bad_clips.reasons,
            "data": self.fingerprints,
        }
        checkpoint.save(self.folder, state)

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one. A broken one is set aside, with a warning.

        Raises ConfigError if that training saw other clips.
        """
        group = self.components.group
        if group.rank == 0:
            for note in checkpoint.set_broken_aside(self.folder):
                warnings.warn(note, stacklevel=3)
        if group.world_size > 1:
            dist.barrier()
        state = checkpoint.load(self.folder, group.device)
        if state is not None:
            record.check_data(self.folder, state["data"], self.fingerprints)
            self._restore(state)
        if group.rank == 0:
            done = self._metrics_of_done_epochs()
            if len(done) < len(record.read_metrics(self.folder)):
                self._write_metrics(done)

    def _restore(self, state: dict[str, Any]) -> None:
        components = self.components
        load_trainable_state(components.model, state["trained"])
        components.optimizer.load_state_dict(state["optimizer"])
        components.scaler.load_state_dict(state["scaler"])
        self.bad_clips.reasons.update(state["bad_clips"])
        self.epochs_done, self.steps_done = state["epochs_done"], state["steps_done"]
        self.loss_sum, self.epoch_seconds = state["loss_sum"], state["epoch_seconds"]
        self.clock.seconds_before, self.clock.cpu_seconds_before = state["seconds"], state["cpu_seconds"]
        self.launches = state["launches"] + 1

    def _metrics_of_done_epochs(self) -> list[dict[str, Any]]:
        """Return the recorded epochs that the weights have seen: a crash or a broken checkpoint may have cost some."""
        return [line for line in record.read_metrics(self.folder) if line["epoch"] <= self.epochs_done]

    def _write_metrics(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        files.write_atomically(self.folder / record.METRICS, text.encode())
