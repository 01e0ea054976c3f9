"""The cache of decoded frames."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from videos import decode_all, scene, write_video

from stadapter.config import ConfigError, DataConfig, Recipe, replace
from stadapter.data.cache.disk_need import DiskNeed, describe, disk_need
from stadapter.data.cache.frames import ClipCache, decode_settings, open_cache
from stadapter.data.cache.quota import GB, disk_bytes
from stadapter.data.cache.row_file import BLOCK
from stadapter.data.clips import ClipDataset, train_loader
from stadapter.data.lists import storage
from stadapter.data.lists.formats import ClipList
from stadapter.data.lists.storage import LocalCopies
from stadapter.data.reader import Reading, read_frames
from stadapter.data.video import decoding
from stadapter.data.video.decoding import ClipError, decode
from stadapter.data.video.packets import Indices, PathLike
from stadapter.training.flags import add_reading_flags, reading_flags
from stadapter.training.loop import train
from stadapter.training.options import TrainOptions

FRAMES = 20
FRAME_BYTES = 48 * 64 * 3


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "a.mp4", scene(FRAMES))


@pytest.fixture
def make(tmp_path: Path, video: Path) -> Callable[..., ClipCache]:
    def make(limit_bytes: int = GB, settings: str = "plain", root: Path | None = None) -> ClipCache:
        return ClipCache(root or video.parent, limit_bytes, settings, tmp_path / "cache")

    return make


class Decoder:
    """A decoder that records the requested frames."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, path: PathLike, indices: Indices) -> np.ndarray:
        def note(total: int) -> Sequence[int]:
            wanted = list(indices(total) if callable(indices) else indices)
            self.asked.append(wanted)
            return wanted

        return decode(path, note)


def test_cached_frames_are_the_decoded_frames(make: Callable[..., ClipCache], video: Path) -> None:
    expected, cache = decode_all(video), make()
    rng = np.random.default_rng(0)
    for _ in range(30):
        wanted = rng.integers(0, FRAMES, 5).tolist()
        np.testing.assert_array_equal(cache.read(video, wanted, decode), expected[wanted])


def test_only_missing_frames_are_decoded(make: Callable[..., ClipCache], video: Path) -> None:
    cache, decoder = make(), Decoder()
    for wanted in ([3, 1, 3], [1, 3], [3, 7, 2, 7], [7]):
        cache.read(video, wanted, decoder)
    assert decoder.asked == [[3, 1, 3], [2, 7]]


def test_a_request_that_draws_is_made_once(make: Callable[..., ClipCache], video: Path) -> None:
    cache, calls = make(), []

    def draw(total: int) -> list[int]:
        calls.append(total)
        return [len(calls)]

    cache.read(video, draw, decode)
    cache.read(video, draw, decode)
    assert calls == [FRAMES, FRAMES]


def test_another_cache_object_finds_the_frames(make: Callable[..., ClipCache], video: Path) -> None:
    make().read(video, [4], decode)
    decoder = Decoder()
    pickle.loads(pickle.dumps(make())).read(video, [4], decoder)
    assert not decoder.asked


def test_a_changed_file_is_decoded_again(make: Callable[..., ClipCache], tmp_path: Path) -> None:
    path, cache = tmp_path / "b.mp4", make()
    write_video(path, scene(FRAMES))
    cache.read(path, [0, 5], decode)
    write_video(path, scene(FRAMES)[::-1])
    np.testing.assert_array_equal(cache.read(path, [0, 5], decode), decode_all(path)[[0, 5]])


def test_other_decoder_settings_have_frames_of_their_own(make: Callable[..., ClipCache], video: Path) -> None:
    make().read(video, [4], decode)
    small = make(settings=decode_settings("auto", 24))
    frames = small.read(video, [4], lambda path, indices: decode(path, indices, short_side=24))
    assert frames.shape == (1, 24, 32, 3)


def test_settings_tell_readers_and_sizes_apart_but_not_two_names_of_one() -> None:
    assert decode_settings("auto", None) == decode_settings("pyav", None)
    assert len({decode_settings(b, s) for b in ("pyav", "decord", "torchcodec") for s in (None, 256)}) == 6


