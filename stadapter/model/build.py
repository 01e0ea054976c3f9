"""The way from a recipe to its model: read the backbone's weights, add the parts, freeze the rest."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from stadapter.backbone.load import load_backbone
from stadapter.backbone.vit import ViT
from stadapter.config import BaselineConfig, ConfigError, Recipe, Strategy
from stadapter.model.classifier import Triple, VideoClassifier, code, seeded
from stadapter.model.custom import load as load_custom
from stadapter.model.state import trainable_parameters
from stadapter.strategies import STRATEGIES


def build_model(
    recipe: Recipe, *, weights_file: Path | None = None, device: torch.device | str = "cpu"
) -> VideoClassifier:
    """Return the recipe's model, float32, frozen as its strategy says; on device "meta" without any weights.

    Raises ConfigError if the model cannot be built.
    """
    data = recipe.data
    vit, backbone = load_backbone(recipe.backbone, data.frame_size, weights_file=weights_file, device=device)
    # On the CPU also for a GPU: its random numbers are the same everywhere.
    with torch.device("meta" if torch.device(device).type == "meta" else "cpu"):
        make = _custom_model if recipe.own.model else classifier
        return make(recipe, vit, backbone.mean, backbone.std).to(device)


def meta_model(recipe: Recipe) -> VideoClassifier:
    """Return the recipe's model without weights, to count on. Raises ConfigError if it cannot be built."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about dead adapters: a training warns of them when it builds the model
        return build_model(recipe, device="meta")


def classifier(
    recipe: Recipe, vit: ViT, mean: Triple, std: Triple, kind: type[VideoClassifier] | None = None
) -> VideoClassifier:
    """Return the recipe's model around this backbone, frozen as its strategy says.

    `kind` is a class derived from `VideoClassifier`, by default the one that the strategy's row names, if any.
    """
    own, row = recipe.own, STRATEGIES[recipe.strategy]
    model = (kind or (code(row.model) if row.model else VideoClassifier))(
        vit,
        recipe.data.num_classes,
        recipe.adapter,
        recipe.seed,
        mean,
        std,
        strategy=recipe.strategy,
        rival=recipe.rival,
        num_frames=recipe.data.num_frames,
        custom_adapter=load_custom(own, own.adapter) if own.adapter else None,
    )
    freeze(model, recipe.strategy, recipe.train_final_norm, recipe.rival)
    return model


def _custom_model(recipe: Recipe, vit: ViT, mean: Triple, std: Triple) -> VideoClassifier:
    name = recipe.own.model
    with seeded(recipe.seed, f"init/{name}"):
        model = load_custom(recipe.own, name)(recipe, vit, mean, std)
    if not isinstance(model, VideoClassifier):
        raise ConfigError(
            f"own.model = {name}: returned {type(model).__name__}, not a stadapter.model.classifier.VideoClassifier"
        )
    if not trainable_parameters(model):
        raise ConfigError(f"own.model = {name}: nothing in it is trained; set requires_grad of what should be")
    return model


def freeze(
    model: VideoClassifier, strategy: Strategy, train_final_norm: bool, rival: BaselineConfig | None = None
) -> None:
    """Set `requires_grad` of every parameter: train the strategy's parts, and its share of the backbone.

    Everything beside the backbone is a part if the strategy's row names a class of its own. Else the parts are those of
    `model.trained_parts()`: what only a custom class knows stays frozen.

    `train_final_norm` adds the norm between the backbone and the head. An adapter that can never receive a gradient
    (`model.dead_adapters`) is not trained, whatever the strategy: an optimiser would only decay it.
    Raises ConfigError if more blocks are to be trained than there are.
    """
    model.requires_grad_(bool(STRATEGIES[strategy].model))
    model.vit.requires_grad_(False)
    for module in model.trained_parts():
        module.requires_grad_(True)
    for part in _trained_of_backbone(model.vit, strategy, rival or BaselineConfig()):
        part.requires_grad_(True)
    if train_final_norm:
        model.vit.norm.requires_grad_(True)
    for adapter in model.dead_adapters():
        adapter.requires_grad_(False)


def _trained_of_backbone(vit: ViT, strategy: Strategy, rival: BaselineConfig) -> list[nn.Module | nn.Parameter]:
    match STRATEGIES[strategy].backbone:
        case "nothing":
            return []
        case "biases":
            return [parameter for name, parameter in vit.named_parameters() if name.endswith("bias")]
        case "last blocks":
            depth = len(vit.blocks)
            if rival.partial_blocks > depth:
                raise ConfigError(f"rival.partial_blocks = {rival.partial_blocks}: the backbone has {depth} blocks")
            return list(vit.blocks[depth - rival.partial_blocks :])
        case "all":
            return [vit]


def cast_frozen(model: VideoClassifier, dtype: torch.dtype) -> None:
    """Store the frozen matrices in `dtype`, as the paper does on GPUs; then run the model under autocast to `dtype`.

    This takes half the memory, and saves a cast at every step. What is trained stays in float32, and so do the frozen
    norms and embeddings (1 % of the weights), which autocast wants in float32 anyway.
    """
    for module in model.vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
