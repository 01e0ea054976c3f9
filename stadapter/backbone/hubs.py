"""Image transformers of timm and open_clip: their architecture, their constants and their weights.

Each library has two functions. `describe_*` reads the architecture as a `VitShape`, or raises a ConfigError that names
the first thing the plain `ViT` lacks. `download_*` gives the weights under our names, from the library's cache or hub.
The libraries are imported where they are used: they take seconds, and most commands never need them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stadapter.backbone.state_dicts import from_timm, read_state
from stadapter.backbone.vit import VitShape
from stadapter.config import ConfigError, first_line

PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Backbone:
    """An architecture and the constants its pixels, scaled to [0, 1], are normalised with (per channel, RGB)."""

    shape: VitShape
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def _unknown(name: str, known: Iterable[str], listing: str) -> ConfigError:
    close = difflib.get_close_matches(name.partition("/")[2], list(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"{listing} lists them"
    return ConfigError(f"backbone.name = {name}: no such model; {hint}")


def _not_plain(name: str, feature: str) -> ConfigError:
    return ConfigError(
        f"backbone.name = {name}: has {feature}, which the plain ViT here does not; choose a plain one, such as "
        "timm/vit_base_patch16_clip_224.openai"
    )


def _offline(name: str, server: str, what: str) -> ConfigError:
    return ConfigError(
        f"{name}: its weights are not on this machine and {server} cannot be reached; where there is a network, "
        f"{what}, and pass that file with --weights FILE"
    )


def _reachable(url: str) -> bool:
    """Return True if the server answers one quick try: the hub's own client retries for most of a minute per file."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False
    return True


