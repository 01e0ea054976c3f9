"""The options of how a training runs: places, processes, memory and caches.

Light to import, since command lines print these defaults in their help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stadapter.config import ConfigError
from stadapter.data.lists.storage import DEFAULT_LOCAL_COPIES_GB
from stadapter.data.reader import DEFAULT_TIME_LIMIT_S
from stadapter.data.video.decoding import Backend

GPU_CLIPS_PER_PASS = 64  # the authors' batch per GPU
DEFAULT_CHECKPOINT_EVERY_S = 600.0  # within an epoch
DEFAULT_MAX_BAD_SHARE = 0.05


@dataclass(frozen=True)
class TrainOptions:
    """The options of how a training runs: they change numbers by rounding at most, and no trial's identity."""

    data_root: str | Path | None = None  # a folder, or an address such as s3://...
    weights_file: Path | None = None
    num_workers: int = 0  # loader processes per training process; 0 decodes in the loop
    clips_per_pass: int | None = None  # upper bound per process, for memory; None: its share of the global batch
    max_bad_share: float = DEFAULT_MAX_BAD_SHARE  # of a list's clips; above it, unreadable clips stop the training
    clip_time_limit_s: float = DEFAULT_TIME_LIMIT_S  # a clip that takes longer to read counts as unreadable
    local_copies_gb: float = DEFAULT_LOCAL_COPIES_GB  # on this node's disk, of clips that lie at addresses
    decoder: Backend = "auto"
    cache_gb: float = 0  # decoded frames on this node's disk; 0 keeps none
    # Makes batches on other machines, in place of loader processes: a `data.clips.RemoteLoader`, whose module loads
    # torch.
    remote_loader: Callable[..., Iterable[dict[str, Any]]] | None = None
    checkpoint_every_s: float = DEFAULT_CHECKPOINT_EVERY_S  # within an epoch; 0: every step
    token_cache_gb: float = 0  # tokens behind frozen blocks, on this node's disk; 0 keeps none
    recompute: bool = False  # the MLPs' activations in the backward pass: less memory, more time, the same bits
    compile: bool = False  # by torch.compile: minutes at the start, and numbers that differ by rounding

    def __post_init__(self) -> None:
        if self.clips_per_pass is not None and self.clips_per_pass < 1:
            raise ConfigError(f"--clips-per-pass {self.clips_per_pass}: must be at least 1")
        if self.num_workers < 0:
            raise ConfigError(f"--num-workers {self.num_workers}: must be at least 0")
        if self.token_cache_gb and self.remote_loader is not None:
            raise ConfigError(
                "--cache-prefix: not together with --decode-on-cluster, whose nodes do not have the tokens kept here"
            )
        if not self.checkpoint_every_s >= 0:
            raise ConfigError(f"--checkpoint-every {self.checkpoint_every_s}: must be at least 0 seconds")
