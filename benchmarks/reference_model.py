"""The video classifier written plainly: the reference for `benchmarks.step` and `benchmarks.token_cache`.

Every token goes through every layer, the adapter permutes its bottleneck for a Conv3d and back, attention is PyTorch's,
and QuickGELU is its formula. Frozen parameters require no gradient; nothing else is done for speed.

Shapes: B clips, T frames, M = B * T images, N patches, S = 1 + N tokens (CLS first), D width, C bottleneck, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stadapter.backbone.vit import VitShape
from stadapter.model.classifier import VideoClassifier


class PlainAdapter(nn.Module):
    def __init__(self, width: int, bottleneck_width: int, kernel_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck_width)
        kT, kH, kW = kernel_size
        padding = (kT // 2, kH // 2, kW // 2)
        self.conv = nn.Conv3d(bottleneck_width, bottleneck_width, kernel_size, padding=padding, groups=bottleneck_width)
        self.up = nn.Linear(bottleneck_width, width)

    def forward(self, x_MSD: Tensor, num_frames: int) -> Tensor:
        M, S = x_MSD.shape[:2]
        side = round((S - 1) ** 0.5)
        cls_M1D, patches_MND = x_MSD[:, :1], x_MSD[:, 1:]
        z_BTHWC = self.down(patches_MND).view(M // num_frames, num_frames, side, side, -1)
        z_BCTHW = z_BTHWC.permute(0, 4, 1, 2, 3).contiguous()
        z_BTHWC = self.conv(z_BCTHW).permute(0, 2, 3, 4, 1).contiguous()
        return torch.cat([cls_M1D, patches_MND + self.up(z_BTHWC.view(M, S - 1, -1))], dim=1)


class PlainBlock(nn.Module):
    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.heads, self.activation = shape.heads, shape.activation
        self.norm1 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width)
        self.norm2 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.fc1 = nn.Linear(shape.width, shape.mlp_width)
        self.fc2 = nn.Linear(shape.mlp_width, shape.width)

    def forward(self, x_MSD: Tensor) -> Tensor:
        M, S, D = x_MSD.shape
        q, k, v = self.qkv(self.norm1(x_MSD)).view(M, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x_MSD = x_MSD + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(M, S, D))
        hidden = self.fc1(self.norm2(x_MSD))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.activation == "quick_gelu" else F.gelu(hidden)
        return x_MSD + self.fc2(hidden)


class PlainClassifier(nn.Module):
    """The plain classifier: pixels, uint8 [B, T, 3, H, W], to logits [B, K], with adapters before attention."""

    def __init__(self, model: VideoClassifier, bottleneck_width: int, kernel_size: tuple[int, int, int]) -> None:
        """Copy the weights of `model`, and which of them are frozen."""
        super().__init__()
        shape = model.vit.shape
        self.mean, self.std = model.mean_311, model.std_311
        self.patch_embed = nn.Conv2d(3, shape.width, shape.patch_size, shape.patch_size, bias=shape.patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(shape.width))
        self.pos_embed = nn.Parameter(torch.zeros(1 + shape.num_patches, shape.width))
        self.norm_pre = nn.LayerNorm(shape.width, eps=shape.norm_eps) if shape.pre_norm else nn.Identity()
        self.before = nn.ModuleDict(
            {block: PlainAdapter(shape.width, bottleneck_width, kernel_size) for block in model.before}
        )
        self.blocks = nn.ModuleList(PlainBlock(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.head = nn.Linear(shape.width, model.head.out_features)
        state = {name.removeprefix("vit."): tensor for name, tensor in model.state_dict().items()}
        self.load_state_dict(state)
        trained = {name.removeprefix("vit."): p.requires_grad for name, p in model.named_parameters()}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trained[name])

    def forward(self, pixels_BTCHW: Tensor) -> Tensor:
        B, T = pixels_BTCHW.shape[:2]
        pixels = (pixels_BTCHW.flatten(0, 1) / 255 - self.mean) / self.std
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        cls = self.cls_token.expand(B * T, 1, -1).to(patches.dtype)
        x_MSD = self.norm_pre(torch.cat([cls, patches], dim=1) + self.pos_embed)
        for index, block in enumerate(self.blocks):
            x_MSD = block(self.before[str(index)](x_MSD, T) if str(index) in self.before else x_MSD)
        x_MSD = self.norm(x_MSD[:, 0].view(B, T, -1).mean(1))
        return self.head(x_MSD)
