"""The plain references agree with the package, and short runs of the benchmarks work."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import memory, reference_decoding, scaling
from benchmarks.data import EXACT_LIMIT, KINETICS, SSV2, measure, our_ways, peak_mib, plain_ways
from benchmarks.demo import share_of, spans, stages
from stadapter.config import ConfigError, DataConfig, Recipe
from stadapter.data.cache.frames import ClipCache
from stadapter.data.cache.quota import GB
from stadapter.data.clips import ClipDataset
from stadapter.data.lists.formats import ClipList
from stadapter.data.sampling import dense_indices
from stadapter.data.transforms import train_pixels
from stadapter.data.video.decoding import check_backend, decode
from stadapter.training.process_group import ProcessGroup


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    reference_decoding.write_clip(folder / "short.mp4", 0, seconds=0.5)
    return reference_decoding.write_clip(folder / "clip.mp4", 0, seconds=2)


@pytest.mark.parametrize("config", [KINETICS, SSV2])
def test_exact_test_views_are_the_plain_ones(clip: Path, config: DataConfig) -> None:
    config = dataclasses.replace(config, resize="exact", frame_stride=4)
    clips = ClipList("folder", "val", str(clip.parent), [clip.name], [0], [False], ("a",))
    pixels = ClipDataset(clips, config, 0, train=False)[0]["pixels"]
    torch.testing.assert_close(pixels, reference_decoding.test_pixels(clip, config), rtol=0, atol=EXACT_LIMIT)


@pytest.mark.parametrize("seed", range(4))
def test_exact_training_pixels_are_the_plain_ones(clip: Path, seed: int) -> None:
    config = dataclasses.replace(KINETICS, resize="exact", frame_stride=4)
    rng = np.random.default_rng(seed)
    frames = decode(clip, lambda total: dense_indices(total, config.num_frames, config.frame_stride, rng))
    pixels = train_pixels(frames, config, rng)
    torch.testing.assert_close(pixels, reference_decoding.train_pixels(clip, config, seed), rtol=0, atol=EXACT_LIMIT)


def test_the_lean_reference_gives_the_plain_pixels(clip: Path) -> None:
    full, lean = (reference_decoding.train_pixels(clip, KINETICS, 3, lean=lean) for lean in (False, True))
    torch.testing.assert_close(lean, full, rtol=0, atol=EXACT_LIMIT)


def test_every_way_is_measured(clip: Path, tmp_path: Path) -> None:
    methods = our_ways(ClipCache(clip.parent, GB, "", tmp_path))
    ms = measure(plain_ways() | {method.name: method.run for method in methods}, [clip], rounds=1)
    assert all(ms[method.name] > 0 and method.reference in ms for method in methods)
    assert ms["temporal"] > ms["test clip, 3 temporal views"]


def test_a_test_clip_needs_far_less_memory_than_the_plain_way(clip: Path) -> None:
    (ours,) = (
        m.run for m in our_ways(ClipCache(clip.parent, GB, "", clip.parent / "c")) if m.name.endswith("spatial views")
    )
    assert peak_mib(ours, clip) < 143


@pytest.mark.parametrize(("way", "opens"), [("pyav", 1500), ("cache", 1500), ("decord", 500), ("torchcodec", 500)])
def test_many_random_opens_hold_memory_flat(way: str, opens: int, tmp_path: Path) -> None:
    if way != "cache":
        try:
            check_backend(way)
        except ConfigError as error:
            pytest.skip(str(error))
    resident = memory.resident_mib(opens, way, memory.write_files(tmp_path))
    # A frame kept by mistake has at least 9 KiB: four per open would be 16 MiB and more.
    assert memory.growth_mib(resident) < 8


def test_two_processes_at_the_pace_of_one_are_fully_efficient_where_each_has_as_many_clips() -> None:
    one, *_ = scaling.cases(8)
    strong, weak = (scaling.Case("", 2, clips) for clips in (4, 8))
    measured = scaling.Measured(one, 0.1, 0)
    assert scaling.efficiency(measured, scaling.Measured(weak, 0.1, 0.01)) == 1
    assert scaling.efficiency(measured, scaling.Measured(strong, 0.1, 0.01)) == 0.5


def test_the_training_loop_s_own_steps_are_timed(tiny_recipe: Recipe, tmp_path: Path) -> None:
    took, exchanges = scaling.time_steps(tiny_recipe, ProcessGroup(), 2, 3, tmp_path)
    assert len(took) == 3 and all(0 < seconds < 60 for seconds in took)
    assert exchanges == [0, 0, 0]
    assert not list(tmp_path.iterdir())


def test_the_demo_s_time_divides_into_before_between_after_and_inside() -> None:
    trials = [(110.0, 130.0), (112.0, 120.0), (125.0, 140.0), (143.0, 150.0)]
    share = share_of((100, 155), trials)
    assert (share.total, share.inside, share.outside) == (55, 37, 18)
    assert (share.before, share.between, share.after) == (10, 3, 5)
    lines = [(104.0, "recipe embedded: 4 arms"), (107.0, "running 8 on the CPU"), (153.0, "arm  top-1 %")]
    assert [seconds for _, seconds in stages((100, 155), lines, trials)] == [4, 3, 3, 3, 2]


def test_the_demo_s_trials_are_read_from_their_records() -> None:
    (trial,) = spans(Path(__file__).parent / "data" / "made_before")
    assert trial[0] < trial[1]


def test_a_trial_of_another_run_does_not_count_as_the_demo_s() -> None:
    with pytest.raises(ValueError, match="did not all run within"):
        share_of((100, 155), [(90.0, 120.0)])
    with pytest.raises(ValueError, match="did not all run within"):
        share_of((100, 155), [])
