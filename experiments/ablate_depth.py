"""In how many blocks, and in which, does the backbone need adapters?

`last3` puts them into the last 3 blocks, `first3` into the first 3, `every2` into every other one (the last among
them), `all` into every one, `0,2,4` into the blocks of these 0-based indices, `4` into that block alone; everything
else stays the recipe's.

Expected: more blocks are better, with smaller and smaller gains; late blocks matter more than early ones.

Cost: embedded, 11 arms x 2 seeds: about ten minutes on 2 CPU cores (late blocks alone train faster than all).
ssv2_clip_b16: 17 arms x N seeds of 50 epochs; choose with --values. Arms with late blocks alone are many times faster
with --cache-prefix, on clips that look the same in every epoch (docs/data.md).

    python experiments/ablate_depth.py
    python experiments/ablate_depth.py --values last1 last6 first6 all --num-gpus 8 --data-root /data/ssv2
"""

import re
from collections.abc import Sequence

from stadapter.ablation import Arm, Axis, main
from stadapter.config import ConfigError, Recipe


def depth_of(recipe: Recipe) -> int:
    from stadapter.backbone.load import describe_backbone  # late: it loads torch

    return describe_backbone(recipe.backbone).shape.depth


def default_values(recipe: Recipe) -> Sequence[str]:
    depth = depth_of(recipe)
    singles = [str(block) for block in range(depth - 1)]  # the last one alone is last1
    return ("last1", "last2", f"last{depth // 2}", "first1", f"first{depth // 2}", "every2", "all", *singles[1:])


def make_arm(recipe: Recipe, value: str) -> Arm:
    blocks = tuple(range(depth_of(recipe)))
    if match := re.fullmatch(r"(last|first|every)(\d+)", value):
        kind, count = match[1], int(match[2])
        if not 1 <= count <= len(blocks):
            raise ConfigError(f"--values {value}: the backbone has {len(blocks)} blocks")
        chosen = {"last": blocks[-count:], "first": blocks[:count], "every": blocks[::-count][::-1]}[kind]
        label = f"{kind} {count}"
    elif re.fullmatch(r"\d+(,\d+)*", value):
        chosen = tuple(int(index) for index in value.split(","))
        label = f"{'blocks' if ',' in value else 'block'} {value}"
    elif value == "all":
        chosen, label = blocks, "all blocks"
    else:
        raise ConfigError(f"--values {value}: expected last3, first3, every2, all, or block indices such as 0,2,4")
    count = len(chosen)
    lines = {"last blocks": blocks[-count:], "first blocks": blocks[:count]}
    series = tuple(line for line, members in lines.items() if members == chosen)
    fields = {"adapter.blocks": None if value == "all" else chosen}  # None as in the recipes: one training, shared
    return Arm(label, fields, count, series or ("one block" if count == 1 else label))


if __name__ == "__main__":
    main(__doc__, name="depth", values=default_values, make_arm=make_arm, axis=Axis("number of blocks with adapters"))
