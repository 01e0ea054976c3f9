"""The plain vision transformer that every backbone is loaded into, whichever library its weights come from.

One block interface serves timm, open_clip and the embedded weights: a block is two residual branches, `attend` and
`mlp`, and the caller decides what happens before, between and after them. Nothing here knows about video or adapters.

Shapes: M images (B clips x T frames), S = 1 + N tokens per image (CLS first, then the patches row by row), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stadapter.backbone import ops


@dataclass(frozen=True)
class VitShape:
    """The architecture of a ViT: enough to build it without weights, on the meta device as well."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    norm_eps: float = 1e-6
    pre_norm: bool = False  # CLIP normalises the embedded tokens before the first block
    patch_bias: bool = True
    qkv_bias: bool = True
    layer_scale: bool = False

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    def block_macs(self, tokens: int) -> int:
        """Return the multiply-accumulates of one block for this many tokens that see each other."""
        return 4 * tokens * self.width**2 + 2 * tokens**2 * self.width + 2 * tokens * self.width * self.mlp_width

    def macs_per_image(self) -> int:
        """Return the multiply-accumulates of the patch embedding and all blocks."""
        embedding = self.num_patches * 3 * self.patch_size**2 * self.width
        return embedding + self.depth * self.block_macs(1 + self.num_patches)


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "quick_gelu":
        return ops.QuickGELU.apply(x) if ops.wanted(x) else F.silu(ops.QUICK_GELU * x) * (1 / ops.QUICK_GELU)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v, all of them [M, heads, tokens, d]."""
    # PyTorch's fused kernel is right on a GPU and for many tokens. On a CPU its backward pass is slow for few tokens
    # (2x at 26) and slower in bfloat16 (5x at 26 tokens, 3x at 197; one core, PyTorch 2.14).
    if q.device.type == "cpu" and (q.dtype != torch.float32 or k.shape[2] < 128):
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


ALL_ROWS = slice(None)  # of the matrix that makes queries, keys and values


class AttentionChange(Protocol):
    """A change of one attention's pretrained matrices, as LoRA makes it."""

    def qkv(self, h_MSD: Tensor, rows: slice) -> Tensor:
        """Return what is added to these rows of the query-key-value matrix's output."""

    def proj(self, x_MSD: Tensor) -> Tensor:
        """Return what is added to the output matrix's output."""


