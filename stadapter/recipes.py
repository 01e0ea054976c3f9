"""The named recipes, as plain values: scripts, notebooks and cluster jobs import the same ones.

`embedded` and `embedded_digits` need nothing but the package. `ssv2_clip_b16` and `kinetics400_clip_b16` are the
authors' published training commands (where one gives a batch per GPU, the global batch here is that of their number of
GPUs); the others are made from these.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import textwrap
from pathlib import Path

from stadapter.config import AdapterConfig, BackboneConfig, ConfigError, DataConfig, OptimConfig, Recipe, Strategy
from stadapter.strategies import STRATEGIES

# Which way do the digits move? 12 classes in 6 pairs that only the direction of time tells apart.
embedded = Recipe(
    name="embedded",
    data=DataConfig(
        dataset="embedded_motion",
        num_classes=12,
        num_frames=8,
        frame_size=60,
        sampling="dense",  # half of a clip's 16 frames; one at random per segment would jitter the speeds
        frame_stride=2,
    ),
    backbone=BackboneConfig("embedded"),
    adapter=AdapterConfig(bottleneck_width=48, kernel_size=(3, 3, 3)),
    train_final_norm=True,
    optim=OptimConfig(
        epochs=4,
        warmup_epochs=1.2,
        global_batch=8,
        base_lr=0.256,  # 8e-3 at 8 clips: small clips, small batches, few epochs
        betas=(0.9, 0.95),  # 0.999 diverges at this rate
        weight_decay=0.02,
        clip_norm=1.0,
        head_dropout=0.0,
    ),
)

# Which digit is it? A question about appearance: a linear probe already answers it well.
embedded_digits = dataclasses.replace(
    embedded,
    name="embedded_digits",
    data=dataclasses.replace(embedded.data, dataset="embedded_digit", num_classes=10),
)

_CLIP_B16 = BackboneConfig("timm/vit_base_patch16_clip_224.openai")
_IN21K_B16 = BackboneConfig("timm/vit_base_patch16_224.augreg_in21k")
_CLIP_L14 = BackboneConfig("timm/vit_large_patch14_clip_224.openai")

ssv2_clip_b16 = Recipe(
    name="ssv2_clip_b16",
    data=DataConfig(
        dataset="ssv2",
        num_classes=174,
        random_resized_crop=(0.08, 1.0),
        rand_augment="rand-m7-n4-mstd0.5-inc1",
        test_spatial_views=3,
    ),
    backbone=_CLIP_B16,
    adapter=AdapterConfig(bottleneck_width=384, kernel_size=(3, 1, 1), placement="both"),
    optim=OptimConfig(epochs=50, global_batch=64 * 4, base_lr=1e-3, precision="float16"),
)

kinetics400_clip_b16 = Recipe(
    name="kinetics400_clip_b16",
    data=DataConfig(
        dataset="kinetics400",
        num_classes=400,
        sampling="dense",
        frame_stride=16,
        short_side_jitter=(1.0, 1.15),
        horizontal_flip=True,
        test_temporal_views=3,
    ),
    backbone=_CLIP_B16,
    adapter=AdapterConfig(bottleneck_width=384, kernel_size=(3, 1, 1), placement="after_mhsa"),
    optim=OptimConfig(epochs=12, global_batch=64 * 3, base_lr=1e-3, precision="float16"),
)

# No training command for EPIC-Kitchens-100 is published. This is SSv2's, which is also about motion, with a verb head
# and a noun head: a starting point of ours, not the paper's setting.
epic_kitchens100_clip_b16 = dataclasses.replace(
    ssv2_clip_b16,
    name="epic_kitchens100_clip_b16",
    data=dataclasses.replace(
        ssv2_clip_b16.data, dataset="epic_kitchens100", num_classes=97 + 300, label_groups=(97, 300)
    ),
)


def _longer(recipe: Recipe, num_frames: int) -> Recipe:
    """Return the recipe with 16 or 32 frames. A dense clip keeps its span in time: the authors' stride is not known."""
    data = recipe.data
    stride = data.frame_stride * data.num_frames // num_frames if data.sampling == "dense" else data.frame_stride
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}_f{num_frames}",
        data=dataclasses.replace(data, num_frames=num_frames, frame_stride=stride),
    )


def _real_video() -> list[Recipe]:
    """Return the recipes of 3 data sets x 3 backbones x 3 lengths.

    Published commands exist for CLIP ViT-B/16 at 8 frames on SSv2 and
    Kinetics-400 only; the others keep all their settings but the backbone and the frames."""
    found = []
    for base in (ssv2_clip_b16, kinetics400_clip_b16, epic_kitchens100_clip_b16):
        for suffix, backbone in (("clip_b16", _CLIP_B16), ("in21k_b16", _IN21K_B16), ("clip_l14", _CLIP_L14)):
            name = f"{base.data.dataset}_{suffix}"
            recipe = base if base.name == name else dataclasses.replace(base, name=name, backbone=backbone)
            found += [recipe, _longer(recipe, 16), _longer(recipe, 32)]
    return found


_ALL = {recipe.name: recipe for recipe in (embedded, embedded_digits, *_real_video())}


def for_strategy(recipe: Recipe, strategy: Strategy) -> Recipe:
    """Return the recipe with another strategy and optimiser settings that suit it; everything else stays.

    The rates (`stadapter.strategies`) are relative to the recipe's, which are ST-Adapter's. ST-Adapter bears a high one
    because its convolution starts at zero and its backbone is frozen. Without a convolution the rate is lower, and
    pretrained weights that move (`full`, `partial`) have another, an order of magnitude lower. On the embedded recipe
    none of these diverges. The rate of `full_space_time` was chosen on the validation split of its motion task (one
    seed; 88 % top-1, and 48 % at a quarter of the rate); the others are first choices, not the outcome of a search. For
    a comparison that gives each side its best settings, search with `stadapter tune`.

    `linear_probe` and `bitfit` do not train the final norm, whatever the recipe says, since their names say so.
    """
    row = STRATEGIES[strategy]
    optim = dataclasses.replace(
        recipe.optim,
        base_lr=recipe.optim.base_lr * row.rate,
        backbone_lr_factor=recipe.optim.backbone_lr_factor * row.backbone_rate,
    )
    final_norm = recipe.train_final_norm and row.final_norm
    return dataclasses.replace(recipe, strategy=strategy, optim=optim, train_final_norm=final_norm)


def names() -> list[str]:
    """Return the names of all recipes, embedded ones first."""
    return list(_ALL)


def listing() -> str:
    """Return the names for a help text, wrapped to its width."""
    return textwrap.fill(f"recipes: {', '.join(names())}", width=100, break_on_hyphens=False)


def get(name: str) -> Recipe:
    """Return the recipe of that name, or raise a ConfigError that lists them."""
    if name not in _ALL:
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"--recipe {name}: no such recipe{hint}; there are {', '.join(names())}")
    return _ALL[name]


def with_weights(recipe: Recipe, file: Path | None) -> Recipe:
    """Return the recipe with backbone weights from `file`, identified by the file's content, not its place."""
    if file is None:
        return recipe
    try:
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"--weights {file}: cannot be read ({error.strerror})") from None
    return dataclasses.replace(recipe, backbone=dataclasses.replace(recipe.backbone, weights=digest))
