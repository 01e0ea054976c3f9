"""The names of the authors' published checkpoints, translated to ours and back.

Theirs are OpenAI CLIP's names for the backbone, plus `adapter_pre_attn` and `adapter_pre_mlp` inside the blocks
(`before` and `after` multi-head self-attention here) and `fc` for the head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from stadapter.backbone.state_dicts import from_open_clip, to_open_clip

_ADAPTER = re.compile(
    r"transformer\.resblocks\.(\d+)\.(adapter_pre_attn|adapter_pre_mlp)\.(fc1|conv|fc2)\.(weight|bias)"
)
_PLACES = {"adapter_pre_attn": "before", "adapter_pre_mlp": "after"}
_LAYERS = {"fc1": "down", "conv": "conv", "fc2": "up"}


def from_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of the authors' model, whole or in part, under the names of `VideoClassifier`."""
    ours: dict[str, Tensor] = {}
    backbone: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := _ADAPTER.fullmatch(name):
            block, place, layer, kind = match.groups()
            ours[f"{_PLACES[place]}.{block}.{_LAYERS[layer]}.{kind}"] = tensor
        elif name in ("fc.weight", "fc.bias"):
            ours[f"head.{name[3:]}"] = tensor
        else:
            backbone[name] = tensor
    return ours | {f"vit.{name}": tensor for name, tensor in from_open_clip(backbone).items()}


def to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_authors`."""
    places = {ours: theirs for theirs, ours in _PLACES.items()}
    layers = {ours: theirs for theirs, ours in _LAYERS.items()}
    theirs: dict[str, Tensor] = {}
    backbone: dict[str, Tensor] = {}
    for name, tensor in state.items():
        group, _, rest = name.partition(".")
        if group in places:
            block, layer, kind = rest.split(".")
            theirs[f"transformer.resblocks.{block}.{places[group]}.{layers[layer]}.{kind}"] = tensor
        elif group == "head":
            theirs[f"fc.{rest}"] = tensor
        else:
            backbone[rest] = tensor
    return theirs | to_open_clip(backbone)
