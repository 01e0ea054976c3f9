"""One training under way: what it trains with, how far it has come, and how that is kept."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stadapter.config import Recipe
from stadapter.data.bad_clips import BadClips
from stadapter.model.classifier import VideoClassifier
from stadapter.model.state import load_trainable_state, trainable_state
from stadapter.training.runtime import ProcessGroup
from stadapter.training.token_cache import TokenCache
from stadapter.trials import checkpoint, files, record


class Stopped(Exception):
    """The training was asked to end, and a checkpoint of where it stood is written. One line: where that was."""


@dataclass(frozen=True)
class TrainComponents:
    """What one process trains with."""

    recipe: Recipe
    group: ProcessGroup
    model: VideoClassifier
    replica: torch.nn.Module  # the model, or its DistributedDataParallel wrapper
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler  # does nothing unless the precision is float16
    frozen_sha256: str  # of what is not trained, before it was cast; rank 0 alone works it out
    token_cache: TokenCache | None = None  # the blocks whose tokens are kept; None: nothing is


@dataclass
class Clock:
    """Time spent on a training, over all its launches. Made when one begins."""

    began: float = field(default_factory=time.time)
    cpu_began: float = field(default_factory=time.process_time)
    seconds_before: float = 0.0
    cpu_seconds_before: float = 0.0

    def seconds(self) -> float:
        return self.seconds_before + time.time() - self.began

    def cpu_seconds(self) -> float:
        return self.cpu_seconds_before + time.process_time() - self.cpu_began


_GO_ON, _SAVE, _STOP = 0.0, 1.0, 2.0  # rank 0's wishes, summed with the loss: the other ranks add 0


@dataclass
class Run:
    """How far a training has come, and how it is kept.

    A checkpoint holds `epochs_done`, whose metrics are recorded, and `steps_done`, which may be further: what has been
    summed up in the epoch that they began is kept with them.
    """

    folder: Path
    components: TrainComponents
    bad: BadClips  # of the training clips
    seen: dict[str, str]  # fingerprints of the clips
    epoch_steps: int
    checkpoint_every_s: float
    should_stop: Callable[[], bool] | None
    clock: Clock
    epochs_done: int = 0
    steps_done: int = 0
    loss_sum: float = 0.0  # over the clips of the epoch so far
    epoch_seconds: float = 0.0  # of its steps so far
    launches: int = 1
    saved_at: float = field(default_factory=time.monotonic)

    def wish(self) -> Tensor:
        """What rank 0 wants done after this step, float64 []; 0 in the other ranks."""
        wish = _GO_ON
        if self.components.group.rank == 0:
            if self.should_stop is not None and self.should_stop():
                wish = _STOP
            elif time.monotonic() - self.saved_at >= self.checkpoint_every_s:
                wish = _SAVE
        return torch.tensor(wish, dtype=torch.float64, device=self.components.group.device)

    def obey(self, wish: float) -> None:
        """Save, or save and raise Stopped, as all processes have agreed."""
        if wish == _GO_ON:
            return
        if self.components.group.world_size > 1:
            self.bad.gather()
        self.save()
        if wish == _STOP:
            epochs = self.components.recipe.optim.epochs
            raise Stopped(
                f"stopped after step {self.steps_done} of {epochs * self.epoch_steps} (epoch "
                f"{min(self.epochs_done + 1, epochs)} of {epochs}); a checkpoint is in {self.folder}"
            )

    def interruptible(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches of a test, unless it is to end. Several processes could not agree on it in here, and go on; rank
        0 is asked all the same, since whoever asks sees that the test moves."""
        for batch in batches:
            asked = self.components.group.rank == 0 and self.should_stop is not None and self.should_stop()
            if asked and self.components.group.world_size == 1:
                self.obey(_STOP)
            yield batch

    def end_epoch(self, metrics: dict[str, Any]) -> None:
        """Record the epoch, and save."""
        if self.components.group.rank == 0:
            self._write_metrics([*self._metrics(), metrics])
        self.epochs_done += 1
        self.loss_sum = self.epoch_seconds = 0.0
        self.save()

    def save(self) -> None:
        self.saved_at = time.monotonic()
        if self.components.group.rank > 0:
            return
        components = self.components
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
            "bad_clips": self.bad.reasons,
            "data": self.seen,
        }
        checkpoint.save(self.folder, state)

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one. A broken one is set aside, with a warning.

        ConfigError if its training saw other clips than this one would.
        """
        components, group = self.components, self.components.group
        if group.rank == 0:
            for note in checkpoint.set_broken_aside(self.folder):
                warnings.warn(note, stacklevel=3)
        if group.world_size > 1:
            dist.barrier()
        state = checkpoint.load(self.folder, group.device)
        if state is not None:
            record.check_data(self.folder, state["data"], self.seen)
            load_trainable_state(components.model, state["trained"])
            components.optimizer.load_state_dict(state["optimizer"])
            components.scaler.load_state_dict(state["scaler"])
            self.bad.reasons.update(state["bad_clips"])
            self.epochs_done, self.steps_done = state["epochs_done"], state["steps_done"]
            self.loss_sum, self.epoch_seconds = state["loss_sum"], state["epoch_seconds"]
            self.clock.seconds_before, self.clock.cpu_seconds_before = state["seconds"], state["cpu_seconds"]
            self.launches = state["launches"] + 1
        if group.rank == 0 and len(known := self._metrics()) < len(record.read_metrics(self.folder)):
            self._write_metrics(known)

    def _metrics(self) -> list[dict[str, Any]]:
        """The recorded epochs that the weights have seen: not those that a crash or a broken checkpoint took."""
        return [line for line in record.read_metrics(self.folder) if line["epoch"] <= self.epochs_done]

    def _write_metrics(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        files.write_atomically(self.folder / record.METRICS, text.encode())
