"""The processes that share one training: how many there are, and which of them this one is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ProcessGroup:
    """This process's place among those that share a training. Rank 0 writes the files.

    A plain value, beside torch.distributed's default process group, which does the communication if there are several.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def join_process_group() -> ProcessGroup:
    """Start and return the process group that torchrun describes in the environment; one process without torchrun."""
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in torchrun.items())
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return ProcessGroup(rank, world_size, device)
