"""From a recipe to its model, with the backbone's weights read and everything frozen that is not trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from stadapter.backbone.load import load_backbone
from stadapter.backbone.vit import ViT
from stadapter.config import ConfigError, Recipe
from stadapter.model.classifier import Triple, VideoClassifier, _seeded
from stadapter.model.custom import load as load_own
from stadapter.model.state import trainable_parameters
from stadapter.model.strategies import freeze, uses_adapters


def build_model(
    recipe: Recipe, *, weights_file: Path | None = None, device: torch.device | str = "cpu"
) -> VideoClassifier:
    """The recipe's model, frozen as its strategy says, float32; on device "meta" without any weights. ConfigError."""
    data = recipe.data
    vit, backbone = load_backbone(recipe.backbone, data.frame_size, weights_file=weights_file, device=device)
    # On the CPU also for a GPU: its random numbers are the same everywhere.
    with torch.device("meta" if torch.device(device).type == "meta" else "cpu"):
        make = _own_model if recipe.own.model else classifier
        return make(recipe, vit, backbone.mean, backbone.std).to(device)


def classifier(
    recipe: Recipe, vit: ViT, mean: Triple, std: Triple, kind: type[VideoClassifier] | None = None
) -> VideoClassifier:
    """The recipe's model around this backbone, frozen as its strategy says; of a derived class where one is given."""
    own = recipe.own
    model = (kind or VideoClassifier)(
        vit,
        recipe.data.num_classes,
        recipe.adapter if uses_adapters(recipe.strategy) else None,
        recipe.seed,
        mean,
        std,
        strategy=recipe.strategy,
        rival=recipe.rival,
        num_frames=recipe.data.num_frames,
        own_adapter=load_own(own, own.adapter) if own.adapter else None,
    )
    freeze(model, recipe.strategy, recipe.train_final_norm, recipe.rival)
    return model


def _own_model(recipe: Recipe, vit: ViT, mean: Triple, std: Triple) -> VideoClassifier:
    name = recipe.own.model
    with _seeded(recipe.seed, f"init/{name}"):
        model = load_own(recipe.own, name)(recipe, vit, mean, std)
    if not isinstance(model, VideoClassifier):
        raise ConfigError(
            f"own.model = {name}: returned {type(model).__name__}, not a stadapter.model.classifier.VideoClassifier"
        )
    if not trainable_parameters(model):
        raise ConfigError(f"own.model = {name}: nothing in it is trained; set requires_grad of what should be")
    return model


def cast_frozen(model: VideoClassifier, dtype: torch.dtype) -> None:
    """Store the frozen matrices in `dtype`, as the paper does on GPUs; then run the model under autocast to `dtype`.

    Half the memory, and no cast at every step. What is trained stays in float32, and so do the frozen norms and
    embeddings (1 % of the weights), which autocast wants in float32 anyway.
    """
    for module in model.vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
