"""Resizing, cropping and augmenting frames."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stadapter.config import ConfigError, DataConfig
from stadapter.data import transforms
from stadapter.data.transforms import train_pixels

SIZE, FRAMES = 32, 4


def config(**fields: object) -> DataConfig:
    return DataConfig("folder", 2, num_frames=FRAMES, frame_size=SIZE, **fields)  # type: ignore[arg-type]


def frames(height: int, width: int, count: int = FRAMES) -> np.ndarray:
    """Return noise that changes from frame to frame."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def still(height: int, width: int) -> np.ndarray:
    """Return the same picture in every frame."""
    return np.repeat(frames(height, width, 1), FRAMES, axis=0)


AUGMENTED = {
    "jitter": config(short_side_jitter=(1.0, 1.15), horizontal_flip=True),
    "resized_crop": config(random_resized_crop=(0.08, 1.0)),
    "rand_augment": config(random_resized_crop=(0.08, 1.0), rand_augment="rand-m7-n4-mstd0.5-inc1"),
}


def test_frames_of_the_right_size_pass_through_unchanged() -> None:
    given = frames(SIZE, SIZE)
    expected = torch.from_numpy(given).permute(0, 3, 1, 2)
    assert torch.equal(train_pixels(given, config(), np.random.default_rng(0)), expected)
    assert torch.equal(transforms.test_views(given, config()), expected[None])


@pytest.mark.parametrize("name", AUGMENTED)
@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (20, 90), (SIZE, SIZE), (5, 7)])
def test_training_pixels_are_uint8_of_the_frame_size(name: str, height: int, width: int) -> None:
    for seed in range(5):
        pixels = train_pixels(frames(height, width), AUGMENTED[name], np.random.default_rng(seed))
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (FRAMES, 3, SIZE, SIZE))


@pytest.mark.parametrize("name", AUGMENTED)
def test_every_frame_of_a_clip_is_augmented_alike(name: str) -> None:
    for seed in range(20):
        pixels = train_pixels(still(40, 60), AUGMENTED[name], np.random.default_rng(seed))
        assert torch.equal(pixels, pixels[:1].expand_as(pixels))


@pytest.mark.parametrize("name", AUGMENTED)
def test_a_draw_depends_on_the_generator_alone(name: str) -> None:
    random.seed(1)
    first = train_pixels(frames(40, 60), AUGMENTED[name], np.random.default_rng(7))
    random.seed(2)
    np.random.seed(2)
    second = train_pixels(frames(40, 60), AUGMENTED[name], np.random.default_rng(7))
    other = train_pixels(frames(40, 60), AUGMENTED[name], np.random.default_rng(8))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_rand_augment_leaves_the_global_generators_alone() -> None:
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), np.random.rand()
    random.seed(3)
    np.random.seed(3)
    train_pixels(frames(40, 60), AUGMENTED["rand_augment"], np.random.default_rng(0))
    assert (random.random(), np.random.rand()) == expected


def test_short_side_jitter_at_1_only_crops() -> None:
    given = frames(SIZE, 60)
    pixels = train_pixels(given, config(short_side_jitter=(1.0, 1.0)), np.random.default_rng(0))
    whole = torch.from_numpy(given).permute(0, 3, 1, 2)
    assert any(torch.equal(pixels, whole[..., left : left + SIZE]) for left in range(60 - SIZE + 1))


def test_a_flip_mirrors_half_of_the_clips() -> None:
    given = frames(SIZE, SIZE)
    plain = torch.from_numpy(given).permute(0, 3, 1, 2)
    flipped = 0
    for seed in range(100):
        pixels = train_pixels(given, config(horizontal_flip=True), np.random.default_rng(seed))
        assert torch.equal(pixels, plain) or torch.equal(pixels, plain.flip(-1))
        flipped += torch.equal(pixels, plain.flip(-1))
    assert 30 < flipped < 70


def test_resizing_is_the_authors_up_to_rounding_where_nothing_overshoots() -> None:
    given = frames(48, 60) // 3 + 80
    pixels = transforms.test_views(given, config())[0]
    whole = torch.from_numpy(given).permute(0, 3, 1, 2).float()
    exact = F.interpolate(whole, size=(SIZE, 60 * SIZE // 48), mode="bicubic", align_corners=False)
    assert (pixels.float() - exact[..., 4:-4]).abs().max() <= 1.5


@pytest.mark.parametrize("resize", ["fast", "exact"])
@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 41), (20, 90)])
def test_resizing_is_bit_by_bit_torchvision_s(resize: str, height: int, width: int) -> None:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as torchvision

    pixels = transforms._channels_first(frames(height, width), config(resize=resize))
    expected = torchvision.resize(pixels, [SIZE, 37], interpolation=InterpolationMode.BICUBIC, antialias=False)
    assert torch.equal(transforms._resize(pixels, SIZE, 37), expected)


