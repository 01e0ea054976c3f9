"""Trained models as files: safetensors with the trained tensors, and a header with the recipe, backbone and data.

    save("mine.safetensors", model, recipe, metrics={"top1": 67.1})    # trained.safetensors of a run is such a file
    model, header = load("runs/one/trained.safetensors")               # needs the backbone's weights, checks them
    load_into(vit, "mine.safetensors")                                 # into an existing model

The header holds the SHA-256 of the frozen weights in place of the weights: on another backbone the same adapters would
run and give meaningless results. A file may hold all weights instead, as converted checkpoints do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from stadapter.backbone.state_dicts import check_fit
from stadapter.config import ConfigError, Recipe, flatten, identity, unflatten
from stadapter.model.build import build_model
from stadapter.model.classifier import VideoClassifier
from stadapter.model.state import load_trainable_state, trainable_state
from stadapter.trials import files


@dataclass(frozen=True)
class Header:
    """The header of a model file. Every field may be missing."""

    recipe: Recipe | None = None
    backbone: str = ""  # its name
    frozen_sha256: str = ""  # `frozen_digest` of the model that was trained
    data: Mapping[str, Any] = field(default_factory=dict)  # {split: {"fingerprint": ..., "clips": ...}}
    metrics: Mapping[str, float] = field(default_factory=dict)
    class_names: Sequence[str] = ()


def frozen_digest(model: nn.Module) -> str:
    """Return the SHA-256 over names and values of the frozen parameters, as float32; "" if all are trained.

    Compute it before the weights are cast to half precision, which changes it.
    """
    frozen = sorted((name, p) for name, p in model.named_parameters() if not p.requires_grad)
    digest = hashlib.sha256()
    for name, parameter in frozen:
        digest.update(f"{name}\n".encode())
        digest.update(parameter.detach().float().contiguous().cpu().numpy().data)
    return digest.hexdigest() if frozen else ""


def save(
    file: str | Path,
    model: nn.Module,
    recipe: Recipe | None = None,
    *,
    backbone: str = "",
    frozen_sha256: str | None = None,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    class_names: Sequence[str] = (),
) -> None:
    """Write the trained parameters of a model (`requires_grad`) to a file, atomically.

    A file without a recipe, as of a ViT with added adapters, is for `load_into`; `load` needs the recipe.
    `frozen_sha256` is computed unless given. Raises files.WriteError if the file cannot be written.
    """
    digest = frozen_digest(model) if frozen_sha256 is None else frozen_sha256
    header = Header(recipe, backbone, digest, data or {}, metrics or {}, class_names)
    write(Path(file), trainable_state(model), header)


def write(file: Path, state: Mapping[str, Tensor], header: Header) -> None:
    """Write a model file with the given tensors: all tensors of a model, or the trained ones."""
    fields: dict[str, Any] = {f.name: getattr(header, f.name) for f in dataclasses.fields(header) if f.name != "recipe"}
    if header.recipe is not None:
        fields |= {"recipe": flatten(header.recipe), "backbone": header.recipe.backbone.name}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items() if value}
    if header.recipe is not None:
        texts["trial_id"] = identity(header.recipe)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    files.write_atomically(file, safetensors_bytes(tensors, texts))


def read(file: str | Path) -> tuple[dict[str, Tensor], Header]:
    """Return the tensors and the header of a model file. Raises ConfigError if the file is not one."""
    try:
        with safe_open(file, "pt") as opened:
            texts = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dictionary
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise ConfigError(f"{file}: is not a complete safetensors file ({error})") from None
    try:
        header = Header(
            recipe=unflatten(json.loads(texts["recipe"])) if "recipe" in texts else None,
            backbone=texts.get("backbone", ""),
            frozen_sha256=texts.get("frozen_sha256", ""),
            **{name: json.loads(texts[name]) for name in ("data", "metrics", "class_names") if name in texts},
        )
    except ValueError as error:  # ConfigError too: a recipe of another version
        raise ConfigError(f"{file}: its header cannot be read ({error})") from None
    return state, header


def load(
    file: str | Path, *, weights_file: Path | None = None, device: torch.device | str = "cpu"
) -> tuple[VideoClassifier, Header]:
    """Return the model that the file was saved from, for inference (`eval`), and the header.

    The backbone comes from its library's hub or from `weights_file`, unless the file holds it. Raises ConfigError if
    the backbone is another one than in training, or if the file has no recipe.
    """
    state, header = read(file)
    if header.recipe is None:
        raise ConfigError(f"{file}: has no recipe in its header; build the model, and use load_into(model, file)")
    if is_complete(state):
        if weights_file is not None:
            raise ConfigError(f"--weights {weights_file}: {file} holds the backbone's weights itself; leave it out")
        model = build_complete(header.recipe, state, str(file))
    else:
        model = build_model(header.recipe, weights_file=weights_file)
        _check_backbone(model, header, str(file))
        _load_trained(model, state, str(file))
    return model.eval().to(device), header


def load_into(model: nn.Module, file: str | Path) -> Header:
    """Copy a file's tensors into a model with the same trained parameters, and return the header.

    Raises ConfigError if the tensors do not fit or were trained on another backbone.
    """
    state, header = read(file)
    _check_backbone(model, header, str(file))
    _load_trained(model, state, str(file))
    return header


def is_complete(state: Mapping[str, Tensor]) -> bool:
    """Return True if a `VideoClassifier`'s tensors include its whole backbone, trained or frozen."""
    return {"vit.cls_token", "vit.norm.weight", "head.weight"} <= state.keys() and any(
        name.startswith("vit.blocks.0.") for name in state
    )


def build_complete(recipe: Recipe, state: Mapping[str, Tensor], source: str) -> VideoClassifier:
    """Return the recipe's model with all its weights from `state`. Raises ConfigError if they do not fit."""
    seeded = dataclasses.replace(recipe, backbone=dataclasses.replace(recipe.backbone, weights="seed:0"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning about dead adapters: nothing is trained here
        model = build_model(seeded)
    check_fit(state, model.state_dict(), source, "is it of another recipe?")
    model.load_state_dict(dict(state))
    return model


def _check_backbone(model: nn.Module, header: Header, file: str) -> None:
    if not header.frozen_sha256:
        if any(not parameter.requires_grad for parameter in model.parameters()):
            warnings.warn(f"{file}: does not say which backbone weights it was trained on: unchecked", stacklevel=3)
        return
    found = frozen_digest(model)
    if found != header.frozen_sha256:
        name = f" ({header.backbone})" if header.backbone else ""
        raise ConfigError(
            f"{file}: was trained on other frozen weights{name}: theirs have SHA-256 {header.frozen_sha256[:12]}, "
            f"these {found[:12] or 'none'}; give the backbone that it was trained on (--weights FILE)"
        )


def _load_trained(model: nn.Module, state: Mapping[str, Tensor], file: str) -> None:
    try:
        load_trainable_state(model, state)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
