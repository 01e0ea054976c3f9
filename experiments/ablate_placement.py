"""Where in a transformer block does the adapter belong?

Before multi-head self-attention, after it (before the MLP), or in both places; everything else stays the recipe's.
`both` has twice the adapters, so it answers "is one enough?" rather than "which place?".

Expected: before at least as good as after; both slightly better at twice the parameters.

Cost: embedded, 3 arms x 2 seeds: a few minutes on 2 CPU cores.

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
