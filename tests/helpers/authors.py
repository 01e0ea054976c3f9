"""Checkpoints in the layout of the authors' published code, made from the golden vectors."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import open_clip
import torch
from golden import FILES, Golden

from stadapter import config, recipes
from stadapter.config import Recipe


def is_theirs(name: str) -> bool:
    """Return True if the authors' code trains a tensor. The other tensors are frozen, in half precision."""
    return ".adapter_pre_" in name or name.startswith("fc.")


def authors_file(path: Path, golden: Golden, *, half: bool = False, backbone: bool = True) -> Path:
    """Write a checkpoint like the authors' `save_model`: `model`, whole or without the backbone, and the optimiser."""
    state = {
        name: tensor.half() if half and not is_theirs(name) else tensor
        for name, tensor in golden.state.items()
        if backbone or is_theirs(name)
    }
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "next_epoch": 50}, path)
    return path


@cache
def golden_backbone(layers: int = 3) -> str:
    """Register the golden vectors' backbone, or its first layers, with open_clip, and return its name."""
    c = Golden(FILES[0]).config
    vision = {
        "image_size": c["input_resolution"],
        "patch_size": c["patch_size"],
        "width": c["width"],
        "layers": layers,
        "head_width": c["width"] // c["heads"],
    }
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"golden-{layers}.json"
        file.write_text(json.dumps({"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": {}}))
        open_clip.add_model_config(file)
    return f"open_clip/{file.stem}"


def golden_recipe(layers: int = 3) -> Recipe:
    return config.replace(recipes.ssv2_clip_b16, **{"backbone.name": golden_backbone(layers)})
