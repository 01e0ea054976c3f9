"""Small real video files for tests."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

PYRAMID = "keyint=12:bframes=3:b-adapt=0:b-pyramid=normal"


def scene(num_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return frames uint8 [T, H, W, 3] of moving blocks, so that decoding from a wrong reference shows."""
    blocks = np.random.default_rng(0).integers(0, 256, (40, 80, 3))
    wall = np.kron(blocks, np.ones((8, 8, 1))).astype(np.uint8)
    return np.stack([wall[t % 60 : t % 60 + height, 2 * t % 90 : 2 * t % 90 + width] for t in range(num_frames)])


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    x264: str = "keyint=12",
    times_ms: Sequence[int] | None = None,
    rotation: int = 0,
) -> Path:
    """Encode frames uint8 [T, H, W, 3], at 30 per second or at the presentation times `times_ms`."""
    height, width = frames.shape[1:3]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=30)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        time_base = Fraction(1, 1000 if times_ms is not None else 30)
        stream.codec_context.time_base = time_base
        stream.codec_context.thread_count = 1
        if codec == "libx264":
            stream.options = {"crf": "18", "x264-params": f"{x264}:log-level=-1"}
        if rotation:
            stream.set_display_rotation(rotation)
        for t, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = (times_ms[t] if times_ms is not None else t), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_grey(path: Path, num_frames: int = 12, step: int = 16, size: int = 32) -> Path:
    """Write a clip whose frame t is all grey `step * t`, so that the mean of a decoded frame gives its number."""
    levels = np.arange(num_frames, dtype=np.uint8)[:, None, None, None] * np.uint8(step)
    return write_video(path, np.broadcast_to(levels, (num_frames, size, size, 3)))


def decode_all(path: Path) -> np.ndarray:
    """Return all frames, decoded in order: the plain reference."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)])
