"""Backbones: the way from a name to a plain `ViT` with its weights and normalisation constants.

    timm/<model>[.<tag>]            any plain timm ViT with a CLS token, CLIP's image towers included
    open_clip/<model>/<tag>         CLIP image towers
    embedded                        the small one in the package

timm and open_clip are asked for architectures, constants and files, never to compute: all weights end in `ViT`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stadapter.backbone.hubs import Backbone, describe_open_clip, describe_timm, download_open_clip, download_timm
from stadapter.backbone.state_dicts import check_fit, read_state
from stadapter.backbone.vit import EMBEDDED_SHAPE, ViT, seed_weights
from stadapter.config import BackboneConfig, ConfigError

EMBEDDED_WEIGHTS = Path(__file__).parent / "embedded_vit.safetensors"


def describe_backbone(config: BackboneConfig) -> Backbone:
    """Return the backbone at its own image size, without weights.

    Raises ConfigError if it is unknown, or not a plain ViT with CLS.
    """
    library, _, name = config.name.partition("/")
    if config.name == "embedded":
        return Backbone(EMBEDDED_SHAPE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    if library == "timm" and name:
        return describe_timm(name)
    if library == "open_clip" and name:
        return describe_open_clip(name)
    raise ConfigError(
        f"backbone.name = {config.name}: must be embedded, timm/<model> (timm/vit_base_patch16_clip_224.openai) "
        "or open_clip/<model>/<tag> (open_clip/ViT-B-16/openai)"
    )


def load_backbone(
    config: BackboneConfig,
    image_size: int,
    *,
    weights_file: Path | None = None,
    device: torch.device | str = "cpu",
) -> tuple[ViT, Backbone]:
    """Return the backbone for images of `image_size`, float32, with its weights; on device "meta" without them.

    Weights are random for `config.weights == "seed:<n>"`, else from `weights_file`, else from the library's hub (its
    cache first). Raises ConfigError if there are none, if the file's SHA-256 is not the recipe's, or if they do not
    fit.
    """
    backbone = describe_backbone(config)
    if image_size < 1 or image_size % backbone.shape.patch_size:
        raise ConfigError(
            f"data.frame_size = {image_size}: must be a multiple of {backbone.shape.patch_size}, "
            f"the patch size of {config.name}"
        )
    backbone = dataclasses.replace(backbone, shape=dataclasses.replace(backbone.shape, image_size=image_size))
    if torch.device(device).type == "meta":
        with torch.device("meta"):
            return ViT(backbone.shape), backbone
    vit = ViT(backbone.shape)
    if config.weights.startswith("seed:"):
        if weights_file is not None:
            raise ConfigError(f"--weights {weights_file}: backbone.weights = {config.weights} asks for random weights")
        seed_weights(vit, _seed(config.weights))
    else:
        source, state = _find_weights(config, weights_file)
        state["pos_embed"] = resample_positions(state["pos_embed"], backbone.shape.grid)
        check_fit(state, vit.state_dict(), source, "is it of another architecture?")
        vit.load_state_dict(state)
    return vit.to(device), backbone


def resample_positions(pos_embed: Tensor, grid: int) -> Tensor:
    """Return position embeddings [1 + grid * grid, D], float32, of [1 + n * n, D]; CLS keeps its own.

    Bicubic without antialiasing, which is how the published models that change resolution do it (DeiT, DINOv2). timm
    antialiases when it shrinks the grid, which moves DINOv2's features by about 4 %.
    """
    side = math.isqrt(len(pos_embed) - 1)
    if side == grid:
        return pos_embed
    patches_1Dhw = pos_embed[1:].float().T.reshape(1, -1, side, side)
    patches_1Dhw = F.interpolate(patches_1Dhw, size=(grid, grid), mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([pos_embed[:1].float(), patches_1Dhw.flatten(2)[0].T])


def _seed(weights: str) -> int:
    try:
        return int(weights.removeprefix("seed:"))
    except ValueError:
        raise ConfigError(f"backbone.weights = {weights}: expected seed:<number>, such as seed:0") from None


def _find_weights(config: BackboneConfig, weights_file: Path | None) -> tuple[str, dict[str, Tensor]]:
    """Return the source of the weights, for messages, and the weights under our names."""
    if weights_file is not None:
        if config.weights:
            _check_digest(weights_file, config.weights)
        return f"--weights {weights_file}", read_state(weights_file)
    if config.weights:
        raise ConfigError(
            f"backbone.weights = {config.weights}: the recipe was made with a file of that SHA-256; "
            "pass it with --weights FILE"
        )
    if config.name == "embedded":
        return "the embedded backbone", read_state(EMBEDDED_WEIGHTS)
    library, _, name = config.name.partition("/")
    return config.name, (download_timm if library == "timm" else download_open_clip)(name)


def _check_digest(file: Path, expected: str) -> None:
    try:
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"--weights {file}: cannot be read ({error.strerror})") from None
    if digest != expected:
        raise ConfigError(f"--weights {file}: its SHA-256 is {digest}, but the recipe was made with {expected}")
