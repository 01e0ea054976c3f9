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
from stadapter.data.lists.storage import default_spill
from stadapter.data.reader import Reading
from stadapter.training.options import Operation


@dataclass(frozen=True)
class World:
    """The processes that share one training. `rank` 0 writes."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def make_dataset(
    clips: ClipList, data: DataConfig, seed: int, operation: Operation, *, train: bool, rows: Rows | None = None
) -> ClipDataset:
    """The clips as pixels, read as the operation says; as tokens where `rows` has them."""
    # The whole embedded world fits in memory, and the next trial in this process finds it there.
    in_memory = data.dataset.startswith("embedded_") and operation.num_workers == 0
    reading = Reading(
        decoder=operation.decoder,
        time_limit_s=operation.clip_time_limit_s,
        in_memory=in_memory,
        spill=default_spill(operation.spill_gb),
        cache=open_cache(clips.root, operation.cache_gb, operation.decoder, data.decoded_short_side),
    )
    return ClipDataset(clips, data, seed, train=train, reading=reading, rows=rows)
