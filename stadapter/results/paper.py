"""The number that was published for an arm, if one is known: `paper.toml` has each with its source and its status."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from stadapter import recipes
from stadapter.config import AdapterConfig, Recipe

PAPER = Path(__file__).with_name("paper.toml")
VERIFIED, UNVERIFIED = "verified", "unverified"
MARKS = {VERIFIED: "✓", UNVERIFIED: "?"}
_BACKBONES = {
    "timm/vit_base_patch16_clip_224.openai": "clip_vit_b16",
    "open_clip/ViT-B-16/openai": "clip_vit_b16",
    "timm/vit_large_patch14_clip_224.openai": "clip_vit_l14",
    "open_clip/ViT-L-14/openai": "clip_vit_l14",
}
_DEPTH = {"clip_vit_b16": 12, "clip_vit_l14": 24}
_PARAMS_TOLERANCE = 0.01  # an unverified row is recognised by its rounded number of tuned parameters


@dataclass(frozen=True)
class Published:
    """A published top-1 in per cent, where it was read, and how sure that is."""

    top1: float
    source: str
    status: str

    @property
    def is_verified(self) -> bool:
        return self.status == VERIFIED

    def __str__(self) -> str:
        return f"{self.top1:.1f} {MARKS[VERIFIED if self.is_verified else UNVERIFIED]}"


@dataclass(frozen=True)
class Entry:
    """One row [[accuracy]] of paper.toml; None stands for what the row does not say, and fits no arm."""

    dataset: str | None = None
    backbone: str | None = None
    adapters: str | None = None  # how many x how wide, such as 24x384
    frames: int | None = None
    views: str | None = None  # temporal x spatial
    top1: float | None = None
    tuned_params_m: float | None = None
    source: str = "source not recorded"
    status: str = UNVERIFIED

    @classmethod
    def from_toml(cls, row: Mapping[str, Any]) -> Self:
        """Return the entry of a row; columns that nothing here reads are left out."""
        return cls(**{field.name: row[field.name] for field in dataclasses.fields(cls) if field.name in row})


@cache
def _known(path: Path) -> tuple[tuple[Entry, ...], Mapping[str, Any]]:
    """Return the entries, and the published training command of each data set."""
    found = tomllib.loads(path.read_text())
    return tuple(map(Entry.from_toml, found["accuracy"])), found["recipe"]


def published(recipe: Recipe, trainable_params: int | None = None) -> Published | None:
    """Return what was published for exactly this configuration, or None if nothing is known.

    A verified entry goes before others, and must agree in all that it says. An entry of any other status counts as
    unverified: it need not say which adapters it had, and is shown if its number of tuned parameters fits
    `trainable_params`.
    """
    backbone = _published_backbone(recipe)
    if backbone is None:
        return None
    entries, commands = _known(PAPER)
    command = commands.get(recipe.data.dataset, {})
    if list(recipe.adapter.kernel_size) != command.get("kernel"):
        return None  # kernels change the number of parameters by less than its rounding
    here = (recipe.data.dataset, backbone, recipe.data.num_frames)
    near = [entry for entry in entries if (entry.dataset, entry.backbone, entry.frames) == here]
    if recipe.adapter.placement == command.get("placement"):
        wanted = (VERIFIED, _adapters(recipe, backbone), _views(recipe))
        for entry in near:
            if entry.top1 is not None and (entry.status, entry.adapters, entry.views) == wanted:
                return Published(entry.top1, entry.source, VERIFIED)
    for entry in near:
        if entry.top1 is not None and entry.status != VERIFIED and _fits(entry.tuned_params_m, trainable_params):
            return Published(entry.top1, entry.source, UNVERIFIED)
    return None


def _published_backbone(recipe: Recipe) -> str | None:
    """Return the name that paper.toml has for the backbone; None if the recipe is no published kind of training."""
    adapter = recipe.adapter
    plain = AdapterConfig(adapter.bottleneck_width, adapter.kernel_size, placement=adapter.placement)
    if recipe.strategy != "st_adapter" or adapter != plain or recipe.backbone.weights.startswith("seed:"):
        return None
    return _BACKBONES.get(recipe.backbone.name) if _on_published_terms(recipe) else None


def _on_published_terms(recipe: Recipe) -> bool:
    """Return True if data and optimiser are those of a named recipe; fewer epochs, say, are not what was published."""
    for base in map(recipes.get, recipes.names()):
        data = dataclasses.replace(recipe.data, resize=base.data.resize)  # both ways of resizing count as the same
        if (data, recipe.optim, recipe.train_final_norm) == (base.data, base.optim, base.train_final_norm):
            return True
    return False


def _adapters(recipe: Recipe, backbone: str) -> str:
    per_block = 2 if recipe.adapter.placement == "both" else 1
    return f"{_DEPTH[backbone] * per_block}x{recipe.adapter.bottleneck_width}"


def _views(recipe: Recipe) -> str:
    return f"{recipe.data.test_temporal_views}x{recipe.data.test_spatial_views}"


def _fits(tuned_params_m: float | None, trainable_params: int | None) -> bool:
    """Return True if both numbers are known and equal but for rounding."""
    if not tuned_params_m or not trainable_params:
        return False
    return abs(trainable_params / 1e6 / tuned_params_m - 1) < _PARAMS_TOLERANCE