class Block(nn.Module):
    """A pre-norm transformer block, as its two residual branches."""

    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        width = shape.width
        self.heads, self.activation = shape.heads, shape.activation
        self.norm1 = nn.LayerNorm(width, eps=shape.norm_eps)
        self.qkv = nn.Linear(width, 3 * width, bias=shape.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=shape.norm_eps)
        self.fc1 = nn.Linear(width, shape.mlp_width)
        self.fc2 = nn.Linear(shape.mlp_width, width)
        self.scale1 = nn.Parameter(torch.ones(width)) if shape.layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(width)) if shape.layer_scale else None

    def attend(self, x_MSD: Tensor, cls_only: bool = False, change: AttentionChange | None = None) -> Tensor:
        """Return what self-attention adds to the tokens, [M, S, D]; with `cls_only`, to CLS alone, [M, 1, D]."""
        M, S, D = x_MSD.shape
        h = self.norm1(x_MSD)
        if cls_only and change is None:
            mixed = self._gather_for_cls(h)
        elif cls_only:
            q = self._qkv(h[:, :1], slice(None, D), change).view(M, 1, self.heads, -1).transpose(1, 2)
            kv = self._qkv(h, slice(D, None), change).view(M, S, 2, self.heads, -1)
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
            mixed = attention(q, k, v).transpose(1, 2).flatten(2)
        else:
            qkv = self._qkv(h, ALL_ROWS, change)
            if ops.wanted(qkv):
                q, k, v = ops.Split.apply(qkv, self.heads)
            else:
                q, k, v = qkv.view(M, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = attention(q, k, v).transpose(1, 2).flatten(2)
        out = self.proj(mixed) if change is None else self.proj(mixed) + change.proj(mixed)
        return out if self.scale1 is None else out * self.scale1

    def _gather_for_cls(self, h_MSD: Tensor) -> Tensor:
        """Return what CLS's attention gathers, [M, 1, D], without a key or a value for each token.

        CLS's scores are q . (W_k h + b_k): W_k turns the one query instead of all tokens, and b_k, which adds the same
        to each score, drops out. Weights sum to 1, so W_v and b_v follow the weighted mean.
        """
        M, _, D = h_MSD.shape
        query_HdD, key_HdD, value_HdD = self.qkv.weight.view(3, self.heads, -1, D).unbind(0)
        query_b, _, value_b = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.view(3, D).unbind(0)
        d = query_HdD.shape[1]
        q_MHd = F.linear(h_MSD[:, 0], query_HdD.flatten(0, 1), query_b).view(M, self.heads, d) * d**-0.5
        asked_MHD = torch.einsum("mhd,hdw->mhw", q_MHd, key_HdD)
        weights_MHS = (asked_MHD @ h_MSD.transpose(1, 2)).softmax(-1)
        mean_MHD = weights_MHS.to(asked_MHD.dtype) @ h_MSD
        gathered_MD = torch.einsum("mhw,hdw->mhd", mean_MHD, value_HdD).flatten(1)
        return (gathered_MD if value_b is None else gathered_MD + value_b).unsqueeze(1)

    def _qkv(self, h: Tensor, rows: slice, change: AttentionChange | None) -> Tensor:
        bias = self.qkv.bias
        out = F.linear(h, self.qkv.weight[rows], None if bias is None else bias[rows])
        return out if change is None else out + change.qkv(h, rows)

    def mlp(self, x_MSD: Tensor) -> Tensor:
        """Return what the MLP adds to the tokens, [M, S, D]."""
        out = self.fc2(activate(self.fc1(self.norm2(x_MSD)), self.activation))
        return out if self.scale2 is None else out * self.scale2


class ViT(nn.Module):
    """A patch embedding, blocks and a final norm."""

    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.shape = shape
        self.patch_embed = nn.Conv2d(3, shape.width, shape.patch_size, shape.patch_size, bias=shape.patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(shape.width))
        self.pos_embed = nn.Parameter(torch.zeros(1 + shape.num_patches, shape.width))
        self.norm_pre = nn.LayerNorm(shape.width, eps=shape.norm_eps) if shape.pre_norm else None
        # A ModuleList, which type checkers only know to hold modules.
        self.blocks = cast("Sequence[Block]", nn.ModuleList(Block(shape) for _ in range(shape.depth)))
        self.norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)

    def embed(self, pixels_MCHW: Tensor) -> Tensor:
        """Return tokens [M, 1 + N, D], as the first block reads them, of normalised pixels [M, 3, H, W]."""
        patches = self.patch_embed(pixels_MCHW).flatten(2).transpose(1, 2)
        cls = self.cls_token.expand(len(patches), 1, -1)
        x_MSD = torch.cat([cls.to(patches.dtype), patches], dim=1) + self.pos_embed
        return x_MSD if self.norm_pre is None else self.norm_pre(x_MSD)

    def forward(self, pixels_MCHW: Tensor) -> Tensor:
        """Return tokens [M, 1 + N, D] after the final norm, of normalised pixels [M, 3, H, W]."""
        x_MSD = self.embed(pixels_MCHW)
        for block in self.blocks:
            x_MSD = x_MSD + block.attend(x_MSD)
            x_MSD = x_MSD + block.mlp(x_MSD)
        return self.norm(x_MSD)


def seed_weights(vit: ViT, seed: int) -> None:
    """Fill a ViT with random weights of a sensible scale: truncated normals, zero biases.

    Tests, timings and the pretraining of the embedded backbone start from these.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if parameter.ndim > 1 or name == "cls_token":
                fan_in = parameter[0].numel() if name.endswith("weight") else 2500  # embeddings: std 0.02
                nn.init.trunc_normal_(parameter, std=fan_in**-0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()


# The architecture of the backbone in the package; `tools.pretrain_embedded` trains its weights.
EMBEDDED_SHAPE = VitShape(image_size=60, patch_size=12, width=96, depth=6, heads=3, mlp_width=384, activation="gelu")
