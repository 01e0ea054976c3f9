"""What is trained, and what stays as it was pretrained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from stadapter.config import BaselineConfig, ConfigError, Strategy

if TYPE_CHECKING:
    from stadapter.model.classifier import VideoClassifier


def uses_adapters(strategy: Strategy) -> bool:
    """Whether a model for this strategy carries adapters at all: ST-Adapters, or plain ones."""
    return strategy in ("st_adapter", "adapter", "full_st_adapter")


def freeze(
    model: VideoClassifier, strategy: Strategy, train_final_norm: bool, rival: BaselineConfig | None = None
) -> None:
    """Set `requires_grad` of every parameter. The head is always trained; besides it

    - `linear_probe`: nothing
    - `attentional_pooling`: a query that attends to the tokens of all frames
    - `prompt`: learned tokens in every block
    - `partial`: the last `rival.partial_blocks` blocks
    - `temporal`: a transformer over the frames' CLS
    - `bitfit`: the backbone's biases
    - `lora`: low-rank changes of its attention matrices
    - `adapter`, `st_adapter`: the adapters
    - `full`: the whole backbone
    - `full_space_time`: the whole backbone, and attention over time in every block
    - `full_st_adapter`: the whole backbone, and ST-Adapters

    `train_final_norm` adds the norm between the backbone and the head. An adapter that can never receive a gradient
    (`model.dead_adapters`) is not trained, whatever the strategy: an optimiser would only decay it.
    ConfigError if more blocks are asked for than there are.
    """
    model.requires_grad_(False)
    for module in _trained_modules(model, strategy, rival or BaselineConfig()):
        module.requires_grad_(True)
    if strategy == "bitfit":
        for name, parameter in model.vit.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    if train_final_norm:
        model.vit.norm.requires_grad_(True)
    for adapter in model.dead_adapters():
        adapter.requires_grad_(False)


def _trained_modules(model: VideoClassifier, strategy: Strategy, rival: BaselineConfig) -> list[nn.Module]:
    """The modules that are trained as a whole."""
    if strategy in ("full", "full_space_time", "full_st_adapter"):
        return [model]
    added = [*model.adapters(), *model.lora, model.prompts, model.temporal, model.pool]
    trained = [model.head, *(module for module in added if module is not None)]
    if strategy == "partial":
        depth = len(model.vit.blocks)
        if rival.partial_blocks > depth:
            raise ConfigError(f"rival.partial_blocks = {rival.partial_blocks}: the backbone has {depth} blocks")
        trained += model.vit.blocks[depth - rival.partial_blocks :]
    return trained
