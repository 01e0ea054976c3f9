"""The strategies: what is added to the image model, what of it is trained, and at which rates. One row each.

A new strategy is a row here and, if it adds anything, one module in `stadapter/model/`: names, help texts, building,
freezing, counting and rates follow from these two. The row names a class as text, "file.Class" in `stadapter.model`,
because a command that only needs names and rates must not load PyTorch. The class says how it is built and its cost:

- `adapter` is built in every place and block that `recipe.adapter` names: `from_config(width, adapter)` makes one,
  `forward` is as `STAdapter.forward`, and `macs_per_frame(num_patches)` counts one.
- `adds` is built once: `build(vit, sizes, num_frames, seeded)` makes it, `macs_per_view(shape, num_frames)` counts it,
  and `part` is its name in the model, which decides where the model calls it (see `stadapter.model.classifier`).
- `model` is for what fits neither: a class derived from `VideoClassifier` that overrides `block` or another step.

All that is added is trained, and so is the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BackbonePart = Literal["nothing", "biases", "last blocks", "all"]


@dataclass(frozen=True)
class StrategyRow:
    """One strategy. Rates are in units of what the recipe gives ST-Adapter."""

    adapter: str = ""
    adds: str = ""
    model: str = ""
    backbone: BackbonePart = "nothing"  # what of the image model is trained
    rate: float = 1.0
    backbone_rate: float = 1.0
    final_norm: bool = True  # False: not trained, whatever the recipe says


STRATEGIES: dict[str, StrategyRow] = {
    "linear_probe": StrategyRow(final_norm=False),
    "attentional_pooling": StrategyRow(adds="baselines.AttentionPool", rate=1 / 4),
    "prompt": StrategyRow(adds="baselines.Prompts"),
    "partial": StrategyRow(backbone="last blocks", backbone_rate=1 / 16),
    "temporal": StrategyRow(adds="baselines.TemporalTransformer", rate=1 / 4),
    "bitfit": StrategyRow(backbone="biases", backbone_rate=1 / 2, final_norm=False),
    "lora": StrategyRow(adds="baselines.LoRA", rate=1 / 2),
    "adapter": StrategyRow(adapter="baselines.PlainAdapter", rate=1 / 4),
    "st_adapter": StrategyRow(adapter="adapter.STAdapter"),
    "full": StrategyRow(backbone="all", backbone_rate=3 / 80),
    "full_space_time": StrategyRow(adds="baselines.DividedAttention", backbone="all", rate=1 / 2, backbone_rate=3 / 40),
    "full_st_adapter": StrategyRow(adapter="adapter.STAdapter", backbone="all", backbone_rate=3 / 80),
}