def test_three_spatial_views_are_begin_middle_and_end() -> None:
    given = frames(SIZE, 64)
    whole = torch.from_numpy(given).permute(0, 3, 1, 2)
    views = transforms.test_views(given, config(test_spatial_views=3))
    assert torch.equal(views, torch.stack([whole[..., left : left + SIZE] for left in (0, 16, 32)]))


def test_temporal_views_come_one_after_the_other() -> None:
    given = frames(SIZE, 64, count=2 * FRAMES)
    views = transforms.test_views(given, config(test_spatial_views=3, test_temporal_views=2))
    assert views.shape == (6, FRAMES, 3, SIZE, SIZE)
    assert torch.equal(views[:3], transforms.test_views(given[:FRAMES], config(test_spatial_views=3)))
    assert torch.equal(views[3:], transforms.test_views(given[FRAMES:], config(test_spatial_views=3)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"short_side_jitter": (1.0, 1.2), "random_resized_crop": (0.1, 1.0)}, "only one"),
        ({"short_side_jitter": (0.5, 1.2)}, "short_side_jitter"),
        ({"random_resized_crop": (0.0, 1.0)}, "random_resized_crop"),
        ({"test_spatial_views": 2}, "test_spatial_views = 2"),
        ({"rand_augment": "augmix"}, "rand_augment = augmix"),
    ],
)
def test_settings_that_cannot_work_are_config_errors(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        transforms.check_transforms(config(**fields))


# --- exact resizing


def plain(given: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Return pixels resized as by the authors, after normalising in float32; the normalisation is undone to compare."""
    mean, std = 0.45, 0.225
    normalised = (torch.from_numpy(given).permute(0, 3, 1, 2).float() / 255 - mean) / std
    resized = F.interpolate(normalised, size=(height, width), mode="bicubic", align_corners=False)
    return resized * std + mean


def test_exact_test_views_equal_a_plain_float_reference() -> None:
    given = frames(48, 80)
    expected = plain(given, SIZE, 53)[..., :, 10:42]
    views = transforms.test_views(given, config(resize="exact"))
    assert torch.allclose(views[0], expected, atol=1e-5)
    assert views.min() < 0 and views.max() > 1  # edges overshoot, and stay


def test_fast_resizing_rounds_and_clamps_what_exact_keeps() -> None:
    given = frames(48, 80)
    exact, fast = (transforms.test_views(given, config(resize=kind)) for kind in ("exact", "fast"))
    assert fast.dtype == torch.uint8
    assert (exact.clamp(0, 1) - fast / 255).abs().mean() < 0.01


@pytest.mark.parametrize("name", AUGMENTED)
def test_exact_training_pixels_are_the_same_crops_in_float(name: str) -> None:
    exact = dataclasses.replace(AUGMENTED[name], resize="exact")
    a, b = (train_pixels(frames(40, 60), c, np.random.default_rng(3)) for c in (AUGMENTED[name], exact))
    assert (b.dtype, b.shape) == (torch.float32, a.shape)
    assert (a / 255 - b.clamp(0, 1)).abs().mean() < 0.02


# --- random erasing


@pytest.mark.parametrize("resize", ["fast", "exact"])
def test_random_erasing_takes_one_box_from_all_frames(resize: str) -> None:
    for seed in range(20):
        before, after = (
            train_pixels(still(SIZE, SIZE), config(random_erasing=share, resize=resize), np.random.default_rng(seed))
            for share in (0.0, 1.0)
        )
        assert torch.equal(after, after[:1].expand_as(after))
        changed = (before != after).any(dim=1)[0]
        rows, columns = (changed.any(dim=axis).nonzero().flatten() for axis in (1, 0))
        height, width = (int(place[-1] - place[0]) + 1 for place in (rows, columns))
        assert 0.015 * SIZE**2 <= height * width <= 0.4 * SIZE**2
        assert changed.float().sum() > 0.9 * height * width


def test_random_erasing_happens_with_its_probability() -> None:
    given = still(SIZE, SIZE)
    untouched = train_pixels(given, config(), np.random.default_rng(0))
    erased = [
        not torch.equal(train_pixels(given, config(random_erasing=0.25), np.random.default_rng(seed)), untouched)
        for seed in range(400)
    ]
    assert 0.17 < np.mean(erased) < 0.33
