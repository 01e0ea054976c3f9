"""What a recipe costs: parameters and multiply-accumulates, counted on meta tensors, without weights.

Papers print multiply-accumulates as "GFLOPs". Counted, per view (one clip of T frames, one crop):

    patch embedding   N * 3 p^2 * D                 per frame; p the patch size
    block             S * 3 D^2 + S * D^2           its query-key-value and output matrices; S = 1 + N tokens
                      2 * S^2 * D                   scores, and their product with the values
                      2 * S * D * D_mlp
    adapter           N * 2 D C + N * C * kT kH kW  two matrices and the depthwise convolution, patch tokens only
    head              D * K                         per clip

Norms, biases, activations and softmax are not, as is usual. Counted is the model as papers describe it: whole, with
the last block's patches and an adapter after its attention, although this implementation skips what CLS cannot see.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from stadapter.config import Recipe
from stadapter.model import VideoClassifier, build_model, dead_parameters, trainable_parameters
from stadapter.vit import VitShape


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about dead adapters: whoever builds the model to use it is told
        model = build_model(recipe, device="meta")
    return Cost(
        trainable_params=_count(trainable_parameters(model).values()),
        total_params=_count(model.parameters()),
        dead_params=dead_parameters(model),
        adapter_params=_count(model.before.parameters()) + _count(model.after.parameters()),
        head_params=_count(model.head.parameters()),
        macs_per_view=macs_per_view(model, recipe),
    )


def macs_per_view(model: VideoClassifier, recipe: Recipe) -> int:
    shape = model.vit.shape
    num_adapters = len(model.before) + len(model.after)
    per_frame = vit_macs(shape) + num_adapters * adapter_macs(
        shape.num_patches, shape.width, recipe.adapter.bottleneck_width, recipe.adapter.kernel_size
    )
    return recipe.data.num_frames * per_frame + shape.width * recipe.data.num_classes


def vit_macs(shape: VitShape) -> int:
    """Of one image."""
    N, S, D = shape.num_patches, 1 + shape.num_patches, shape.width
    embedding = N * 3 * shape.patch_size**2 * D
    block = 4 * S * D * D + 2 * S * S * D + 2 * S * D * shape.mlp_width
    return embedding + shape.depth * block


def adapter_macs(num_patches: int, width: int, bottleneck_width: int, kernel_size: tuple[int, int, int]) -> int:
    """Of one adapter, for one frame."""
    return num_patches * bottleneck_width * (2 * width + math.prod(kernel_size))


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
