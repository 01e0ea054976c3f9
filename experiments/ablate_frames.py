"""How many frames does the model need to see?

8, 16 and 32 frames on the paper's recipes; 4, 8 and 16 on the embedded one, whose clips have 16. Where frames are
sampled densely, the stride shrinks as their number grows, so that every arm sees the same stretch of the video.

Expected: more frames are better, with smaller and smaller gains, at a cost that grows with their number. Not on the
embedded recipe: there more frames mean smaller steps between them, and what moves a pixel or two between two frames is
hard to see for a kernel of extent 3 on patches of 12 pixels (measured: 4 and 8 frames far above 16).

Cost: embedded, 3 arms x 2 seeds: a few minutes on 2 CPU cores, the 16-frame arm the longest.
ssv2_clip_b16: each of the 3 arms x N seeds trains for 50 epochs; 32 frames take four times the time of 8, and four
times the memory unless --clips-per-pass is lowered.

    python experiments/ablate_frames.py
    python experiments/ablate_frames.py --num-gpus 8 --data-root /data/ssv2 --clips-per-pass 16
"""

from collections.abc import Sequence

from stadapter.ablation import Arm, Axis, main
from stadapter.config import ConfigError, Recipe

AXIS = Axis("frames per clip", is_log=True)


def default_values(recipe: Recipe) -> Sequence[str]:
    return ("4", "8", "16") if recipe.data.dataset.startswith("embedded_") else ("8", "16", "32")


def make_arm(recipe: Recipe, value: str) -> Arm:
    if not value.isdigit() or not int(value):
        raise ConfigError(f"--values {value}: expected a number of frames such as 16")
    fields: dict[str, object] = {"data.num_frames": int(value)}
    if recipe.data.sampling == "dense":
        fields["data.frame_stride"] = max(1, recipe.data.frame_stride * recipe.data.num_frames // int(value))
    return Arm(f"{value} frames", fields, int(value))


if __name__ == "__main__":
    main(__doc__, name="frames", values=default_values, make_arm=make_arm, axis=AXIS)
