"""Is a convolution the right way to look across time, or would attention over the frames do better?

The bottleneck of ST-Adapter stays, down and up; between them every patch attends to the same place in all frames
instead of being convolved with its neighbours. The rest is the recipe's: same places, same width, same clips.

Expected: not known beforehand. Attention sees all frames at once, but no neighbouring places; the embedded recipe's
convolution (3x3x3) sees those as well, so the fair comparison there is --set adapter.kernel_size=3,1,1.

Cost: embedded, 3 arms x 2 seeds: a few minutes on 2 CPU cores.

    python docs/own_idea/temporal_attention.py
    python docs/own_idea/temporal_attention.py --recipe ssv2_clip_b16 --num-gpus 8 --data-root /data/ssv2 --seeds 3
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stadapter.ablation import Arm, main
from stadapter.config import AdapterConfig, ConfigError, Recipe, difference
from stadapter.model.custom import custom_adapter
from stadapter.recipes import for_strategy

MAX_FRAMES = 64
HEADS = 4


class TemporalAttentionAdapter(nn.Module):
    """X + MHSA_T(X W_down + frame) W_up on the patch tokens. M = B * T images, S = 1 + N tokens, D width, C bottleneck.

    Attention has no order by itself: a learned embedding per frame tells them apart. It starts as the identity, like
    ST-Adapter: the last map is zero.
    """

    def __init__(self, width: int, adapter: AdapterConfig) -> None:
        super().__init__()
        C = adapter.bottleneck_width
        if C % HEADS:
            raise ConfigError(f"adapter.bottleneck_width = {C}: must be a multiple of the {HEADS} heads")
        self.down = nn.Linear(width, C)
        self.frame = nn.Embedding(MAX_FRAMES, C)
        self.qkv = nn.Linear(C, 3 * C)
        self.up = nn.Linear(C, width)
        for layer in (self.down, self.qkv):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x_MSD: Tensor, num_frames: int, onto_MSD: Tensor | None = None) -> Tensor:
        """Tokens [M, 1 + N, D] -> tokens of the same shape. CLS passes untouched."""
        T = num_frames
        onto_MSD = x_MSD if onto_MSD is None else onto_MSD
        z_BTNC = self.down(x_MSD[:, 1:]).unflatten(0, (-1, T)) + self.frame.weight[:T, None]
        # Places take the part of the batch, frames that of the sequence: [B, N, heads, T, C / heads].
        q, k, v = self.qkv(z_BTNC.transpose(1, 2)).unflatten(-1, (3, HEADS, -1)).permute(3, 0, 1, 4, 2, 5)
        z_BTNC = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3).transpose(1, 2)
        patches_MND = onto_MSD[:, 1:] + self.up(z_BTNC.flatten(0, 1))
        return torch.cat([onto_MSD[:, :1], patches_MND], dim=1)


ARMS = ("convolution", "attention", "neither")


def make_arm(recipe: Recipe, value: str) -> Arm:
    if value == "convolution":
        return Arm(value, {})
    if value == "attention":
        # What does not start at a zero convolution takes a lower rate, as the plain adapter does.
        return Arm(value, custom_adapter(TemporalAttentionAdapter) | {"optim.base_lr": recipe.optim.base_lr / 4})
    if value == "neither":
        return Arm(value, difference(recipe, for_strategy(recipe, "adapter")))
    raise ConfigError(f"--values {value}: must be one of {', '.join(ARMS)}")


if __name__ == "__main__":
    main(__doc__, name="temporal_attention", values=ARMS, make_arm=make_arm)
