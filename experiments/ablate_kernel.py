"""Does an adapter of a frozen image transformer have to look across time, and how far?

The depthwise convolution inside ST-Adapter gets the temporal extents 1, 3, 5 and 7; its spatial extent stays the
recipe's. With extent 1 every frame is on its own and only their mean meets at the head: that arm is the control.

Expected: a large step from 1 to 3, then a plateau. On the embedded recipe, extent 1 cannot tell a clip from its
reversal (direction exactly 50 %), so it stays below 50 % top-1 however long it trains.

With --values 1x1x1 3x1x1 1x3x3 3x3x3 it asks what the spatial extent adds: spatial context without time (1x3x3) is no
substitute for time, and both together (3x3x3) are best where things move.

Cost: embedded, 4 arms x 2 seeds: a few minutes on 2 CPU cores.
ssv2_clip_b16: each of the 4 arms x N seeds trains for 50 epochs on the whole data set.

    python experiments/ablate_kernel.py
    python experiments/ablate_kernel.py --num-gpus 8 --data-root /data/ssv2 --seeds 3
    python experiments/ablate_kernel.py --values 1x1x1 3x1x1 1x3x3 3x3x3
"""

from stadapter.ablation import Arm, Axis, main
from stadapter.config import ConfigError, Recipe

AXIS = Axis("temporal extent of the kernel (frames)")


def make_arm(recipe: Recipe, value: str) -> Arm:
    """Return the arm of `3`, temporal extent 3 with the recipe's spatial one, or of `3x1x1`, all extents (t, h, w)."""
    try:
        extents = [int(extent) for extent in value.split("x")]
    except ValueError:
        raise ConfigError(
            f"--values {value}: expected a temporal extent such as 3, or t x h x w such as 3x1x1"
        ) from None
    if len(extents) == 1:
        extents += recipe.adapter.kernel_size[1:]
    series = "spatial extent " + "×".join(map(str, extents[1:]))
    return Arm("kernel " + "x".join(map(str, extents)), {"adapter.kernel_size": extents}, extents[0], series)


if __name__ == "__main__":
    main(__doc__, name="kernel", values=("1", "3", "5", "7"), make_arm=make_arm, axis=AXIS)
