"""ST-Adapter, the module of the paper (Pan et al., arXiv 2206.13559, equation 5).

    ST-Adapter(X) = X + f(DWConv3D(X W_down)) W_up

A bottleneck that lets the patch tokens of neighbouring frames (and, with a spatial kernel, of neighbouring places)
see each other through a depthwise 3-D convolution. The CLS tokens pass untouched.

Shapes: M = B * T images (B clips of T frames, the frames of a clip one after another), S = 1 + N tokens per image
(CLS first, then N = side * side patches row by row), D width, C bottleneck width, (kT, kH, kW) kernel.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stadapter.backbone import ops
from stadapter.config import AdapterConfig


class STAdapter(nn.Module):
    """A bottleneck with a depthwise convolution over frames, rows and columns, beside the identity.

    - `kernel_size` is (t, h, w), odd.
    - `activation` is f: "none", as the authors' released weights have it, or "gelu".
    - `adapt_cls` sends CLS through the bottleneck too. CLS has no place in the grid, so the convolution treats it as a
      token without neighbours: only its centre tap and its bias apply.
    - `zero_init_conv` makes a fresh adapter exactly the identity: the convolution and all biases start at zero. The two
      linear maps start at random, or no gradient would ever reach the convolution. Without it the convolution starts
      as PyTorch leaves it, weight and bias, and a fresh adapter disturbs the backbone.
    """

    def __init__(
        self,
        width: int,
        bottleneck_width: int = 384,
        kernel_size: tuple[int, int, int] = (3, 1, 1),
        activation: str = "none",
        *,
        adapt_cls: bool = False,
        zero_init_conv: bool = True,
    ) -> None:
        super().__init__()
        if any(extent % 2 == 0 for extent in kernel_size):
            raise ValueError(f"kernel_size {kernel_size}: an even kernel has no centre")
        if activation not in ("none", "gelu"):
            raise ValueError(f"activation {activation!r}: must be 'none' or 'gelu'")
        self.activation, self.adapts_cls = activation, adapt_cls
        self.down = nn.Linear(width, bottleneck_width)
        # A Conv3d for its parameters, [C, 1, kT, kH, kW], as the published checkpoints store them; see `depthwise`.
        self.conv = nn.Conv3d(bottleneck_width, bottleneck_width, kernel_size, groups=bottleneck_width)
        self.up = nn.Linear(bottleneck_width, width)
        if zero_init_conv:
            nn.init.zeros_(self.conv.weight)
        for layer in (self.down, self.conv, self.up) if zero_init_conv else (self.down, self.up):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @classmethod
    def from_config(cls, width: int, adapter: AdapterConfig) -> STAdapter:
        """Return the adapter that a recipe's fields describe, for tokens of this width."""
        return cls(
            width,
            adapter.bottleneck_width,
            adapter.kernel_size,
            adapter.activation,
            adapt_cls=adapter.adapt_cls,
            zero_init_conv=adapter.zero_init_conv,
        )

    def macs_per_frame(self, num_patches: int) -> int:
        """Return the multiply-accumulates for one frame: two matrices and the convolution, per adapted token."""
        D, C = self.down.in_features, self.down.out_features
        cls = 2 * D * C + C if self.adapts_cls else 0
        return num_patches * (2 * D * C + C * math.prod(self.conv.kernel_size)) + cls

    def forward(
        self, x_MSD: Tensor, num_frames: int, onto_MSD: Tensor | None = None, *, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Return the adapted tokens, of the same shape as `x_MSD`: [M, 1 + N, D], or CLS alone with `adapt_cls`.

        The branch reads `x_MSD` and is added to `onto_MSD`, by default `x_MSD`. M must be a multiple of `num_frames`.
        `grid` is (rows, columns) of patches, by default a square.
        """
        temporal = not self.adapts_cls and self.conv.kernel_size[1:] == (1, 1) and x_MSD.shape[1] > 1
        if temporal and ops.wanted(x_MSD, onto_MSD, *self.parameters()):
            layers = (p for layer in (self.down, self.conv, self.up) for p in (layer.weight, layer.bias))
            return ops.Adapt.apply(x_MSD, onto_MSD, *layers, functools.partial(self._middle, num_frames, grid))
        onto_MSD = x_MSD if onto_MSD is None else onto_MSD
        # CLS goes down with the rest and is dropped in the bottleneck: cheaper than copying N of N + 1 wide tokens.
        z_MSC = self.down(x_MSD)
        if self.adapts_cls:
            parts = [self._alone(z_MSC[:, :1])]
            if z_MSC.shape[1] > 1:
                parts.append(depthwise(z_MSC[:, 1:], self.conv.weight, self.conv.bias, num_frames, grid))
            return onto_MSD + self.up(self._activate(torch.cat(parts, dim=1)))
        z_MNC = self._middle(num_frames, grid, z_MSC[:, 1:], self.conv.weight, self.conv.bias)
        return torch.cat([onto_MSD[:, :1], onto_MSD[:, 1:] + self.up(z_MNC)], dim=1)

    def _middle(
        self, num_frames: int, grid: tuple[int, int] | None, z_MNC: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        return self._activate(depthwise(z_MNC, weight, bias, num_frames, grid))

    def _activate(self, z: Tensor) -> Tensor:
        return F.gelu(z) if self.activation == "gelu" else z

    def _alone(self, z_M1C: Tensor) -> Tensor:
        """Return the zero-padded convolution of a token without neighbours, [M, 1, C]."""
        kT, kH, kW = self.conv.weight.shape[2:]
        centre_C = self.conv.weight[:, 0, kT // 2, kH // 2, kW // 2]
        assert self.conv.bias is not None
        return (z_M1C * centre_C + self.conv.bias).to(z_M1C.dtype)


def depthwise(
    z_MNC: Tensor, weight: Tensor, bias: Tensor | None, num_frames: int, grid: tuple[int, int] | None = None
) -> Tensor:
    """Return the zero-padded depthwise convolution over (frame, row, column): [M, N, C] of [M, N, C].

    `weight` is [C, 1, kT, kH, kW]. The result is that of `F.conv3d`, by 2-D convolutions that read the tokens where
    they lie (channels last): forward and backward on a CPU 6 to 18 times faster for a temporal kernel, and 1.4 to 2.5
    times for 3x3x3.
    """
    if z_MNC.device.type != "cpu":
        return _depthwise(z_MNC, weight, bias, num_frames, grid)
    # A CPU convolves bfloat16 2 to 3.5 times slower than float32.
    dtype = torch.float32 if z_MNC.dtype in (torch.bfloat16, torch.float16) else z_MNC.dtype
    with torch.autocast("cpu", enabled=False):
        cast_bias = None if bias is None else bias.to(dtype)
        return _depthwise(z_MNC.to(dtype), weight.to(dtype), cast_bias, num_frames, grid).to(z_MNC.dtype)


def _depthwise(
    z_MNC: Tensor, weight: Tensor, bias: Tensor | None, num_frames: int, grid: tuple[int, int] | None
) -> Tensor:
    M, N, C = z_MNC.shape
    T = num_frames
    kT, kH, kW = weight.shape[2:]
    if kT == kH == kW == 1:
        out_MNC = z_MNC * weight.view(C)
        return out_MNC if bias is None else out_MNC + bias
    if kH == kW == 1:
        # Purely temporal: an "image" of T rows and N columns, and a kernel one column wide.
        image_BCTN = z_MNC.reshape(M // T, T, N, C).permute(0, 3, 1, 2)
        out_BCTN = F.conv2d(image_BCTN, weight.squeeze(-1), bias, padding=(kT // 2, 0), groups=C)
        return out_BCTN.permute(0, 2, 3, 1).reshape(M, N, C)
    # One 2-D convolution per temporal tap; the tap for offset dt adds frame t + dt's answer to frame t.
    rows, columns = grid or (round(N**0.5),) * 2
    image_MCHW = z_MNC.reshape(M, rows, columns, C).permute(0, 3, 1, 2)

    def convolve(tap: int, tap_bias: Tensor | None) -> Tensor:
        out_MCHW = F.conv2d(image_MCHW, weight[:, :, tap], tap_bias, padding=(kH // 2, kW // 2), groups=C)
        return out_MCHW.permute(0, 2, 3, 1).reshape(M // T, T, N, C)

    sum_BTNC = convolve(kT // 2, bias)
    for dt in range(1, min(kT // 2, T - 1) + 1):
        sum_BTNC[:, :-dt] += convolve(kT // 2 + dt, None)[:, dt:]
        sum_BTNC[:, dt:] += convolve(kT // 2 - dt, None)[:, :-dt]
    return sum_BTNC.reshape(M, N, C)
