"""How much of full fine-tuning can be had for how few trained parameters? (The paper's Table 1.)

Every way to adapt a frozen image transformer to video, each with rates that suit it (`recipes.for_strategy`) and
otherwise on the recipe's terms: same clips, same order, same epochs. `stadapter.strategies` and
`stadapter.model.baselines` say what each strategy trains, and which choice was made where the paper leaves one.
`full_space_time` is the paper's full fine-tuning: divided space-time attention, recognised by its 121.57 M parameters.
Beside it stand `full`, without temporal modules, and `full_st_adapter`, ST-Adapters whose backbone is not frozen.

Expected: on motion, st_adapter far above all that look at single frames (linear_probe, prompt, partial, bitfit, lora,
adapter, full: they cannot tell a clip from its reversal) at a few per cent of the parameters of full fine-tuning. On
appearance (--recipe embedded_digits) every strategy is well above chance, and they are closer together.

Cost: embedded, 12 arms x 2 seeds: a quarter of an hour on 2 CPU cores. On ssv2_clip_b16, 12 arms x N seeds of 50
epochs; full fine-tuning needs the memory of a graph through the whole backbone (see --clips-per-pass).

    python experiments/compare_strategies.py
    python experiments/compare_strategies.py --recipe embedded_digits
    python experiments/compare_strategies.py --values st_adapter lora full --num-gpus 8 --data-root /data/ssv2
"""

import typing

from stadapter.ablation import Arm, main
from stadapter.config import ConfigError, Recipe, Strategy, difference
from stadapter.recipes import for_strategy

STRATEGIES = typing.get_args(Strategy)


def make_arm(recipe: Recipe, value: str) -> Arm:
    if value not in STRATEGIES:
        raise ConfigError(f"--values {value}: must be one of {', '.join(STRATEGIES)}")
    return Arm(value, difference(recipe, for_strategy(recipe, value)))


if __name__ == "__main__":
    main(__doc__, name="strategies", values=STRATEGIES, make_arm=make_arm)
