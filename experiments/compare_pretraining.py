"""How much does the pretraining of the frozen backbone matter?

The same ViT-B/16 with CLIP's weights (image and text, 400 M pairs) and with ImageNet-21K's labels. Each has its own
normalisation constants and activation. The embedded backbone has one set of weights only: there, its pretraining is
compared with none (random weights, `seed:0`), which is a cruder question with a surer answer.

Expected: CLIP above IN-21K. Embedded: pretrained far above random, whose adapters have nothing to adapt.

Cost: embedded, 2 arms x 2 seeds: a few minutes on 2 CPU cores.
ssv2_clip_b16: each of the 2 arms x N seeds trains for 50 epochs on the whole data set; both weights are downloaded.

    python experiments/compare_pretraining.py
    python experiments/compare_pretraining.py --num-gpus 8 --data-root /data/ssv2 --seeds 3
"""

from collections.abc import Sequence

from stadapter.ablation import Arm, main
from stadapter.config import ConfigError, Recipe

BACKBONES = {
    "clip": ("timm/vit_base_patch16_clip_224.openai", ""),
    "in21k": ("timm/vit_base_patch16_224.augreg_in21k", ""),
    "pretrained": ("embedded", ""),
    "random": ("embedded", "seed:0"),
}


def default_values(recipe: Recipe) -> Sequence[str]:
    return ("pretrained", "random") if recipe.backbone.name == "embedded" else ("clip", "in21k")


def make_arm(recipe: Recipe, value: str) -> Arm:
    """Return the arm of `clip` or `in21k`, of the embedded backbone's `pretrained` or `random`, or of any backbone."""
    if recipe.backbone.weights and not recipe.backbone.weights.startswith("seed:"):
        raise ConfigError("--weights: the arms are different weights, so one file cannot serve them")
    name, weights = BACKBONES.get(value, (value, ""))
    return Arm(value, {"backbone.name": name, "backbone.weights": weights})


if __name__ == "__main__":
    main(__doc__, name="pretraining", values=default_values, make_arm=make_arm)
