"""What is trained in a model, as tensors by name: for an optimiser, a checkpoint or a file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stadapter.config import ConfigError


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an optimiser is given, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of the training needs, by name: detached, not copied."""
    return {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}


def load_trainable_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The inverse of `trainable_state`, in place. ConfigError unless names and shapes are exactly the model's."""
    parameters = trainable_parameters(model)
    missing, unexpected = sorted(parameters.keys() - state.keys()), sorted(state.keys() - parameters.keys())
    if missing or unexpected:
        raise ConfigError(
            f"the checkpoint is of another model: it lacks {_some(missing)}, and has {_some(unexpected)} "
            "that the model does not train; use the recipe it was made with"
        )
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise ConfigError(
                f"the checkpoint is of another model: {name} is {list(state[name].shape)}, but the model's is "
                f"{list(parameter.shape)}; use the recipe it was made with"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