def _cached(name: str, repository: str, filenames: tuple[str, ...]) -> str | None:
    """Return the path of the first of the hub's files that is on this machine; None if it can be downloaded.

    Raises a ConfigError that says what to fetch otherwise. A file on this machine is used as it is: asking the hub for
    a newer one would take half a minute without a network, and could change a recipe's weights behind its back.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    for filename in filenames:
        if isinstance(path := try_to_load_from_cache(repository, filename), str):
            return path
    if constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT):
        raise _offline(name, constants.ENDPOINT, f"run `hf download {repository} {filenames[0]}`")
    return None


# timm


@functools.cache
def describe_timm(name: str) -> Backbone:
    import timm
    from timm.models import get_pretrained_cfg

    full_name = f"timm/{name}"
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise _unknown(full_name, [*timm.list_models("*vit*"), *timm.list_pretrained("*vit*")], "timm.list_models()")
    if tag and name not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        raise _unknown(full_name, tagged, f"timm.list_pretrained('{architecture}*')")
    try:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
    except Exception as error:  # whatever an exotic model trips over without memory behind its tensors
        raise _not_plain(full_name, f"parts that cannot be inspected ({error})") from None
    config = get_pretrained_cfg(name)
    if config is None:
        return Backbone(_timm_shape(full_name, model, quick_gelu=False), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    quick_gelu = _trained_with_quick_gelu(architecture, config)
    return Backbone(_timm_shape(full_name, model, quick_gelu), _triple(config.mean), _triple(config.std))


def _trained_with_quick_gelu(architecture: str, config: Any) -> bool:
    """Return True if a file of weights was trained with QuickGELU, which its timm name does not say.

    timm builds `vit_base_patch16_clip_224.openai` with the exact GELU, although OpenAI trained it with QuickGELU, and
    offers the same file again as `vit_base_patch16_clip_quickgelu_224.openai` with the activation it was trained with.
    The paper's model has the latter, so the file decides here, not the name. Weights fine-tuned from OpenAI's with
    the exact GELU have no such twin, and keep it.
    """
    import timm
    from timm.models import get_pretrained_cfg

    if config.tag == "dfn2b":  # QuickGELU in all sizes (open_clip says so); timm has no twin of the base one
        return True
    twin = f"{architecture.replace('_clip_', '_clip_quickgelu_')}.{config.tag}"
    twin_config = get_pretrained_cfg(twin) if twin in timm.list_pretrained("*_clip_quickgelu_*") else None
    return twin_config is not None and twin_config.hf_hub_id == config.hf_hub_id


def _timm_shape(name: str, model: Any, quick_gelu: bool) -> VitShape:
    """Return the shape of a timm model, or raise a ConfigError that names the first thing our plain ViT lacks."""
    from timm.layers import Mlp, PatchEmbed
    from timm.layers.activations import QuickGELU
    from timm.models import vision_transformer as timm_vit

    if type(model) is not timm_vit.VisionTransformer:
        raise _not_plain(name, f"an architecture of its own ({type(model).__name__})")
    block: Any = model.blocks[0]
    final_norm: Any = model.norm
    activation = getattr(block.mlp, "act", None) if isinstance(block, timm_vit.Block) else None
    norms = [model.norm, *(m for b in model.blocks for m in (getattr(b, "norm1", None), getattr(b, "norm2", None)))]
    lacking = {
        "no class token": model.cls_token is None,
        f"{model.num_reg_tokens} register tokens": model.num_reg_tokens > 0,
        "no position embeddings (such as RoPE's)": model.pos_embed is None,
        "a patch embedding of its own": type(model.patch_embed) is not PatchEmbed,
        "a norm inside the patch embedding": not isinstance(getattr(model.patch_embed, "norm", None), nn.Identity),
        "no norm before pooling (it averages over patches)": isinstance(model.norm, nn.Identity),
        "parallel or post-norm blocks": any(type(b) is not timm_vit.Block for b in model.blocks),
    }
    if not any(lacking.values()):
        size, attention = model.patch_embed.img_size, block.attn
        lacking = {
            "an attention of its own": type(attention) is not timm_vit.Attention,
            "query-key norms (qk_norm)": not isinstance(getattr(attention, "q_norm", None), nn.Identity),
            "a norm inside attention": not isinstance(getattr(attention, "norm", None), nn.Identity),
            "attention without an output bias": getattr(attention.proj, "bias", None) is None,
            f"an MLP of its own ({type(block.mlp).__name__}, such as SwiGLU)": type(block.mlp) is not Mlp,
            "a norm inside the MLP": not isinstance(getattr(block.mlp, "norm", None), nn.Identity),
            f"the activation {type(activation).__name__}": not isinstance(activation, nn.GELU | QuickGELU),
            "norms other than LayerNorm": any(not isinstance(norm, nn.LayerNorm) for norm in norms),
            f"images that are not square ({size})": size[0] != size[1],
            "patches that are not square": model.patch_embed.patch_size[0] != model.patch_embed.patch_size[1],
        }
    for feature, is_lacking in lacking.items():
        if is_lacking:
            raise _not_plain(name, feature)
    kind: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    if quick_gelu or isinstance(activation, QuickGELU):
        kind = "quick_gelu"
    elif getattr(activation, "approximate", "none") == "tanh":
        kind = "gelu_tanh"
    return VitShape(
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=block.attn.num_heads,
        mlp_width=block.mlp.fc1.out_features,
        activation=kind,
        norm_eps=final_norm.eps,
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        patch_bias=model.patch_embed.proj.bias is not None,
        qkv_bias=block.attn.qkv.bias is not None,
        layer_scale=not isinstance(block.ls1, nn.Identity),
    )


def download_timm(name: str) -> dict[str, Tensor]:
    import timm
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ConfigError(
            f"timm/{name}: timm has no weights for it; pass --weights FILE, "
            "or set backbone.weights=seed:0 for random ones"
        )
    overlay = None
    if config.hf_hub_id:
        filenames = (config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
        if file := _cached(f"timm/{name}", config.hf_hub_id, filenames):
            overlay = {"file": file}
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
        return from_timm(model.state_dict())
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"timm/{name}: its weights could not be loaded ({first_line(error)}); try --weights FILE"
        ) from None


# open_clip


@functools.cache
def describe_open_clip(name: str) -> Backbone:
    import open_clip

    full_name = f"open_clip/{name}"
    model_name, _, tag = name.partition("/")
    config = open_clip.get_model_config(model_name)
    if config is None:
        raise _unknown(f"open_clip/{model_name}", open_clip.list_models(), "open_clip.list_models()")
    published = open_clip.get_pretrained_cfg(model_name, tag) if tag else {}
    if tag and not published:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name))
        raise ConfigError(f"backbone.name = {full_name}: no such tag; {model_name} has {tags or 'none'}")
    # The weights' own entry decides: open_clip builds ViT-B-16/openai with the exact GELU and warns of the mismatch.
    quick_gelu = bool(published.get("quick_gelu") or config.get("quick_gelu"))
    return Backbone(
        _open_clip_shape(full_name, config["vision_cfg"], quick_gelu),
        _triple(published.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        _triple(published.get("std", open_clip.OPENAI_DATASET_STD)),
    )


def _open_clip_shape(name: str, vision_config: Mapping[str, Any], quick_gelu: bool) -> VitShape:
    """Return the shape of an open_clip image tower, or raise a ConfigError that names what our plain ViT lacks."""
    from open_clip import CLIPVisionCfg

    config = CLIPVisionCfg(**vision_config)
    if config.timm_model_name:
        raise _not_plain(name, f"a timm image tower ({config.timm_model_name})")
    if not isinstance(config.layers, int):
        raise _not_plain(name, "a ResNet image tower")
    # Without an effect on the tokens, or described by the shape; anything else must be at its default.
    understood = {
        "layers",
        "width",
        "head_width",
        "mlp_ratio",
        "patch_size",
        "image_size",
        "ls_init_value",
        "no_ln_pre",
    }
    understood |= {
        "patch_dropout",
        "output_tokens",
        "final_ln_after_pool",
        "pos_embed_type",
        "act_kwargs",
        "norm_kwargs",
    }
    for field in dataclasses.fields(CLIPVisionCfg):
        if field.name not in understood and getattr(config, field.name) != field.default:
            raise _not_plain(name, f"{field.name} = {getattr(config, field.name)}")
    if not isinstance(config.image_size, int):
        raise _not_plain(name, f"images given as {config.image_size}, not one size")
    tanh = (config.act_kwargs or {}).get("approximate") == "tanh"
    return VitShape(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.width,
        depth=config.layers,
        heads=config.width // config.head_width,
        mlp_width=int(config.width * config.mlp_ratio),
        activation="quick_gelu" if quick_gelu else "gelu_tanh" if tanh else "gelu",
        norm_eps=(config.norm_kwargs or {}).get("eps", 1e-5),
        pre_norm=not config.no_ln_pre,
        patch_bias=False,
        layer_scale=config.ls_init_value is not None,
    )


def download_open_clip(name: str) -> dict[str, Tensor]:
    import open_clip

    model_name, _, tag = name.partition("/")
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        example = f"such as open_clip/{model_name}/{tags[0]}, " if tags else ""
        raise ConfigError(f"backbone.name = open_clip/{name}: name its weights too, {example}or pass --weights FILE")
    published = open_clip.get_pretrained_cfg(model_name, tag)
    if published.get("hf_hub"):
        repository, _, filename = published["hf_hub"].rpartition("/")
        filenames = (filename,) if filename else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        if cached := _cached(f"open_clip/{name}", repository, filenames):
            return read_state(Path(cached))
    elif not _reachable(published["url"]):
        raise _offline(f"open_clip/{name}", published["url"], "download it")
    try:
        file = open_clip.download_pretrained(published)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"open_clip/{name}: its weights could not be downloaded ({first_line(error)}); try --weights FILE"
        ) from None
    return read_state(Path(file))


def _triple(values: Iterable[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)
