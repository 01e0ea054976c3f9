"""Crops, flips and augmentations that make decoded frames the model's pixels, drawn once per clip.

Shapes: T frames, H x W as decoded, S = frame_size, V = temporal x spatial views. Resizing is bicubic without
antialiasing, as the authors'. `exact` resizes float32 in [0, 1] and keeps the overshoot of edges beyond it, so pixels
travel as float32, four times the bytes. `fast` resizes uint8: rounded, and clamped to 0 ... 255, after each of the two
axes; at hard edges that changes a pixel by up to 0.1 normalised units.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stadapter.config import ConfigError, DataConfig
from stadapter.data.sampling import spatial_crops

_CROP_RATIO = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # random erasing's, in timm and the authors' code


def check_transforms(config: DataConfig) -> None:
    """Raise ConfigError for settings that no sampling or transform here can follow."""
    if config.sampling == "uniform" and config.test_temporal_views != 1:
        raise ConfigError(f"data.test_temporal_views = {config.test_temporal_views}: uniform sampling has 1 view")
    if config.short_side_jitter and config.random_resized_crop:
        raise ConfigError(
            "data.short_side_jitter and data.random_resized_crop: only one of them can crop a clip; set one to none"
        )
    if config.short_side_jitter and not 1 <= config.short_side_jitter[0] <= config.short_side_jitter[1]:
        raise ConfigError(
            f"data.short_side_jitter = {config.short_side_jitter}: needs 1 <= low <= high, in units of frame_size"
        )
    if config.random_resized_crop and not 0 < config.random_resized_crop[0] <= config.random_resized_crop[1] <= 1:
        raise ConfigError(
            f"data.random_resized_crop = {config.random_resized_crop}: needs 0 < low <= high <= 1, shares of the area"
        )
    if config.test_spatial_views not in (1, 3):
        raise ConfigError(f"data.test_spatial_views = {config.test_spatial_views}: must be 1 or 3")
    if config.rand_augment is not None:
        try:
            _rand_augment(config.rand_augment)
        except (AssertionError, ValueError, KeyError):
            raise ConfigError(
                f"data.rand_augment = {config.rand_augment}: timm cannot read it; write it like rand-m7-n4-mstd0.5-inc1"
            ) from None


def train_pixels(frames_THWC: np.ndarray, config: DataConfig, rng: np.random.Generator) -> Tensor:
    """Augment frames uint8 [T, H, W, 3], all alike, to pixels [T, 3, S, S]: RandAugment, crop, flip, random erasing.

    Pixels are uint8, or float32 around [0, 1] for `exact` resizing.
    """
    size = config.frame_size
    if config.rand_augment is not None:
        frames_THWC = _augment(frames_THWC, config.rand_augment, int(rng.integers(2**32)))
    pixels = _channels_first(frames_THWC, config)
    height, width = pixels.shape[-2:]
    if config.random_resized_crop is not None:
        top, left, h, w = _random_area(height, width, config.random_resized_crop, rng)
        pixels = _resize(pixels[..., top : top + h, left : left + w], size, size)
    elif config.short_side_jitter is not None:
        low, high = (round(size * share) for share in config.short_side_jitter)
        pixels = _resize_short_side(pixels, round(rng.uniform(low, high)))
        top, left = (int(rng.integers(extent - size + 1)) for extent in pixels.shape[-2:])
        pixels = pixels[..., top : top + size, left : left + size]
    else:
        pixels = _centre(pixels, size)
    if config.horizontal_flip and rng.random() < 0.5:
        pixels = pixels.flip(-1)
    if config.random_erasing and rng.random() < config.random_erasing:
        pixels = _erase(pixels, rng)
    return pixels.contiguous()


def test_views(frames_THWC: np.ndarray, config: DataConfig) -> Tensor:
    """Crop frames uint8 [Vt * T, H, W, 3], one temporal view after the other, to pixels [V, T, 3, S, S].

    Spatial views vary fastest. Pixels are uint8, or float32 around [0, 1] for `exact` resizing.
    """
    size, num_crops = config.frame_size, config.test_spatial_views
    views = []
    for start in range(0, len(frames_THWC), config.num_frames):  # a view at a time, which fits the processor's cache
        pixels = _resize_short_side(_channels_first(frames_THWC[start : start + config.num_frames], config), size)
        crops = spatial_crops(pixels.shape[-2], pixels.shape[-1], size, num_crops)
        views += [pixels[..., top : top + size, left : left + size] for top, left in crops]
    return torch.stack(views)


test_views.__test__ = False  # type: ignore[attr-defined]  # a name that pytest would collect


def pixel_dtype(config: DataConfig) -> torch.dtype:
    return torch.float32 if config.resize == "exact" else torch.uint8


def _channels_first(frames_THWC: np.ndarray, config: DataConfig) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(frames_THWC)).permute(0, 3, 1, 2)
    # Floats are resized faster plane by plane, bytes interleaved.
    return pixels.contiguous() / 255 if config.resize == "exact" else pixels


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    if pixels.shape[-2:] == (height, width):
        return pixels
    # Equal bit by bit to torchvision's resize, whose import takes as long as torch's.
    return F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False)


def _resize_short_side(pixels: Tensor, size: int) -> Tensor:
    height, width = pixels.shape[-2:]
    if height < width:
        return _resize(pixels, size, width * size // height)
    return _resize(pixels, height * size // width, size)


def _centre(pixels: Tensor, size: int) -> Tensor:
    pixels = _resize_short_side(pixels, size)
    ((top, left),) = spatial_crops(pixels.shape[-2], pixels.shape[-1], size, 1)
    return pixels[..., top : top + size, left : left + size]


def _random_area(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a crop with a random share of the area and a random aspect ratio."""
    if (box := _random_box(height, width, scale, _CROP_RATIO, rng)) is not None:
        return box
    # The frame is too long for the ratios: its centre, as wide as they allow.
    h = min(height, round(width / _CROP_RATIO[0]))
    w = min(width, round(height * _CROP_RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def _random_box(
    height: int, width: int, scale: tuple[float, float], ratios: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Return (top, left, height, width) with a share of the area in `scale` and width / height in `ratios`.

    Returns None if no attempt fits.
    """
    for _ in range(_CROP_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(ratios[0]), math.log(ratios[1])))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return None


def _erase(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Fill a random box with noise, the same box and noise in every frame."""
    box = _random_box(pixels.shape[-2], pixels.shape[-1], _ERASED_AREA, _ERASED_RATIO, rng)
    if box is None:
        return pixels
    top, left, h, w = box
    noise = torch.from_numpy(rng.integers(0, 256, (3, h, w), dtype=np.uint8))
    erased = pixels.clone()
    erased[..., top : top + h, left : left + w] = noise if pixels.dtype == torch.uint8 else noise / 255
    return erased


@functools.cache
def _rand_augment(spec: str) -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import rand_augment_transform

    return rand_augment_transform(spec, {"interpolation": Image.Resampling.BICUBIC})


def _augment(frames_THWC: np.ndarray, spec: str, seed: int) -> np.ndarray:
    """Apply timm's RandAugment with the same operations and magnitudes for every frame."""
    transform = _rand_augment(spec)
    augmented = np.empty_like(frames_THWC)
    with _global_random_state():
        for t, frame in enumerate(frames_THWC):
            # timm draws from both global generators, and how many draws it makes may depend on the draws themselves.
            random.seed(seed)
            np.random.seed(seed)
            augmented[t] = np.asarray(transform(Image.fromarray(frame)))
    return augmented


@contextmanager
def _global_random_state() -> Iterator[None]:
    """Leave Python's and NumPy's global generators as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
