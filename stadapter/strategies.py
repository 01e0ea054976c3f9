"""What is trained, and what stays as it was pretrained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from stadapter.config import Strategy

if TYPE_CHECKING:
    from stadapter.model import VideoClassifier


def uses_adapters(strategy: Strategy) -> bool:
    """Whether a model for this strategy carries adapters at all."""
    return strategy == "st_adapter"


def freeze(model: VideoClassifier, strategy: Strategy, train_final_norm: bool) -> None:
    """Set `requires_grad` of every parameter.

    - `st_adapter`: the adapters and the head; the backbone is frozen
    - `linear_probe`: the head
    - `full`: everything; the backbone's final norm is part of it

    `train_final_norm` adds the norm between the backbone and the head. An adapter that can never receive a gradient
    (`model.dead_adapters`) is not trained, whatever the strategy: an optimiser would only decay it.
    """
    trained: list[nn.Module]
    if strategy == "full":
        trained = [model]
    else:
        trained = [model.head]
        if strategy == "st_adapter":
            trained += [model.before, model.after]
        if train_final_norm:
            trained.append(model.vit.norm)
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    for adapter in model.dead_adapters():
        adapter.requires_grad_(False)
