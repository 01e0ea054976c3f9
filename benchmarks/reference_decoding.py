"""The reference way from a video file to pixels, and the clips to measure on.

The plain way decodes every frame, converts and resizes all of them in float, then picks. The lean way picks before it
converts and resizes: only decoding fewer frames can beat it.

Shapes: N frames in the file, T sampled frames, V views, S = frame_size. Pixels are float32 around [0, 1].
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stadapter.config import DataConfig
from stadapter.data.sampling import dense_indices, spatial_crops, uniform_indices

FPS, SECONDS, HEIGHT, WIDTH = 30, 10, 256, 340


def write_clip(path: Path, seed: int, seconds: float = SECONDS) -> Path:
    """Write a clip of 340x256 pixels, H.264 as `ffmpeg` encodes it by default, and return its path.

    A camera pans over a photograph with a moving object and noise.
    """
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    photos = load_sample_images().images
    photo = np.asarray(Image.fromarray(photos[seed % len(photos)]).resize((1000, 700), Image.Resampling.BICUBIC))
    phases = rng.uniform(0, 2 * np.pi, 4)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "23", "preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        for t in range(round(seconds * FPS)):
            angle = 2 * np.pi * t / (SECONDS * FPS)
            y, x = int(222 + 180 * np.sin(1.3 * angle + phases[0])), int(330 + 280 * np.sin(1.7 * angle + phases[1]))
            frame = photo[y : y + HEIGHT, x : x + WIDTH].astype(np.int16)
            y, x = int(100 + 80 * np.sin(3 * angle + phases[2])), int(150 + 120 * np.cos(2 * angle + phases[3]))
            frame[y : y + 60, x : x + 60] = photo[300:360, 300 + t : 360 + t]
            frame += rng.normal(0, 3, frame.shape).astype(np.int16)
            picture = av.VideoFrame.from_ndarray(np.clip(frame, 0, 255).astype(np.uint8), format="rgb24")
            picture.pts = t
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def test_pixels(path: Path, config: DataConfig) -> Tensor:
    """Return the test views of a clip, [V, T, 3, S, S], spatial views fastest."""
    size = config.frame_size
    pixels_N = _short_side(_as_float(_decode(path)), size)
    crops = spatial_crops(pixels_N.shape[-2], pixels_N.shape[-1], size, config.test_spatial_views)
    views = [
        pixels_N[_test_indices(len(pixels_N), config, view), :, top : top + size, left : left + size]
        for view in range(config.test_temporal_views)
        for top, left in crops
    ]
    return torch.stack(views)


test_pixels.__test__ = False  # type: ignore[attr-defined]  # pytest would collect this name


def train_pixels(path: Path, config: DataConfig, seed: int, *, lean: bool = False) -> Tensor:
    """Return training frames [T, 3, S, S]: dense sampling, jittered short side, crop, flip, drawn as in `stadapter`."""
    assert config.sampling == "dense" and config.short_side_jitter is not None
    rng = np.random.default_rng(seed)
    size, (low, high) = config.frame_size, config.short_side_jitter
    if lean:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_count = 1
            frames = list(container.decode(video=0))
            indices = dense_indices(len(frames), config.num_frames, config.frame_stride, rng)
            picked = np.stack([frames[i].to_ndarray(format="rgb24", threads=1) for i in indices])
    else:
        picked = _decode(path)
        indices = dense_indices(len(picked), config.num_frames, config.frame_stride, rng)
    pixels = _short_side(_as_float(picked), round(rng.uniform(round(size * low), round(size * high))))
    top, left = (int(rng.integers(extent - size + 1)) for extent in pixels.shape[-2:])
    pixels = pixels[..., top : top + size, left : left + size]
    if config.horizontal_flip and rng.random() < 0.5:
        pixels = pixels.flip(-1)
    return (pixels if lean else pixels[indices]).contiguous()


def _decode(path: Path) -> np.ndarray:
    """Return every frame of a video, uint8 [N, H, W, 3]."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)])


def _as_float(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().float() / 255


def _short_side(pixels: Tensor, size: int) -> Tensor:
    height, width = pixels.shape[-2:]
    target = (size, width * size // height) if height < width else (height * size // width, size)
    return F.interpolate(pixels, target, mode="bicubic", align_corners=False)


def _test_indices(total: int, config: DataConfig, view: int) -> list[int]:
    if config.sampling == "uniform":
        return uniform_indices(total, config.num_frames)
    return dense_indices(total, config.num_frames, config.frame_stride, view=view, num_views=config.test_temporal_views)
