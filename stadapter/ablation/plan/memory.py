"""The memory that a training will take on a GPU, counted on meta tensors.

Exact are weights, gradients and optimiser. The tensors that autograd saves lie between two counts: autocast and the
attention kernels that a GPU chooses are somewhere between plain float32 and fused half precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from stadapter.config import Recipe
from stadapter.model.build import meta_model
from stadapter.model.cost import Cost

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Memory:
    """The bytes that a training takes on one device."""

    fixed: int  # weights, gradients, optimiser
    activations_most: int  # as float32, attention weights included
    activations_least: int  # all of them in the recipe's precision, by attention kernels that keep no weights

    def fits(self, capacity: float) -> str:
        """Say in words whether it fits into so many bytes."""
        if self.fixed + self.activations_most <= capacity:
            return "fits"
        return "may not fit" if self.fixed + self.activations_least <= capacity else "does not fit"


def memory_of(recipe: Recipe, cost: Cost, clips_per_pass: int, *, recompute: bool = False) -> Memory:
    """Return the memory of one process that trains on a GPU, with so many clips in a pass."""
    half = HALF.get(recipe.optim.precision)
    frozen = cost.total_params - cost.trainable_params
    fixed = frozen * (2 if half else 4) + cost.trainable_params * 16  # weight, gradient, two moments
    most = _saved_bytes(recipe, torch.float32, clips_per_pass, recompute)
    with _FusedAttention():
        least = _saved_bytes(recipe, half or torch.float32, clips_per_pass, recompute)
    return Memory(fixed, most, min(least, most))  # with few tokens the kernels keep no less


class _FusedAttention(TorchFunctionMode):
    """Attention as a GPU's kernels save it, without weights [M, heads, S, S]. Meta tensors alone would save those."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args
        if q.dtype == torch.float32:
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _saved_bytes(recipe: Recipe, dtype: torch.dtype, clips: int, recompute: bool) -> int:
    """Return the bytes that autograd saves in the blocks, without parameters: linear in the clips, so two suffice."""
    model = meta_model(recipe).to(dtype)
    model.recompute = recompute
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    T, side = recipe.data.num_frames, recipe.data.frame_size

    def saved(count: int) -> int:
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        pixels = torch.empty(count * T, 3, side, side, dtype=dtype, device="meta")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model.run_blocks(pixels, T)
            total = sum(storage.nbytes() for storage in kept.values())
        del out
        return total

    one, two = saved(1), saved(2)
    return one + (clips - 1) * (two - one)
