"""In how many blocks, and in which, does the backbone need adapters?

`last3` puts them into the last 3 blocks, `first3` into the first 3, `all` into every one, `0,2,4` into the blocks of
these 0-based indices; everything else stays the recipe's.

Expected: more blocks are better, with smaller and smaller gains; late blocks matter more than early ones.

Cost: embedded, 5 arms x 2 seeds: a few minutes on 2 CPU cores (the last blocks alone train faster than all).

    python experiments/ablate_depth.py
    python experiments/ablate_depth.py --values last1 last6 first6 all --num-gpus 8 --data-root /data/ssv2
"""

import re

from stadapter.ablation import Arm, main
from stadapter.config import ConfigError, Recipe


def make_arm(recipe: Recipe, value: str) -> Arm:
    from stadapter.backbones import describe_backbone

    depth = describe_backbone(recipe.backbone).shape.depth
    if value == "all":
        return Arm("all blocks", {"adapter.blocks": tuple(range(depth))})
    if match := re.fullmatch(r"(last|first)(\d+)", value):
        end, count = match[1], int(match[2])
        if not 1 <= count <= depth:
            raise ConfigError(f"--values {value}: the backbone has {depth} blocks")
        return Arm(
            f"{end} {count}", {"adapter.blocks": tuple(range(depth)[-count:] if end == "last" else range(count))}
        )
    try:
        return Arm(f"blocks {value}", {"adapter.blocks": tuple(int(index) for index in value.split(","))})
    except ValueError:
        raise ConfigError(f"--values {value}: expected last3, first3, all, or block indices such as 0,2,4") from None


if __name__ == "__main__":
    main(__doc__, name="depth", values=("last1", "last2", "last3", "first3", "all"), make_arm=make_arm)
