"""The frames and crops sampled from a clip."""

from __future__ import annotations

import numpy as np
import pytest

from stadapter.data.sampling import dense_indices, spatial_crops, uniform_indices

TOTALS = [*range(1, 40), 100, 299, 300, 10_000]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_frames", [1, 3, 8, 32])
def test_uniform_indices_lie_in_any_clip_and_never_go_back(num_frames: int, training: bool) -> None:
    rng = np.random.default_rng(0)
    for total in TOTALS:
        for _ in range(10 if training else 1):
            indices = uniform_indices(total, num_frames, rng if training else None)
            assert len(indices) == num_frames
            assert set(indices) <= set(range(total))
            assert indices == sorted(indices)


@pytest.mark.parametrize("num_views", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 4, 16])
@pytest.mark.parametrize("num_frames", [1, 8, 32])
def test_dense_indices_lie_in_any_clip_and_never_go_back(num_frames: int, stride: int, num_views: int) -> None:
    rng = np.random.default_rng(0)
    for total in TOTALS:
        drawn = [dense_indices(total, num_frames, stride, rng) for _ in range(10)]
        views = [dense_indices(total, num_frames, stride, None, view, num_views) for view in range(num_views)]
        for indices in drawn + views:
            assert len(indices) == num_frames
            assert set(indices) <= set(range(total))
            assert indices == sorted(indices)


def test_uniform_testing_takes_the_middle_of_each_segment() -> None:
    assert uniform_indices(16, 8) == [1, 3, 5, 7, 8, 10, 12, 14]
    assert uniform_indices(81, 8) == [5, 15, 25, 35, 45, 55, 65, 75]


def test_uniform_training_reaches_every_frame_of_a_segment() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([uniform_indices(81, 8, rng) for _ in range(500)])
    assert [set(column) for column in drawn.T] == [set(range(10 * i, 10 * i + 11)) for i in range(8)]


def test_dense_training_reaches_every_start() -> None:
    rng = np.random.default_rng(0)
    drawn = [dense_indices(20, 4, 5, rng) for _ in range(200)]
    assert {indices[0] for indices in drawn} == {0, 1, 2, 3, 4}
    assert all(np.diff(indices).tolist() == [5, 5, 5] for indices in drawn)


def test_dense_testing_spreads_its_views_from_begin_to_end() -> None:
    views = [dense_indices(300, 8, 16, None, view, 3) for view in range(3)]
    assert [(indices[0], indices[-1]) for indices in views] == [(0, 112), (94, 206), (187, 299)]
    assert dense_indices(300, 8, 16)[0] == 93


def test_dense_indices_of_a_short_clip_repeat_the_last_frame_they_can_give() -> None:
    assert dense_indices(10, 4, 4, np.random.default_rng(0)) == [0, 4, 8, 8]
    assert dense_indices(10, 4, 4) == [0, 4, 8, 9]


def test_one_spatial_crop_is_the_centre() -> None:
    assert spatial_crops(224, 300, 224, 1) == [(0, 38)]


def test_three_spatial_crops_follow_the_longer_side() -> None:
    assert spatial_crops(224, 301, 224, 3) == [(0, 0), (0, 38), (0, 77)]
    assert spatial_crops(301, 224, 224, 3) == [(0, 0), (38, 0), (77, 0)]


def test_an_empty_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="clip of 0"):
        uniform_indices(0, 8)
