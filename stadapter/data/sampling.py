"""Index arithmetic: the frames that are sampled from a clip, and the crops of a frame.

The rules are those of the ST-Adapter authors' training commands; see `[recipe.*]` of the paper's reference values.
With a random generator a function follows the training rule, with None the deterministic testing rule. Every index
lies in [0, num_total) for any clip of at least one frame; short clips repeat frames.
"""

from __future__ import annotations

import itertools

import numpy as np


def uniform_indices(num_total: int, num_frames: int, rng: np.random.Generator | None = None) -> list[int]:
    """Return one frame from each of `num_frames` equal segments: a random one in training, the middle one in testing.

    Neighbouring segments share their end frames, as the authors' do: a frame can be drawn twice in a row.
    """
    _check(num_total, num_frames)
    length = (num_total - 1) / num_frames
    ends = [round(length * i) for i in range(num_frames + 1)]
    if rng is None:
        return [(start + end) // 2 for start, end in itertools.pairwise(ends)]
    return [int(rng.integers(start, end + 1)) for start, end in itertools.pairwise(ends)]


def dense_indices(
    num_total: int,
    num_frames: int,
    stride: int,
    rng: np.random.Generator | None = None,
    view: int = 0,
    num_views: int = 1,
) -> list[int]:
    """Return `num_frames` frames, `stride` apart.

    They start at a random place in training; in testing at start number `view` of `num_views` that are spread evenly
    over the clip (a single one: in the middle).

    A clip shorter than the span repeats the last frame it can give: in training the last one on the stride's grid, in
    testing the clip's last one.
    """
    _check(num_total, num_frames)
    slack = num_total - (stride * (num_frames - 1) + 1)
    if rng is not None:
        start = int(rng.integers(slack + 1)) if slack > 0 else 0
        last = start + (num_total - 1 - start) // stride * stride
    else:
        start = (max(slack, 0) // 2) if num_views == 1 else round(max(slack, 0) / (num_views - 1) * view)
        last = num_total - 1
    return [min(start + stride * i, last) for i in range(num_frames)]


def spatial_crops(height: int, width: int, size: int, num_views: int) -> list[tuple[int, int]]:
    """Return (top, left) of the `size` x `size` test crops: the centre, or begin, middle and end of the longer side."""
    top, left = (height - size) // 2, (width - size) // 2
    if num_views == 1:
        return [(top, left)]
    if num_views != 3:
        raise ValueError(f"num_views = {num_views}: there are rules for 1 and 3 spatial views")
    if height > width:
        return [(place, left) for place in (0, top, height - size)]
    return [(top, place) for place in (0, left, width - size)]


def _check(num_total: int, num_frames: int) -> None:
    if num_total < 1 or num_frames < 1:
        raise ValueError(f"cannot take {num_frames} frames from a clip of {num_total}")
