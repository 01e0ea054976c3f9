"""How wide must the bottleneck be?

The adapter's bottleneck gets from an eighth of the recipe's width to twice it; everything else stays the recipe's.

Expected: a plateau over a wide range, and a loss only where the bottleneck becomes very narrow.

Cost: embedded, 5 arms x 2 seeds: a few minutes on 2 CPU cores.
ssv2_clip_b16: each arm x N seeds trains for 50 epochs on the whole data set.

    python experiments/ablate_width.py
    python experiments/ablate_width.py --values 32 64 128 192 384 768 --num-gpus 8 --data-root /data/ssv2
"""

from stadapter.ablation import Arm, Axis, main
from stadapter.config import ConfigError, Recipe

AXIS = Axis("bottleneck width (channels)", is_log=True)


def make_arm(recipe: Recipe, value: str) -> Arm:
    """Return the arm of `/8`, an eighth of the recipe's width; `x2`, twice the recipe's; or `192`, 192 channels."""
    width = recipe.adapter.bottleneck_width
    try:
        scaled = {"/": lambda by: width // by, "x": lambda by: width * by}.get(value[0])
        channels = scaled(int(value[1:])) if scaled else int(value)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f"--values {value}: expected a number of channels such as 192, or /8 or x2 of the recipe's"
        ) from None
    return Arm(f"width {channels}", {"adapter.bottleneck_width": channels}, channels)


if __name__ == "__main__":
    main(__doc__, name="width", values=("/8", "/4", "/2", "x1", "x2"), make_arm=make_arm, axis=AXIS)
