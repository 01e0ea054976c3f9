"""The modules of the baselines: the strategies that ST-Adapter is compared with (paper, Table 1).

Every module but the prompts starts as an exact zero beside the frozen model, so that the other strategies start from
the same function. Frame embeddings start at random, behind a map that starts at zero: an embedding of zeros hides the
order of frames and gets next to no gradient (direction accuracy stayed at exactly 50 %). Where the paper leaves a
choice open, the class gives ours and the reason.

`stadapter.strategies` names these classes and defines `part`, `build`, `from_config` and the MAC counts.
`seeded(block)` opens the random stream of a block, `seeded()` that of the whole strategy.

Shapes: B clips, T frames, M = B * T images, S = 1 + N tokens (CLS first), L = T * S tokens of a clip, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stadapter.backbone.vit import ALL_ROWS, Block, ViT, VitShape, attention
from stadapter.config import AdapterConfig, BaselineConfig

Seeded = Callable[..., AbstractContextManager[None]]


class LowRank(nn.Module):
    """A low-rank product B A, added to the output of a frozen linear map. B starts at zero, and so does B A.

    LoRA's factor alpha / r is fixed at 1: tuning the learning rate has the same effect.
    """

    def __init__(self, width_in: int, width_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, rank, bias=False)  # A
        self.up = nn.Linear(rank, width_out, bias=False)  # B
        nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor, rows: slice = ALL_ROWS) -> Tensor:
        """Return the selected rows of the output, [M, S, rows]."""
        return F.linear(self.down(h), self.up.weight[rows])


class AttentionLoRA(nn.Module):
    """The low-rank products of one block's attention: one for the joint query-key-value matrix, one for the output."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.qkv = LowRank(width, 3 * width, rank)
        self.proj = LowRank(width, width, rank)


class LoRA(nn.ModuleList):
    """Low-rank adaptation (LoRA): an `AttentionLoRA` for every block."""

    part = "lora"

    @classmethod
    def build(cls, vit: ViT, sizes: BaselineConfig, num_frames: int, seeded: Seeded) -> LoRA:
        made = cls()
        for block in range(vit.shape.depth):
            with seeded(block):
                made.append(AttentionLoRA(vit.shape.width, sizes.lora_rank))
        return made

    def macs_per_view(self, shape: VitShape, num_frames: int) -> int:
        tokens = num_frames * (1 + shape.num_patches)
        return tokens * sum(parameter.numel() for parameter in self.parameters())


class Prompts(nn.ParameterList):
    """Prompts [P, D] for every block, seen by its attention alone and shared by all frames.

    They start uniformly distributed, as in deep visual prompt tuning (VPT, arXiv 2203.12119).
    """

    part = "prompts"

    @classmethod
    def build(cls, vit: ViT, sizes: BaselineConfig, num_frames: int, seeded: Seeded) -> Prompts:
        made, shape = cls(), vit.shape
        bound = (6 / (3 * shape.patch_size**2 + shape.width)) ** 0.5
        for block in range(shape.depth):
            with seeded(block):
                made.append(nn.Parameter(torch.empty(sizes.prompts, shape.width).uniform_(-bound, bound)))
        return made

    def macs_per_view(self, shape: VitShape, num_frames: int) -> int:
        tokens, prompts = 1 + shape.num_patches, len(self[0])
        return num_frames * shape.depth * (shape.block_macs(tokens + prompts) - shape.block_macs(tokens))


FRAME_STD = 0.5  # standard deviation of new frame embeddings; tokens have about unit scale


class PlainAdapter(nn.Module):
    """A bottleneck without convolution (Houlsby et al., arXiv 1902.00751): X + GELU(X W_down) W_up, on every token.

    Place and width are the ST-Adapter's, so that the two differ in the convolution only. W_up starts at zero in the
    convolution's stead. The activation keeps W_down W_up from being one linear map.
    """

    adapts_cls = True

    def __init__(self, width: int, bottleneck_width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck_width)
        self.up = nn.Linear(bottleneck_width, width)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    @classmethod
    def from_config(cls, width: int, adapter: AdapterConfig) -> PlainAdapter:
        return cls(width, adapter.bottleneck_width)

    def macs_per_frame(self, num_patches: int) -> int:
        return (1 + num_patches) * (self.down.weight.numel() + self.up.weight.numel())

    def forward(self, x_MSD: Tensor, num_frames: int, onto_MSD: Tensor | None = None) -> Tensor:
        """Return the adapted tokens, as `STAdapter.forward` does. `num_frames` is ignored."""
        return (x_MSD if onto_MSD is None else onto_MSD) + self.up(F.gelu(self.down(x_MSD)))


