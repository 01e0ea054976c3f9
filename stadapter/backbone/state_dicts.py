"""Weight files of vision transformers: the names that timm, open_clip and OpenAI give to tensors, and ours."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stadapter.config import ConfigError, first_line

# ours -> theirs, outside and inside the blocks
_OPEN_CLIP = {
    "patch_embed": "conv1",
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "norm_pre": "ln_pre",
    "norm": "ln_post",
}
_OPEN_CLIP_BLOCK = {
    "norm1": "ln_1",
    "qkv.weight": "attn.in_proj_weight",
    "qkv.bias": "attn.in_proj_bias",
    "proj": "attn.out_proj",
    "norm2": "ln_2",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
    "scale1": "ls_1.gamma",
    "scale2": "ls_2.gamma",
}
_TIMM = {"patch_embed": "patch_embed.proj"}
_TIMM_BLOCK = {
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "scale1": "ls1.gamma",
    "scale2": "ls2.gamma",
}


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a timm ViT's state under our names, without its classifier."""
    ours = _rename(state, "blocks", "blocks", _invert(_TIMM), _invert(_TIMM_BLOCK))
    ours = {name: tensor for name, tensor in ours.items() if not name.startswith("head.")}
    if "cls_token" in ours:
        ours["cls_token"] = ours["cls_token"].flatten()
    if "pos_embed" in ours:
        pos_embed = ours["pos_embed"].flatten(0, 1)
        if math.isqrt(len(pos_embed)) ** 2 == len(pos_embed):  # DeiT III gives CLS no position
            pos_embed = torch.cat([torch.zeros_like(pos_embed[:1]), pos_embed])
        ours["pos_embed"] = pos_embed
    return ours


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the image tower of an open_clip or OpenAI CLIP state, whole or by itself, under our names.

    The projection into the space shared with text is dropped: the paper's classifier reads the tokens before it.
    """
    if any(name.startswith("visual.") for name in state):
        state = {name.removeprefix("visual."): tensor for name, tensor in state.items() if name.startswith("visual.")}
    state = {name: tensor for name, tensor in state.items() if name != "proj"}
    return _rename(state, "transformer.resblocks", "blocks", _invert(_OPEN_CLIP), _invert(_OPEN_CLIP_BLOCK))


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state of ours under the names of an open_clip image tower by itself."""
    return _rename(state, "blocks", "transformer.resblocks", _OPEN_CLIP, _OPEN_CLIP_BLOCK)


def read_state(file: Path) -> dict[str, Tensor]:
    """Return a ViT's weights from a file, under our names; the names in the file tell which of three layouts it has.

    Reads safetensors, what `torch.save` wrote, and the TorchScript archives that OpenAI published CLIP as.
    Raises ConfigError if the file cannot be read, is of another kind, or has another layout.
    """
    state = read_tensors(file)
    names = "\n".join(state)
    if re.search(r"^blocks\.\d+\.fc1\.weight$", names, re.MULTILINE):
        ours = state
    elif re.search(r"^blocks\.\d+\.mlp\.fc1\.weight$", names, re.MULTILINE):
        ours = from_timm(state)
    elif re.search(r"^(visual\.)?transformer\.resblocks\.\d+\.mlp\.c_fc\.weight$", names, re.MULTILINE):
        ours = from_open_clip(state)
    else:
        raise ConfigError(
            f"{file}: its tensors are named like '{min(state, default='')}', not as in timm's, open_clip's "
            "or OpenAI CLIP's vision transformers; take the file from one of those"
        )
    if "pos_embed" not in ours:
        raise ConfigError(f"{file}: has no position embeddings, so it is not a plain vision transformer's")
    return ours


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of such a file under the names they have there. Raises ConfigError as `read_state` does."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = _unpickle(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise ConfigError(f"{file}: is not a complete safetensors file ({error})") from None
    for key in ("state_dict", "model"):  # as training scripts wrap it
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ConfigError(f"{file}: holds a {type(content).__name__}, not a dictionary of tensors")
    return _strip("module.", {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)})


def check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str, hint: str) -> None:
    """Raise ConfigError unless the state has exactly the names and shapes of the tensors that a model expects."""
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        raise ConfigError(
            f"{source}: lacks {some_of(missing)}, and has {some_of(unknown)} that the model does not take; {hint}"
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise ConfigError(
                f"{source}: {name} is {list(state[name].shape)}, but the model's is {list(tensor.shape)}; {hint}"
            )


def some_of(names: list[str]) -> str:
    """Return up to three names, and how many more there are."""
    shown = ", ".join(names[:3]) or "nothing"
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _unpickle(file: Path) -> Any:
    """Return what a pickle holds, tensors only: one that wants to run code is refused."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many kinds; TorchScript archives are one of them
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated; the archives remain
                return torch.jit.load(str(file), map_location="cpu").state_dict()
        except RuntimeError:
            raise ConfigError(
                f"{file}: is not a file of weights that can be read safely ({first_line(error)})"
            ) from None


def _strip(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if all(name.startswith(prefix) for name in state):
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _invert(names: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}


def _rename(
    state: Mapping[str, Tensor], blocks: str, new_blocks: str, names: Mapping[str, str], block_names: Mapping[str, str]
) -> dict[str, Tensor]:
    """Translate `<blocks>.<i>.<name>` by `block_names` and the rest by `names`; what neither knows keeps its name."""
    renamed = {}
    for name, tensor in state.items():
        if match := re.fullmatch(rf"{re.escape(blocks)}\.(\d+)\.(.+)", name):
            renamed[f"{new_blocks}.{match[1]}.{_translate(match[2], block_names)}"] = tensor
        else:
            renamed[_translate(name, names)] = tensor
    return renamed


def _translate(name: str, names: Mapping[str, str]) -> str:
    """Return the name by the entry that equals it, or that equals it without its `.weight` or `.bias`."""
    if name in names:
        return names[name]
    stem, _, kind = name.rpartition(".")
    return f"{names[stem]}.{kind}" if stem in names else name
