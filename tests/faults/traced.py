"""Does a sweep survive every fault? Two arms that write each training step to the file $TRACE.

`test_faults.py` injects its faults into this sweep. A custom adapter makes the training steps visible from outside.
"""

import os
import time

import torch.distributed as dist
from torch import Tensor

from stadapter.ablation import Arm, main
from stadapter.config import AdapterConfig, Recipe
from stadapter.model.adapter import STAdapter
from stadapter.model.custom import custom_adapter

STEP_S = 0.1  # at least, so that a fault can happen between two steps


class Traced(STAdapter):
    def __init__(self, width: int, adapter: AdapterConfig) -> None:
        super().__init__(width, adapter.bottleneck_width, adapter.kernel_size)

    def forward(self, x_MSD: Tensor, num_frames: int, onto_MSD: Tensor | None = None) -> Tensor:
        if self.training and x_MSD.device.type != "meta":
            rank = dist.get_rank() if dist.is_initialized() else 0
            with open(os.environ["TRACE"], "a") as trace:
                trace.write(f"{self.conv.kernel_size[0]} {rank} {os.getpid()} {time.time()}\n")
            time.sleep(STEP_S)
        return super().forward(x_MSD, num_frames, onto_MSD)


def make_arm(recipe: Recipe, value: str) -> Arm:
    return Arm(f"kernel {value}", custom_adapter(Traced) | {"adapter.kernel_size": (int(value), 3, 3)})


if __name__ == "__main__":
    main(__doc__ or "", name="traced", values=("1", "3"), make_arm=make_arm)
