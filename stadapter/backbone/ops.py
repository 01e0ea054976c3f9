"""Operations with backward passes of their own, which keep less or compute less than PyTorch's would.

Each equals a plain expression in value and gradients, to rounding. The plain one stands where these are called
(`adapter.py`, `vit.py`): it serves inference, compilation and export, and the tests hold both together.

Shapes: M = B * T images, S = 1 + N tokens per image (CLS first), D width, C bottleneck width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

QUICK_GELU = 1.702

# (bottleneck [M, N, C], weight, bias) -> [M, N, C]: the convolution, and what stands between it and the way up.
Middle = Callable[[Tensor, Tensor, Tensor], Tensor]


def wanted(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may come, and the code runs as it stands: compilers plan a graph's memory themselves."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    )


class Adapt(torch.autograd.Function):
    """onto + up(middle(down(x))) for the patches; CLS is onto's. `onto_MSD` None means x itself.

    Plain autograd keeps x, the bottleneck and what `up` reads. This keeps x and the bottleneck, and computes the middle
    again: two per cent of an adapter's time for a temporal kernel, too much for one with spatial extent.
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
    """What autocast casts to in this place; None where it is off, or the device (meta) knows none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _sum_tokens(a_MNa: Tensor, dtype: torch.dtype) -> Tensor:
    return a_MNa.sum(1, dtype=dtype).sum(0)  # one after the other: five times faster on a slice


def _outer(a_MSa: Tensor, b_MSb: Tensor) -> Tensor:
    """The sum over all tokens of a's outer product with b."""
    return a_MSa.flatten(0, 1).T @ b_MSb.flatten(0, 1)


class QuickGELU(torch.autograd.Function):
    """x * sigmoid(1.702 x). Plain autograd keeps two tensors of x's size; this keeps one, and rescales none on the way
    back: as silu(t) / 1.702 with t = 1.702 x, its derivative is silu's at t."""

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
    """Queries, keys and values, [M, heads, S, d] each, of [M, S, 3 D]: `view`, `permute` and `unbind`, whose backward
    pass copies the three gradients twice, together and then into place."""

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


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`F.scaled_dot_product_attention`, its small matrix products left to PyTorch's default library on a CPU, forwards
    and backwards: oneDNN, which may be chosen for the large ones (`machine.set_fast_float32`), takes several times as
    long over them."""
    if torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v)
    if wanted(q, k, v):
        return _Attention.apply(q, k, v)
    with _default_products():
        return F.scaled_dot_product_attention(q, k, v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with _default_products(), torch.enable_grad():
            ctx.inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
            ctx.result = F.scaled_dot_product_attention(*ctx.inputs)
        return ctx.result.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        with _default_products():
            return torch.autograd.grad(ctx.result, ctx.inputs, g, retain_graph=True)


@contextlib.contextmanager
def _default_products() -> Iterator[None]:
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
