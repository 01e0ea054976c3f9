"""Custom autograd functions, which keep less or compute less than PyTorch's own backward pass would.

Each equals a plain expression in value and gradients, to rounding. The plain twin stands beside each call, in
`model/adapter.py` and `backbone/vit.py`: it serves inference, compilation and export, and tests compare the two.

Shapes: M = B * T images, S = 1 + N tokens per image (CLS first), D width, C bottleneck width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

QUICK_GELU = 1.702

# (bottleneck [M, N, C], weight, bias) -> [M, N, C]: the convolution and the activation.
Middle = Callable[[Tensor, Tensor, Tensor], Tensor]


def wanted(*tensors: Tensor | None) -> bool:
    """Return True if a backward pass may follow and nothing is being compiled: compilers plan memory themselves."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    )


class Adapt(torch.autograd.Function):
    """An adapter's branch: onto + up(middle(down(x))) for the patches, onto's CLS. `onto_MSD` None means x itself.

    Plain autograd keeps x, the bottleneck and what `up` reads. This keeps x and the bottleneck, and computes the middle
    again: 2 % of an adapter's time for a temporal kernel, too much for one with spatial extent.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MSD: Tensor,
        onto_MSD: Tensor | None,
        down_CD: Tensor,
        down_C: Tensor,
        conv: Tensor,
        conv_C: Tensor,
        up_DC: Tensor,
        up_D: Tensor,
        middle: Middle,
    ) -> Tensor:
        ctx.autocast_dtype = autocast_dtype(x_MSD.device)
        base_MSD = x_MSD if onto_MSD is None else onto_MSD
        kept_MSD = x_MSD.to(ctx.autocast_dtype or x_MSD.dtype)
        z_MNC = F.linear(kept_MSD, down_CD, down_C)[:, 1:]
        added_MND = F.linear(middle(z_MNC, conv, conv_C), up_DC, up_D)
        out_MSD = base_MSD.to(torch.promote_types(base_MSD.dtype, added_MND.dtype), copy=True)
        out_MSD[:, 1:] += added_MND
        ctx.save_for_backward(kept_MSD, z_MNC, down_CD, down_C, conv, conv_C, up_DC, up_D)
        ctx.onto_itself, ctx.middle, ctx.dtypes = onto_MSD is None, middle, (x_MSD.dtype, base_MSD.dtype)
        return out_MSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_MSD: Tensor) -> tuple[Tensor | None, ...]:
        x_MSD, z_MNC, down_CD, down_C, conv, conv_C, up_DC, up_D = ctx.saved_tensors
        x_dtype, onto_dtype = ctx.dtypes
        wants_x, wants_onto = ctx.needs_input_grad[:2]
        half = ctx.autocast_dtype
        with torch.autocast(g_MSD.device.type, half) if half else contextlib.nullcontext():
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in (z_MNC, conv, conv_C)]
                c_MNC = ctx.middle(*leaves)
            narrow_MSD = g_MSD.to(half or g_MSD.dtype)  # once for both products
            # CLS stays in, with zeros in the bottleneck, while tokens are multiplied: cheaper than to copy the others.
            gc_MNC = (narrow_MSD @ up_DC)[:, 1:]
            gz_MNC, g_conv, g_conv_C = torch.autograd.grad(c_MNC, leaves, gc_MNC.to(c_MNC.dtype))
            gz_MSC = F.pad(gz_MNC, (0, 0, 1, 0))
            g_up_DC = _outer(narrow_MSD, F.pad(c_MNC.detach(), (0, 0, 1, 0)))
            g_down_CD = _outer(gz_MSC, x_MSD)
            gx_MSD = gz_MSC @ down_CD if wants_x else None
        if gx_MSD is not None:
            gx_MSD = (gx_MSD + g_MSD if ctx.onto_itself else gx_MSD).to(x_dtype)
        return (
            gx_MSD,
            g_MSD.to(onto_dtype) if wants_onto else None,
            g_down_CD.to(down_CD.dtype),
            _sum_tokens(gz_MNC, down_C.dtype),
            g_conv,
            g_conv_C,
            g_up_DC.to(up_DC.dtype),
            _sum_tokens(g_MSD[:, 1:], up_D.dtype),
            None,
        )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the type that autocast casts to here; None if it is off, or if the device (meta) has none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _sum_tokens(a_MNa: Tensor, dtype: torch.dtype) -> Tensor:
    return a_MNa.sum(1, dtype=dtype).sum(0)  # one after the other: five times faster on a slice


def _outer(a_MSa: Tensor, b_MSb: Tensor) -> Tensor:
    """Return the sum of a's outer product with b over all tokens, [a, b]."""
    return a_MSa.flatten(0, 1).T @ b_MSb.flatten(0, 1)


class QuickGELU(torch.autograd.Function):
    """x * sigmoid(1.702 x), computed as silu(t) / 1.702 with t = 1.702 x, whose derivative is silu's at t.

    Plain autograd keeps two tensors of x's size; this keeps one, and rescales none in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        t = x * QUICK_GELU
        ctx.save_for_backward(t)
        return F.silu(t).mul_(1 / QUICK_GELU)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (t,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(g, t)


class Split(torch.autograd.Function):
    """Queries, keys and values, [M, heads, S, d] each, of [M, S, 3 D].

    The plain way, `view`, `permute` and `unbind`, copies the three gradients twice: together, then into place.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
        M, S, _ = qkv.shape
        return qkv.view(M, S, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        M, heads, S, d = gradients[0].shape
        out = gradients[0].new_empty(M, S, 3, heads, d)
        for number, g in enumerate(gradients):
            out[:, :, number] = g.transpose(1, 2)
        return out.view(M, S, -1), None