def test_a_damaged_frame_is_decoded_again(make: Callable[..., ClipCache], video: Path) -> None:
    cache, decoder = make(), Decoder()
    cache.read(video, range(FRAMES), decode)
    (file,) = (path for path in cache.clips.glob("*/*") if path.is_file())
    with open(file, "r+b") as handle:
        handle.seek(4096 + 6 * FRAME_BYTES + 100)
        handle.write(bytes(50))
    np.testing.assert_array_equal(cache.read(video, [5, 6, 7], decoder), decode_all(video)[5:8])
    assert decoder.asked == [[6]]
    cache.read(video, [5, 6, 7], decoder)
    assert len(decoder.asked) == 1


def test_a_cached_clip_at_an_address_is_not_fetched_again(
    make: Callable[..., ClipCache], video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"local://{video}"
    reading = Reading(cache=make(), local_copies=LocalCopies(tmp_path / "spill", GB))
    first = read_frames(address, lambda total: [1, 5], reading)
    monkeypatch.setattr(storage, "local_copy", None)  # calling it would be an error
    np.testing.assert_array_equal(read_frames(address, lambda total: [5, 1], reading), first[::-1])
    np.testing.assert_array_equal(first, decode_all(video)[[1, 5]])


def test_an_address_has_one_place_wherever_a_process_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trial of a sweep works in a separate folder."""
    places = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        places.append(ClipCache("s3://bucket/ssv2", 10**6, "settings", tmp_path / "cache").clips)
    assert places[0] == places[1]


@pytest.mark.parametrize("content", [b"", b"stacl", bytes(5000)])
def test_a_file_that_is_no_cached_clip_is_replaced(make: Callable[..., ClipCache], video: Path, content: bytes) -> None:
    cache = make()
    cache.read(video, [2], decode)
    (file,) = (path for path in cache.clips.glob("*/*") if path.is_file())
    file.write_bytes(content)
    np.testing.assert_array_equal(cache.read(video, [2], decode), decode_all(video)[[2]])
    decoder = Decoder()
    np.testing.assert_array_equal(cache.read(video, [2], decoder), decode_all(video)[[2]])
    assert not decoder.asked


def test_a_full_cache_stays_within_its_limit_and_changes_no_frame(make: Callable[..., ClipCache], video: Path) -> None:
    limit = 60_000
    cache = make(limit)
    for wanted in ([0, 1, 2], [3, 4], list(range(FRAMES))):
        np.testing.assert_array_equal(cache.read(video, wanted, decode), decode_all(video)[wanted])
    assert 0 < make(limit).used_bytes() <= limit
    decoder = Decoder()
    cache.read(video, [0, 1, 2], decoder)
    assert not decoder.asked  # cached frames stay cached


def test_a_new_data_set_takes_the_room_of_an_old_one(make: Callable[..., ClipCache], video: Path) -> None:
    old = make(100_000)
    old.read(video, range(6), decode)
    old.quota._protection.close()  # type: ignore[union-attr]  # as when its process ends
    new = make(60_000, root=Path("/elsewhere"))
    assert new.used_bytes() < 10_000
    assert not old.clips.exists()


def test_clips_that_a_process_uses_are_not_removed(make: Callable[..., ClipCache], video: Path) -> None:
    used = make(100_000)
    used.read(video, range(6), decode)
    make(60_000, root=Path("/elsewhere"))
    decoder = Decoder()
    used.read(video, range(6), decoder)
    assert not decoder.asked


def test_a_disk_without_room_costs_nothing_but_speed(
    make: Callable[..., ClipCache], video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    cache = make()
    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"--cache-gb: no more is kept in .*: No space left on device"):
            np.testing.assert_array_equal(cache.read(video, [1], decode), decode_all(video)[[1]])


def test_what_cannot_be_decoded_is_not_cached(make: Callable[..., ClipCache], tmp_path: Path) -> None:
    cache, path = make(), tmp_path / "bad.mp4"
    path.write_bytes(b"no video")
    for _ in range(2):
        with pytest.raises(ClipError, match=r"bad.mp4"):
            cache.read(path, [0], decode)
    with pytest.raises(ClipError, match=r"gone.mp4: .*No such file"):
        cache.read(tmp_path / "gone.mp4", [0], decode)


def test_an_index_outside_a_cached_clip_is_a_clip_error(make: Callable[..., ClipCache], video: Path) -> None:
    cache = make()
    cache.read(video, [0], decode)
    with pytest.raises(ClipError, match=r"frame 20 was asked for, but the clip has 20"):
        cache.read(video, [20], decode)


def test_a_folder_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--cache-gb: .*cannot be written .*set STADAPTER_CACHE"):
        ClipCache("/data", GB, "", tmp_path / "file" / "cache")


WRITE_FOR_EVER = """
import sys
from pathlib import Path
import numpy as np
from stadapter.data.cache.frames import ClipCache
cache = ClipCache("/data", 10**9, "", Path(sys.argv[1]))
big = np.random.default_rng(0).integers(0, 256, (40, 240, 320, 3), np.uint8)
decode = lambda path, indices: big[indices(40) if callable(indices) else indices]
print("ready", flush=True)
for path in sys.argv[2:]:
    cache.read(path, range(40), decode)
"""


def test_a_kill_while_writing_leaves_no_frame_that_is_wrong(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.mp4") for i in range(400)]
    for path in paths:
        Path(path).write_bytes(b"stands for a video")
    expected = np.random.default_rng(0).integers(0, 256, (40, 240, 320, 3), np.uint8)
    written = []
    for attempt in range(3):
        folder = tmp_path / f"cache{attempt}"
        command = [sys.executable, "-c", WRITE_FOR_EVER, str(folder), *paths[attempt * 100 : attempt * 100 + 100]]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(0.05 + 0.03 * attempt)
            writer.send_signal(signal.SIGKILL)
        asked: list[int] = []

        def decode_again(path: PathLike, indices: Indices, asked: list[int] = asked) -> np.ndarray:
            wanted = list(indices(40) if callable(indices) else indices)
            asked.extend(wanted)
            return expected[wanted]

        cache = ClipCache("/data", GB, "", folder)
        for path in paths[attempt * 100 : attempt * 100 + 10]:
            np.testing.assert_array_equal(cache.read(path, range(40), decode_again), expected)
        written.append(400 - len(asked))
    assert max(written) > 0  # the kill came while frames were being written


READ_AT_RANDOM = """
import sys
from pathlib import Path
import numpy as np
from stadapter.data.cache.frames import ClipCache
from stadapter.data.video.decoding import decode
video, seed = Path(sys.argv[1]), int(sys.argv[3])
cache = ClipCache(video.parent, 10**9, "", Path(sys.argv[2]))
expected = decode(video, lambda total: range(total))
rng = np.random.default_rng(seed)
for _ in range(100):
    wanted = rng.integers(0, len(expected), 3).tolist()
    assert np.array_equal(cache.read(video, wanted, decode), expected[wanted])
"""


def test_processes_that_read_and_write_at_once_see_whole_frames(video: Path, tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", READ_AT_RANDOM, video, tmp_path / "cache", str(seed)] for seed in range(3)]
    readers = [subprocess.Popen(command) for command in commands]
    assert [reader.wait(60) for reader in readers] == [0, 0, 0]


CONFIG = DataConfig("folder", 6, num_frames=4, frame_size=32, random_resized_crop=(0.5, 1.0))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ClipList:
    root = tmp_path_factory.mktemp("clips")
    paths = [f"{i}.mp4" for i in range(6)]
    for i, path in enumerate(paths):
        write_video(root / path, scene(12 + i))
    return ClipList("folder", "train", str(root), paths, list(range(6)), [False] * 6, tuple("abcdef"))


def _epochs(clips: ClipList, config: DataConfig, cache: ClipCache | None, num_workers: int = 0) -> list[torch.Tensor]:
    dataset = ClipDataset(clips, config, seed=1, train=True, reading=Reading(cache=cache))
    return [batch["pixels"] for batch in train_loader(dataset, 3, steps=range(6), num_workers=num_workers)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_second_trial_is_equal_and_decodes_nothing(
    clips: ClipList, make: Callable[..., ClipCache], monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    cache = make(root=Path(clips.root))
    plain = _epochs(clips, CONFIG, None)
    first = _epochs(clips, CONFIG, cache, num_workers)
    monkeypatch.setattr(decoding, "_decode_pyav", None)  # calling it would be an error
    second = _epochs(clips, CONFIG, cache)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, first, second, strict=True))


def test_with_fixed_frames_the_second_epoch_decodes_nothing(clips: ClipList, make: Callable[..., ClipCache]) -> None:
    config = dataclasses.replace(CONFIG, fixed_frames=True)
    cache = make(root=Path(clips.root))
    _epochs(clips, config, cache)
    used = cache.used_bytes()
    per_clip = used / len(clips)
    assert per_clip <= 4 * (FRAME_BYTES + 4096) + 4096
    dataset = ClipDataset(clips, config, seed=2, train=True, reading=Reading(cache=cache))
    dataset[7, 3]
    assert cache.used_bytes() == used


def test_the_disk_need_is_what_is_then_used(clips: ClipList, make: Callable[..., ClipCache]) -> None:
    config = dataclasses.replace(CONFIG, num_frames=3)
    estimate = disk_need({"train": clips}, config, epochs=4, num_seeds=1)
    dataset = ClipDataset(clips, config, 0, train=True, reading=Reading(cache=make(root=Path(clips.root))))
    for epoch, index in itertools.product(range(4), range(len(clips))):
        dataset[epoch, index]
    assert estimate.all_frames == sum(range(12, 18)) * FRAME_BYTES
    assert 0.7 < make(root=Path(clips.root)).used_bytes() / estimate.looked_at < 1.3


def test_more_epochs_and_seeds_never_need_more_than_all_frames(clips: ClipList) -> None:
    lists = {"train": clips, "val": clips, "test": clips}
    needs = [disk_need(lists, CONFIG, epochs, num_seeds=epochs).looked_at for epochs in (1, 2, 30)]
    assert needs == sorted(needs)
    tests_too = len(clips) * CONFIG.num_frames * (FRAME_BYTES + BLOCK)
    assert needs[-1] <= sum(range(12, 18)) * (FRAME_BYTES + BLOCK) + tests_too


def test_a_need_above_the_limit_is_told(tmp_path: Path) -> None:
    text = describe(DiskNeed(20 * GB, 80 * GB), 5, 2, tmp_path)
    assert f"clip cache: {tmp_path}, at most 5 GB per node; the frames that 2 seeds look at need about 20 GB" in text
    assert "all frames 80 GB" in text
    assert "room for 25 % of them" in text
    assert "room" not in describe(DiskNeed(GB, GB), 5, 1, tmp_path)


def test_the_second_trial_of_a_sweep_decodes_nothing(
    tiny_recipe: Recipe, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STADAPTER_CACHE", str(tmp_path))
    open_cache.cache_clear()
    recipe = replace(tiny_recipe, **{"optim.epochs": 1})
    plain = train(recipe, tmp_path / "plain", TrainOptions(clip_folder))
    first = train(recipe, tmp_path / "first", TrainOptions(clip_folder, cache_gb=1))
    monkeypatch.setattr(decoding, "_decode_pyav", None)  # calling it would be an error
    again = train(recipe, tmp_path / "again", TrainOptions(clip_folder, cache_gb=1))
    train(
        replace(recipe, **{"adapter.kernel_size": (1, 1, 1)}), tmp_path / "other", TrainOptions(clip_folder, cache_gb=1)
    )
    open_cache.cache_clear()
    assert plain.metrics == first.metrics == again.metrics


def test_a_negative_size_is_a_config_error() -> None:
    parser = argparse.ArgumentParser()
    add_reading_flags(parser)
    with pytest.raises(ConfigError, match=r"--cache-gb -1: must be at least 0"):
        reading_flags(parser.parse_args(["--cache-gb", "-1"]))


def test_the_module_counts_what_is_on_the_disk(make: Callable[..., ClipCache], video: Path) -> None:
    cache = make()
    cache.read(video, [0, FRAMES - 1], decode)
    on_disk = disk_bytes(cache.clips)
    assert 2 * FRAME_BYTES < on_disk < FRAMES * FRAME_BYTES
    assert abs(make().used_bytes() - on_disk) < 4096
