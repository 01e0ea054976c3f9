"""What a recipe costs: parameters and multiply-accumulates, counted on meta tensors, without weights.

Papers print multiply-accumulates as "GFLOPs". Counted, per view (one clip of T frames, one crop):

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

An adapter or a model of somebody's own (`stadapter.model.custom`) is counted by running it, as PyTorch counts its
operators.

Norms, biases, activations and softmax are not, as is usual. Counted is the model as papers describe it: whole, with
the last block's patches and an adapter after its attention, although this implementation skips what CLS cannot see.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stadapter.backbone.vit import VitShape
from stadapter.config import AdapterConfig, Recipe
from stadapter.model.build import build_model
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
        """As papers count: dead ones too (7.42 M for the authors' Kinetics-400 model)."""
        return self.trainable_params + self.dead_params


def cost_of(recipe: Recipe) -> Cost:
    """ConfigError if the recipe's model cannot be built; no weights are read."""
    model = meta_model(recipe)
    return Cost(
        trainable_params=_count(trainable_parameters(model).values()),
        total_params=_count(model.parameters()),
        dead_params=dead_parameters(model),
        adapter_params=sum(_count(adapter.parameters()) for adapter in model.adapters()),
        head_params=_count(model.head.parameters()),
        macs_per_view=macs_per_view(model, recipe),
    )


def meta_model(recipe: Recipe) -> VideoClassifier:
    """The recipe's model without weights, to count on. ConfigError if it cannot be built."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about dead adapters: whoever builds the model to use it is told
        return build_model(recipe, device="meta")


def macs_per_view(model: VideoClassifier, recipe: Recipe) -> int:
    if recipe.own.model:
        side = recipe.data.frame_size
        return _executed_macs(model, torch.empty(1, recipe.data.num_frames, 3, side, side, device="meta"))
    shape, T, rival = model.vit.shape, recipe.data.num_frames, recipe.rival
    N, S, D = shape.num_patches, 1 + shape.num_patches, shape.width
    per_frame = vit_macs(shape, prompts=rival.prompts if model.prompts else 0)
    if recipe.own.adapter:
        per_frame += (
            sum(_executed_macs(adapter, torch.empty(T, S, D, device="meta"), T) for adapter in model.adapters()) // T
        )
    else:
        per_frame += len(model.adapters()) * adapter_macs(N, D, recipe.adapter, plain=recipe.strategy == "adapter")
    per_frame += len(model.lora) * S * 6 * D * rival.lora_rank
    if model.time is not None:
        per_frame += shape.depth * N * (5 * D * D + 2 * T * D)
    per_clip = D * recipe.data.num_classes
    if model.temporal is not None:
        per_clip += rival.temporal_blocks * block_macs(T, D, shape.mlp_width)
    if model.pool is not None:
        per_clip += T * S * (2 * D * D + 2 * D) + D * D
    return T * per_frame + per_clip


def _executed_macs(module: nn.Module, *inputs: Any) -> int:
    """Of one call, as it is computed: what cannot be counted by formula because its code is not in the package."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() // 2


def vit_macs(shape: VitShape, prompts: int = 0) -> int:
    """Of one image."""
    N, D = shape.num_patches, shape.width
    embedding = N * 3 * shape.patch_size**2 * D
    return embedding + shape.depth * block_macs(1 + N + prompts, D, shape.mlp_width)


def block_macs(tokens: int, width: int, mlp_width: int) -> int:
    return 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp_width


def adapter_macs(num_patches: int, width: int, adapter: AdapterConfig, *, plain: bool = False) -> int:
    """Of one adapter, for one frame."""
    matrices = 2 * width * adapter.bottleneck_width
    if plain:
        return (1 + num_patches) * matrices
    cls = matrices + adapter.bottleneck_width if adapter.adapt_cls else 0
    return num_patches * (matrices + adapter.bottleneck_width * math.prod(adapter.kernel_size)) + cls


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
