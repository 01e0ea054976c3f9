"""The processes that share a training, and what each of them reads."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from stadapter.config import DataConfig
from stadapter.data.cache.frames import open_cache
from stadapter.data.cache.tokens import Rows
from stadapter.data.clips import ClipDataset
from stadapter.data.lists.formats import ClipList
from stadapter.data.lists.storage import default_local_copies
from stadapter.data.reader import Reading
from stadapter.training.options import TrainOptions


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share one training. `rank` 0 writes."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def join_process_group() -> ProcessGroup:
    """Start and return the process group that torchrun describes in the environment; one process without torchrun."""
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    rank, size, local = (int(os.environ.get(name, default)) for name, default in torchrun.items())
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return ProcessGroup(rank, size, device)


def make_dataset(
    clips: ClipList, data: DataConfig, seed: int, train_options: TrainOptions, *, train: bool, rows: Rows | None = None
) -> ClipDataset:
    """The clips as pixels, read as the options say; as tokens where `rows` has them."""
    # The whole embedded world fits in memory, and the next trial in this process finds it there.
    in_memory = data.dataset.startswith("embedded_") and train_options.num_workers == 0
    reading = Reading(
        decoder=train_options.decoder,
        time_limit_s=train_options.clip_time_limit_s,
        in_memory=in_memory,
        local_copies=default_local_copies(train_options.local_copies_gb),
        cache=open_cache(clips.root, train_options.cache_gb, train_options.decoder, data.decoded_short_side),
    )
    return ClipDataset(clips, data, seed, train=train, reading=reading, rows=rows)
