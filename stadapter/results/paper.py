"""The number that was published for an arm, where one is known (`paper.toml`, each with its source and status)."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from stadapter import recipes
from stadapter.config import AdapterConfig, Recipe

PAPER = Path(__file__).parent.parent / "results" / "paper.toml"
MARKS = {"verified": "✓", "derived": "✓", "unverified": "?"}
_BACKBONES = {
    "timm/vit_base_patch16_clip_224.openai": "clip_vit_b16",
    "open_clip/ViT-B-16/openai": "clip_vit_b16",
    "timm/vit_large_patch14_clip_224.openai": "clip_vit_l14",
    "open_clip/ViT-L-14/openai": "clip_vit_l14",
}
_DEPTH = {"clip_vit_b16": 12, "clip_vit_l14": 24}
_PARAMS_TOLERANCE = 0.01  # an unverified row is told apart by its rounded count of tuned parameters


@dataclass(frozen=True)
class Published:
    """A published top-1 in per cent, where it was read, and how sure that is."""

    top1: float
    source: str
    status: str

    def __str__(self) -> str:
        return f"{self.top1:.1f} {MARKS[self.status]}"


@cache
def _known() -> dict[str, Any]:
    return tomllib.loads(PAPER.read_text())


def _on_published_terms(recipe: Recipe) -> bool:
    """Whether data and optimiser are those of a named recipe: fewer epochs, say, are not the paper's configuration."""
    for base in map(recipes.get, recipes.names()):
        data = dataclasses.replace(
            recipe.data, resize=base.data.resize
        )  # both ways of resizing are meant to be the same
        if (data, recipe.optim, recipe.train_final_norm) == (base.data, base.optim, base.train_final_norm):
            return True
    return False


def published(recipe: Recipe, trainable_params: int | None = None) -> Published | None:
    """What was published for exactly this configuration, verified entries first; None where nothing is known.

    An entry that does not say which adapters it had counts only as unverified, and only where its number of tuned
    parameters fits `trainable_params`.
    """
    data, adapter = recipe.data, recipe.adapter
    backbone = _BACKBONES.get(recipe.backbone.name)
    plain = AdapterConfig(adapter.bottleneck_width, adapter.kernel_size, placement=adapter.placement)
    if backbone is None or recipe.strategy != "st_adapter" or adapter != plain:
        return None
    if recipe.backbone.weights.startswith("seed:") or not _on_published_terms(recipe):
        return None
    here = (data.dataset, backbone, data.num_frames)
    setting = _known()["recipe"].get(data.dataset, {})
    as_trained = (adapter.placement, list(adapter.kernel_size)) == (setting.get("placement"), setting.get("kernel"))
    adapters = f"{_DEPTH[backbone] * (2 if adapter.placement == 'both' else 1)}x{adapter.bottleneck_width}"
    views = f"{data.test_temporal_views}x{data.test_spatial_views}"
    maybe = None
    for entry in _known()["accuracy"]:
        if (entry["dataset"], entry["backbone"], entry.get("frames")) != here or "top1" not in entry:
            continue
        found = Published(entry["top1"], entry["source"], entry["status"])
        if entry["status"] == "verified":
            if as_trained and (entry.get("adapters"), entry.get("views")) == (adapters, views):
                return found
            continue
        if list(adapter.kernel_size) != setting.get("kernel"):
            continue  # kernels differ by less than the rounding of the published count
        tuned = entry.get("tuned_params_m")
        if tuned and trainable_params and abs(trainable_params / 1e6 / tuned - 1) < _PARAMS_TOLERANCE:
            maybe = found
    return maybe
