"""LoRA (Hu et al., arXiv 2106.09685): a frozen matrix W acts as W + B A, and only the low-rank A and B are trained.

Shapes: h [..., D_in] -> [..., D_out]; r the rank.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stadapter.backbone.vit import ALL_ROWS


class LowRank(nn.Module):
    """B A, added to what a frozen linear map gives. B starts at zero, so a fresh one changes nothing.

    Without LoRA's factor alpha / r (it is 1): what it tunes, the learning rate tunes as well.
    """

    def __init__(self, width_in: int, width_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, rank, bias=False)  # A
        self.up = nn.Linear(rank, width_out, bias=False)  # B
        nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor, rows: slice = ALL_ROWS) -> Tensor:
        """`rows`: the part of the outputs that is wanted."""
        return F.linear(self.down(h), self.up.weight[rows])


class LoRA(nn.Module):
    """For one block's attention: its query-key-value matrix as one map, and its output matrix."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.qkv = LowRank(width, 3 * width, rank)
        self.proj = LowRank(width, width, rank)
