"""The cost of a recipe: parameters and multiply-accumulates, counted on meta tensors, without weights.

Papers print multiply-accumulates as "GFLOPs". Counted are, per view (one clip of T frames, one crop):

    patch embedding   N * 3 p^2 * D                 per frame; p the patch size
    block             S * 3 D^2 + S * D^2           its query-key-value and output matrices; S = 1 + N tokens
                      2 * S^2 * D                   scores, and their product with the values
                      2 * S * D * D_mlp
    adapter           N * 2 D C + N * C * kT kH kW  two matrices and the depthwise convolution, patch tokens only
    head              D * K                         per clip

    adapt_cls         2 D C + C                     more per adapter and frame
    plain adapter     S * 2 D C                     per frame
    prompts           S + P instead of S in every block
    LoRA              S * 6 D r                     per block and frame: r * (D + 3 D) and r * (D + D)
    divided attention N * (5 D^2 + 2 T D)           per block and frame: attention over T frames, and one more map
    temporal block    as a block with T tokens      per clip
    attention pool    T S * (2 D^2 + 2 D) + D^2     per clip

A custom adapter or model (`stadapter.model.custom`) is counted by running it, as PyTorch counts its operators. The
formulas stand beside the modules, as `macs_per_view` or `macs_per_frame`.

Norms, biases, activations and softmax are not counted, as is usual. The model is counted as papers describe it, with
the last block's patches and an adapter after its attention, although this implementation skips what CLS cannot see.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stadapter.config import Recipe
from stadapter.model.build import meta_model
from stadapter.model.classifier import VideoClassifier, dead_parameters
from stadapter.model.state import trainable_parameters


@dataclass(frozen=True)
class Cost:
    """Parameter counts, and multiply-accumulates of one view.

    `trainable_params` receive gradients. `dead_params` are in adapters that never can: they are part of
    `adapter_params` and `total_params`, not of `trainable_params`.
    """

    trainable_params: int
    total_params: int
    dead_params: int
    adapter_params: int
    head_params: int
    macs_per_view: int

    @property
    def tunable_params(self) -> int:
        """The count that papers give, dead ones included (7.42 M for the authors' Kinetics-400 model)."""
        return self.trainable_params + self.dead_params


def cost_of(recipe: Recipe) -> Cost:
    """Return the cost of the recipe's model, reading no weights. Raises ConfigError if it cannot be built."""
    model = meta_model(recipe)
    return Cost(
        trainable_params=_count(trainable_parameters(model).values()),
        total_params=_count(model.parameters()),
        dead_params=dead_parameters(model),
        adapter_params=sum(_count(adapter.parameters()) for adapter in model.adapters()),
        head_params=_count(model.head.parameters()),
        macs_per_view=macs_per_view(model, recipe),
    )


def macs_per_view(model: VideoClassifier, recipe: Recipe) -> int:
    """Return the multiply-accumulates of one view; a custom model or adapter is counted by running it."""
    data, shape = recipe.data, model.vit.shape
    T = data.num_frames
    if recipe.own.model:
        return _executed_macs(model, torch.empty(1, T, 3, data.frame_size, data.frame_size, device="meta"))
    added = sum(part.macs_per_view(shape, T) for part in model.parts())
    head = shape.width * data.num_classes
    return T * shape.macs_per_image() + _macs_of_adapters(model, recipe) + added + head


def _macs_of_adapters(model: VideoClassifier, recipe: Recipe) -> int:
    T, shape, adapters = recipe.data.num_frames, model.vit.shape, model.adapters()
    if not recipe.own.adapter:
        return T * sum(adapter.macs_per_frame(shape.num_patches) for adapter in adapters)
    tokens_TSD = torch.empty(T, 1 + shape.num_patches, shape.width, device="meta")
    return T * (sum(_executed_macs(adapter, tokens_TSD, T) for adapter in adapters) // T)


def _executed_macs(module: nn.Module, *inputs: Any) -> int:
    """Return the multiply-accumulates of one call, as it is computed: custom code has no formula."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() // 2


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
