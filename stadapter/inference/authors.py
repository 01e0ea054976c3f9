"""Checkpoints of the authors' published code, as files of this package and back.

    theirs, .pth             {"model": their names -> tensors}; what is frozen in half precision, or left out
    ours, .safetensors       every weight in float32 under our names, and a recipe in the header

Their training leaves out what it does not train, and loads CLIP's weights, rounded to half precision, in its place; so
does reading such a file here. The shapes of the tensors give the recipe's fields about the model. They say nothing
about data and sampling: those fields come from the recipe that is named, or that the number of classes points to.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stadapter import config, recipes
from stadapter.backbone.load import describe_backbone, load_backbone
from stadapter.backbone.state_dicts import from_open_clip, read_tensors, to_open_clip
from stadapter.config import ConfigError, Placement, Recipe
from stadapter.model import model_file
from stadapter.model.classifier import VideoClassifier
from stadapter.trials import files

_DATASETS = {174: "ssv2", 400: "kinetics400"}  # by number of classes
_BACKBONES = {768: "clip_b16", 1024: "clip_l14"}  # by width
_PLACEMENTS: dict[tuple[str, ...], Placement] = {
    ("before",): "before_mhsa",
    ("after",): "after_mhsa",
    ("after", "before"): "both",
}

# --- files


def from_authors(
    file: str | Path, base: Recipe | None = None, *, weights_file: Path | None = None
) -> tuple[VideoClassifier, Recipe]:
    """Return the model of an authors' .pth, float32 and for inference, and its recipe (`recipe_of`).

    A file without the backbone takes it from the recipe's library or from `weights_file`, rounded to half precision as
    theirs is. Raises ConfigError if the file cannot be read safely, is of another model, or does not fit the recipe.
    """
    theirs = {name: tensor.float() for name, tensor in read_tensors(Path(file)).items()}
    state = our_names(theirs)
    recipe = recipe_of(state, base, str(file))
    if any(name.startswith("vit.") for name in state):
        if weights_file is not None:
            raise ConfigError(f"--weights {weights_file}: {file} holds the backbone's weights itself; leave it out")
    else:
        recipe = recipes.with_weights(recipe, weights_file)
        vit, _ = load_backbone(recipe.backbone, recipe.data.frame_size, weights_file=weights_file)
        state |= {f"vit.{name}": tensor.half().float() for name, tensor in vit.state_dict().items()}
    return model_file.build_complete(recipe, state, str(file)).eval(), recipe


def save_converted(file: str | Path, model: VideoClassifier, recipe: Recipe, class_names: Sequence[str] = ()) -> None:
    """Write all weights and the recipe, as `stadapter.load` reads them. Raises WriteError if that fails."""
    header = model_file.Header(recipe, frozen_sha256=model_file.frozen_digest(model), class_names=class_names)
    model_file.write(Path(file), model.state_dict(), header)


def to_authors(file: str | Path, output: str | Path, *, weights_file: Path | None = None) -> torch.dtype:
    """Write the model of a file of this package as the authors' .pth; returns the type of its frozen tensors.

    They are in half precision, as in theirs, unless that would change a weight: then in float32. Raises ConfigError if
    their code has no such model, WriteError if the file cannot be written.
    """
    model, header = model_file.load(file, weights_file=weights_file)
    assert header.recipe is not None  # or load would have refused it
    _check_authors_have(header.recipe, str(file))
    state = authors_names(model.state_dict())
    frozen = [name for name in state if ".adapter_pre_" not in name and not name.startswith("fc.")]
    dtype = torch.float16 if all(torch.equal(state[n].half().float(), state[n]) for n in frozen) else torch.float32
    buffer = io.BytesIO()
    torch.save({"model": state | {name: state[name].to(dtype) for name in frozen}}, buffer)
    files.write_atomically(Path(output), buffer.getvalue())
    return dtype


# --- recipes


def recipe_of(state: Mapping[str, Tensor], base: Recipe | None, source: str) -> Recipe:
    """Return the recipe of a model whose tensors these are, under our names.

    It is `base`, or the recipe that width and number of classes point to, with the fields that the tensors decide.
    Raises ConfigError if they are not of ST-Adapters in CLIP's transformer.
    """
    placement, blocks, conv = _adapters_of(state, source)
    classes, width = state["head.weight"].shape
    if base is None:
        base = _recipe_for(classes, width, source)
    depth = _clip_depth(base)
    fields = {
        "strategy": "st_adapter",
        "train_final_norm": False,
        "data.num_classes": classes,
        "adapter.bottleneck_width": conv.shape[0],
        "adapter.kernel_size": tuple(conv.shape[2:]),
        "adapter.placement": placement,
        "adapter.blocks": None if blocks == set(range(depth)) else tuple(sorted(blocks)),
        "adapter.activation": "none",
        "adapter.adapt_cls": False,
        "adapter.zero_init_conv": True,
    }
    if {"vit.pos_embed", "vit.patch_embed.weight"} <= state.keys():
        side = round((len(state["vit.pos_embed"]) - 1) ** 0.5)
        fields["data.frame_size"] = side * state["vit.patch_embed.weight"].shape[-1]
    return config.replace(base, **fields)


def _adapters_of(state: Mapping[str, Tensor], source: str) -> tuple[Placement, set[int], Tensor]:
    """Return where the adapters are, their blocks, and the kernel of one of them, [C, 1, kT, kH, kW]."""
    places: dict[str, set[int]] = {}
    for name in state:
        if match := re.fullmatch(r"(before|after)\.(\d+)\.conv\.weight", name):
            places.setdefault(match[1], set()).add(int(match[2]))
    if not places or "head.weight" not in state:
        lacking = "head (fc)" if places else "adapters (adapter_pre_attn, adapter_pre_mlp)"
        raise ConfigError(f"{source}: has no {lacking}, so it is not a checkpoint of the authors' ST-Adapter code")
    (blocks, *others) = places.values()
    if others and others[0] != blocks:
        raise ConfigError(
            f"{source}: has adapters before attention in blocks {sorted(places['before'])} and after it in "
            f"{sorted(places['after'])}; a recipe has both in the same blocks"
        )
    conv = state[f"{next(iter(places))}.{min(blocks)}.conv.weight"]
    return _PLACEMENTS[tuple(sorted(places))], blocks, conv


def _recipe_for(classes: int, width: int, source: str) -> Recipe:
    if classes not in _DATASETS or width not in _BACKBONES:
        raise ConfigError(
            f"{source}: has {classes} classes and width {width}, which no data set and backbone here go with; say with "
            "--recipe NAME (and --set backbone.name=...) what it was trained on"
        )
    return recipes.get(f"{_DATASETS[classes]}_{_BACKBONES[width]}")


def _clip_depth(recipe: Recipe) -> int:
    """Return the number of blocks. Raises ConfigError if the backbone is not CLIP's transformer."""
    shape = describe_backbone(recipe.backbone).shape
    if shape.activation != "quick_gelu" or shape.norm_eps != 1e-5 or not shape.pre_norm or shape.layer_scale:
        raise ConfigError(
            f"backbone.name = {recipe.backbone.name}: is not CLIP's transformer with QuickGELU, the only one that the "
            "authors' code has"
        )
    return shape.depth


