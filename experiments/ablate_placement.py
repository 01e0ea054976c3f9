"""Where in a transformer block does the adapter belong?

Before multi-head self-attention, after it (before the MLP), in both places, after the MLP, or parallel to the whole
block: block(x) + adapter branch(x), whose branch reads what the block reads. Everything else stays the recipe's.
`both` has twice the adapters, so it answers "is one enough?" rather than "which place?". The head reads CLS, which
adapters do not touch: after_mhsa, after_mlp and parallel cannot act in the last block, so they have one adapter less.

Expected: before at least as good as after; both slightly better at twice the parameters.

Cost: embedded, 5 arms x 2 seeds: a few minutes on 2 CPU cores.
ssv2_clip_b16: each of the 5 arms x N seeds trains for 50 epochs on the whole data set.

    python experiments/ablate_placement.py
    python experiments/ablate_placement.py --num-gpus 8 --data-root /data/ssv2 --seeds 3
"""

import typing

from stadapter.ablation import Arm, main
from stadapter.config import Placement, Recipe


def make_arm(recipe: Recipe, value: str) -> Arm:
    return Arm(value, {"adapter.placement": value})


if __name__ == "__main__":
    main(__doc__, name="placement", values=typing.get_args(Placement), make_arm=make_arm)