class AttentionPool(nn.Module):
    """A learned query that attends to every token of the clip; the result is added to the mean of the frames' CLS.

    This is CoCa's pooler (arXiv 2205.01917) with two choices: the sum, so that it starts as the linear probe, and a
    learned embedding per frame, without which no pooling could tell a clip from its reversal.
    """

    part = "pool"

    @classmethod
    def build(cls, vit: ViT, sizes: BaselineConfig, num_frames: int, seeded: Seeded) -> AttentionPool:
        with seeded():
            return cls(vit.shape, num_frames)

    def macs_per_view(self, shape: VitShape, num_frames: int) -> int:
        D = shape.width
        return num_frames * (1 + shape.num_patches) * (2 * D * D + 2 * D) + D * D

    def __init__(self, shape: VitShape, num_frames: int) -> None:
        super().__init__()
        D = shape.width
        self.heads = shape.heads
        self.query = nn.Parameter(torch.empty(D))
        self.frame = nn.Parameter(FRAME_STD * torch.randn(num_frames, D))
        self.kv = nn.Linear(D, 2 * D)
        self.proj = nn.Linear(D, D)
        nn.init.normal_(self.query)
        for parameter in (self.kv.bias, self.proj.weight, self.proj.bias):
            nn.init.zeros_(parameter)

    def forward(self, x_BTSD: Tensor) -> Tensor:
        """Return the pooled vector of each clip, [B, D], given its normalised tokens."""
        B, _, _, D = x_BTSD.shape
        x_BLD = (x_BTSD + self.frame[:, None]).flatten(1, 2)
        k, v = self.kv(x_BLD).view(B, -1, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.query.view(1, self.heads, 1, -1).expand(B, -1, -1, -1)
        return self.proj(attention(q, k, v).flatten(1))


class TemporalTransformer(nn.Module):
    """Transformer blocks over a clip's CLS tokens, one per frame, with a learned embedding per frame.

    The paper does not give the size of its temporal fine-tuning. Ours is one block by default: in a ViT-B it has as
    many parameters as twelve ST-Adapters. A block's two branches start at zero. The frame embedding is added before the
    blocks and subtracted after them, so only the blocks see it.
    """

    part = "temporal"

    @classmethod
    def build(cls, vit: ViT, sizes: BaselineConfig, num_frames: int, seeded: Seeded) -> TemporalTransformer:
        with seeded():
            return cls(vit.shape, num_frames, sizes.temporal_blocks)

    def macs_per_view(self, shape: VitShape, num_frames: int) -> int:
        return len(self.blocks) * shape.block_macs(num_frames)

    def __init__(self, shape: VitShape, num_frames: int, depth: int) -> None:
        super().__init__()
        self.frame = nn.Parameter(FRAME_STD * torch.randn(num_frames, shape.width))
        plain = dataclasses.replace(shape, layer_scale=False)
        self.blocks = nn.ModuleList(Block(plain) for _ in range(depth))
        for name, parameter in self.blocks.named_parameters():
            if ".proj." in name or ".fc2." in name:
                nn.init.zeros_(parameter)

    def forward(self, cls_BTD: Tensor) -> Tensor:
        x_BTD = cls_BTD + self.frame
        for block in self.blocks:
            assert isinstance(block, Block)
            x_BTD = x_BTD + block.attend(x_BTD)
            x_BTD = x_BTD + block.mlp(x_BTD)
        return x_BTD - self.frame


class TimeAttention(nn.Module):
    """Self-attention over the T tokens at one place, before a block's own attention, as a residual branch."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        D = block.proj.in_features
        self.heads = block.heads
        self.norm = nn.LayerNorm(D, eps=block.norm1.eps)
        self.qkv = nn.Linear(D, 3 * D, bias=block.qkv.bias is not None)
        self.proj = nn.Linear(D, D)
        self.out = nn.Linear(D, D)
        # As in TimeSformer, the branch starts with the image model's attention weights and a last map of zeros. Theirs
        # is zero from the second block on; ours in every block, so that the model starts as the image model.
        for mine, pretrained in ((self.norm, block.norm1), (self.qkv, block.qkv), (self.proj, block.proj)):
            mine.load_state_dict(pretrained.state_dict())
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_MSD: Tensor, frame_TD: Tensor) -> Tensor:
        """Return the tokens [M, S, D] with the branch added to the patches. CLS is unchanged."""
        M, S, D = x_MSD.shape
        B, T, N = M // len(frame_TD), len(frame_TD), S - 1
        h_BNTD = self.norm(x_MSD[:, 1:]).view(B, T, N, D).transpose(1, 2) + frame_TD
        q, k, v = self.qkv(h_BNTD).view(B * N, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        a_BNTD = self.out(self.proj(attention(q, k, v).transpose(1, 2).reshape(B, N, T, D)))
        return torch.cat([x_MSD[:, :1], x_MSD[:, 1:] + a_BNTD.transpose(1, 2).reshape(M, N, D)], dim=1)


class DividedAttention(nn.Module):
    """Attention over time in every block: divided space-time attention (TimeSformer, arXiv 2102.05095).

    The paper's fully fine-tuned model is recognised by its size: a ViT-B/16 with divided attention, 400 classes and 8
    frames has the 121.57 M parameters that the paper reports. We made two choices. Every frame keeps its CLS, which the
    head's mean needs. Only attention over time reads the frame embedding, so its random start disturbs nothing else.
    """

    part = "time"

    @classmethod
    def build(cls, vit: ViT, sizes: BaselineConfig, num_frames: int, seeded: Seeded) -> DividedAttention:
        with seeded():
            return cls(vit, num_frames)

    def macs_per_view(self, shape: VitShape, num_frames: int) -> int:
        D = shape.width
        return num_frames * shape.depth * shape.num_patches * (5 * D * D + 2 * num_frames * D)

    def __init__(self, vit: ViT, num_frames: int) -> None:
        super().__init__()
        self.frame = nn.Parameter(FRAME_STD * torch.randn(num_frames, vit.shape.width))
        self.blocks = nn.ModuleList(TimeAttention(block) for block in vit.blocks)

    def forward(self, x_MSD: Tensor, block: int) -> Tensor:
        """Return the tokens [M, S, D] that the attention of block number `block` reads. CLS is unchanged."""
        return self.blocks[block](x_MSD, self.frame)
