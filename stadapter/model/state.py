"""The trained tensors of a model by name, for an optimiser, a checkpoint or a file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stadapter.backbone.state_dicts import check_fit


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that are trained, by name, detached and not copied: what a checkpoint needs."""
    return {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}


def load_trainable_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a `trainable_state` into the model. Raises ConfigError unless names and shapes are exactly the model's."""
    parameters = trainable_parameters(model)
    check_fit(state, parameters, "the checkpoint is of another model", "use the recipe it was made with")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