def _check_authors_have(recipe: Recipe, file: str) -> None:
    """Raise ConfigError if the authors' code has no model of this recipe."""
    adapter, depth = recipe.adapter, _clip_depth(recipe)
    blocks = range(depth) if adapter.blocks is None else sorted(adapter.blocks)
    for field, value, fits in (
        ("strategy", recipe.strategy, recipe.strategy == "st_adapter"),
        ("own.file", recipe.own.file, not recipe.own.file),
        ("train_final_norm", recipe.train_final_norm, not recipe.train_final_norm),
        ("adapter.placement", adapter.placement, adapter.placement in _PLACEMENTS.values()),
        ("adapter.activation", adapter.activation, adapter.activation == "none"),
        ("adapter.adapt_cls", adapter.adapt_cls, not adapter.adapt_cls),
        ("adapter.blocks", adapter.blocks, list(blocks) == list(range(depth - len(blocks), depth))),  # the last k
    ):
        if not fits:
            raise ConfigError(f"{file}: has {field} = {value}, which the authors' code cannot hold; nothing is written")


# --- names of tensors

_ADAPTER = re.compile(
    r"transformer\.resblocks\.(\d+)\.(adapter_pre_attn|adapter_pre_mlp)\.(fc1|conv|fc2)\.(weight|bias)"
)
_PLACES = {"adapter_pre_attn": "before", "adapter_pre_mlp": "after"}
_LAYERS = {"fc1": "down", "conv": "conv", "fc2": "up"}


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the authors' model, all or some, under the names of `VideoClassifier`."""
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


def authors_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of `VideoClassifier` under the authors' names: the inverse of `our_names`."""
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
