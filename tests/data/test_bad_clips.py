"""Unreadable clips: a training goes on, names them, and gives the same numbers however it is run."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from videos import scene, write_grey, write_video

from stadapter import config
from stadapter.config import DataConfig, Recipe
from stadapter.data import reader as reading_module
from stadapter.data.bad_clips import BadClips, BadClipsError
from stadapter.data.clips import ClipDataset, train_loader
from stadapter.data.lists.formats import ClipList
from stadapter.data.lists.storage import LocalCopies
from stadapter.data.reader import Reading, read_frames
from stadapter.data.video import decoder_process
from stadapter.data.video.decoding import ClipError, decode
from stadapter.training.loop import train
from stadapter.training.options import TrainOptions
from stadapter.trials import record
from stadapter.trials.record import Record

BAD = ("zero bytes.mp4", "truncated.mp4", "text.mp4", "audio only.mp4")
ODD = ("one frame.mp4", "variable rate.mp4", "räum té/日本 clip.mp4")
VANISHES = "vanishes.mp4"


def write_audio(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_oddities(folder: Path) -> None:
    """Write one file of each kind in BAD and ODD."""
    good = write_grey(folder / ODD[2])
    (folder / BAD[0]).touch()
    (folder / BAD[1]).write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (folder / BAD[2]).write_text("This is not a video.\n" * 40)
    write_audio(folder / BAD[3])
    write_grey(folder / ODD[0], num_frames=1)
    write_video(folder / ODD[1], scene(9), times_ms=[0, 33, 66, 200, 210, 350, 500, 533, 900])


@pytest.fixture(scope="module")
def odd_folder(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write lists of the shared clips with one file of each kind; in a folder tree no name could have a subfolder."""
    root = tmp_path_factory.mktemp("odd")
    for split in ("train", "val"):
        good = sorted(str(path.relative_to(clip_folder)) for path in clip_folder.glob(f"{split}/*/*.mp4"))
        for path in good:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(clip_folder / path, root / path)
        write_oddities(root / split)
        shutil.copy(root / good[0], root / split / VANISHES)
        paths = good + [f"{split}/{name}" for name in (*BAD, *ODD, VANISHES)]
        (root / f"{split}.txt").write_text("".join(f"{path} {i % 2}\n" for i, path in enumerate(paths)))
    return root


def run(recipe: Recipe, root: Path, folder: Path, workers: int) -> dict[str, Any]:
    """Train and test, removing a test clip after the first epoch."""
    recipe = config.replace(recipe, **{"data.dataset": "list"})
    victim = root / "val" / VANISHES
    kept = victim.read_bytes()

    def vanish(metrics: dict[str, Any]) -> None:
        victim.unlink(missing_ok=True)

    try:
        return train(recipe, folder, TrainOptions(root, num_workers=workers, max_bad_share=0.5), on_epoch=vanish)
    finally:
        victim.write_bytes(kept)


@pytest.fixture(scope="module")
def undisturbed(odd_folder: Path, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Record:
    torch.set_num_threads(1)
    return run(tiny_recipe, odd_folder, tmp_path_factory.mktemp("run"), workers=0)


def test_a_folder_of_bad_files_trains_and_tests_to_the_end_and_reports_each(undisturbed: Record) -> None:
    named = {split: [line.partition(": ") for line in found.first] for split, found in
             undisturbed.bad_clips.items()}  # fmt: skip
    assert [Path(path).name for path, _, _ in named["train"]] == list(BAD)
    assert [Path(path).name for path, _, _ in named["test"]] == [*BAD, VANISHES]
    reasons = [why for _, _, why in named["test"]]
    for why, word in zip(reasons, ("zero bytes", "truncated", "not a video", "no video", "No such file"), strict=True):
        assert word in why
    assert undisturbed.metrics["bad_clips"] == 5
    assert record.bad_clips_in_words(undisturbed) == (
        "unreadable clips: 4 in training, replaced by neighbours; 5 in testing, counted as wrong"
    )


@pytest.mark.parametrize("workers", [1, 4])
def test_bad_files_give_the_same_numbers_with_loader_workers(
    undisturbed: dict[str, Any], odd_folder: Path, tiny_recipe: Recipe, tmp_path: Path, workers: int
) -> None:
    result = run(tiny_recipe, odd_folder, tmp_path, workers)
    assert result.metrics == undisturbed.metrics
    assert result.bad_clips == undisturbed.bad_clips


def test_too_many_bad_clips_stop_the_training_with_a_reason(
    odd_folder: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = config.replace(tiny_recipe, **{"data.dataset": "list"})
    with pytest.raises(BadClipsError, match=r"2 of 24 train clips .* more than --max-bad-share 0.05; the first: ") as e:
        train(recipe, tmp_path, TrainOptions(odd_folder))
    assert "\n" not in str(e.value)
    assert record.read_result(tmp_path) is None


def test_bad_clips_met_before_an_interruption_are_in_the_record(
    undisturbed: dict[str, Any], odd_folder: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = config.replace(tiny_recipe, **{"data.dataset": "list"})
    train_options = TrainOptions(odd_folder, max_bad_share=0.5)

    def stop(metrics: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path, train_options, on_epoch=stop)
    assert train(recipe, tmp_path, train_options).bad_clips["train"] == undisturbed.bad_clips["train"]


def test_two_processes_report_the_bad_clips_of_both(
    odd_folder: Path, tiny_flags: list[str], tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [*tiny_flags, "--data-root", str(odd_folder), "--set", "data.dataset=list", "--max-bad-share", "0.5"]
    command = [*torchrun, "-m", "stadapter", "train", "--output", str(tmp_path / "run"), *flags]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    result = record.read_result(tmp_path / "run")
    assert result is not None
    assert result.bad_clips["train"] == undisturbed.bad_clips["train"]
    assert result.bad_clips["test"].first == undisturbed.bad_clips["test"].first[:4]  # all but the vanished
    assert "unreadable clips: 4 in training, replaced by neighbours; 4 in testing, counted as wrong" in done.stdout


# --- decoders that do not return


@pytest.fixture
def one_clip(tmp_path: Path) -> ClipList:
    names = ["a.mp4", "b.mp4", "c.mp4"]
    for name in names:
        write_grey(tmp_path / name)
    return ClipList("list", "train", str(tmp_path), names, [0, 1, 2], [False] * 3, ("x", "y", "z"))


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Install a decoder that never returns from b.mp4, and return the list of files requested from it."""
    decode, asked = reading_module.decode, []

    def hang(path: Any, *args: Any, **options: Any) -> np.ndarray:
        asked.append(Path(path).name)
        if asked[-1] == "b.mp4":
            time.sleep(30)
        return decode(path, *args, **options)

    monkeypatch.setattr(reading_module, "decode", hang)
    monkeypatch.setattr(reading_module, "_given_up", {})
    yield asked


SETTINGS = DataConfig("list", 3, num_frames=4, frame_size=32)


def test_a_clip_that_hangs_is_given_up_and_replaced(one_clip: ClipList, hanging: list[str]) -> None:
    item = ClipDataset(one_clip, SETTINGS, 0, True, Reading(time_limit_s=0.2))[0, 1]
    assert (int(item["label"]), bool(item["bad"])) == (2, True)
    (bad,) = item["bad_clips"]
    assert bad.index == 1
    assert "b.mp4: was given up: reading it took longer than 0.2 s" in bad.reason
    assert hanging == ["b.mp4", "b.mp4", "c.mp4"]


def test_a_clip_that_hung_twice_is_not_tried_again(one_clip: ClipList, hanging: list[str]) -> None:
    dataset = ClipDataset(one_clip, SETTINGS, 0, True, Reading(time_limit_s=0.2))
    dataset[0, 1]
    del hanging[:]
    assert bool(dataset[1, 1]["bad"])
    assert hanging == ["c.mp4"]


def test_a_clip_within_its_time_is_not_disturbed(one_clip: ClipList, hanging: list[str]) -> None:
    assert not ClipDataset(one_clip, SETTINGS, 0, True, Reading(time_limit_s=5))[0, 0]["bad"]


def test_a_file_that_never_ends_is_given_up_in_a_loader_worker(one_clip: ClipList, tmp_path: Path) -> None:
    (tmp_path / "b.mp4").unlink()
    os.mkfifo(tmp_path / "b.mp4")  # nobody writes into it: opening it blocks for ever
    clips = dataclasses.replace(one_clip, root=f"file://{tmp_path}")
    reading = Reading(time_limit_s=1, local_copies=LocalCopies(tmp_path / "spill", 10**9))
    batches = list(train_loader(ClipDataset(clips, SETTINGS, 0, True, reading), 3, steps=range(1), num_workers=1))
    assert sorted(batches[0]["label"].tolist()) == [0, 2, 2]
    (bad,) = batches[0]["bad_clips"]
    assert bad.index == 1 and "b.mp4: was given up" in bad.reason


# --- a decoder that crashes


CRASHING_DECORD = """
import os, time
import numpy as np
class DECORDError(Exception): pass
def cpu(device): return None
class VideoReader:
    def __init__(self, path, **options):
        if path.endswith("b.mp4"): os.abort()
        if path.endswith("c.mp4"): time.sleep(60)
    def __len__(self): return 12
    def get_batch(self, wanted):
        class Batch:
            def asnumpy(self): return np.zeros((len(wanted), 32, 32, 3), np.uint8)
        return Batch()
"""


@pytest.fixture
def crashing_decord(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a stand-in for decord that kills its separate process at b.mp4, and never returns from c.mp4."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "decord.py").write_text(CRASHING_DECORD)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.setattr(reading_module, "_given_up", {})
    decoder_process.stop()
    yield
    decoder_process.stop()


def test_a_decoder_that_crashes_or_hangs_costs_its_clip_only(one_clip: ClipList, crashing_decord: None) -> None:
    dataset = ClipDataset(one_clip, SETTINGS, 0, False, Reading("decord", time_limit_s=4))
    bad = [dataset[index]["bad_clips"] for index in (0, 1, 2, 0)]
    assert [[clip.index for clip in clips] for clips in bad] == [[], [1], [2], []]
    assert "b.mp4: decord crashed on it" in bad[1][0].reason
    assert "c.mp4: was given up" in bad[2][0].reason


@pytest.mark.parametrize("indices", [[3, 0], lambda total: [total - 1]])
def test_frames_decoded_apart_are_the_same(one_clip: ClipList, tmp_path: Path, indices: Any) -> None:
    path = tmp_path / "a.mp4"
    assert np.array_equal(decoder_process.decode_apart(path, indices, backend="pyav"), decode(path, indices))


def test_an_error_apart_is_the_same_clip_error(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ClipError, match=r"empty.mp4: the file is empty"):
        decoder_process.decode_apart(tmp_path / "empty.mp4", [0], backend="decord")


# --- segments of long videos


def test_a_segment_is_sampled_as_a_clip_of_its_own(tmp_path: Path) -> None:
    write_grey(tmp_path / "long.mp4", num_frames=12, step=16)
    frames = read_frames(f"{tmp_path}/long.mp4#frames=4,9", lambda total: [0, total - 1], Reading())
    assert [round(frame.mean() / 16) for frame in frames] == [4, 8]


def test_a_segment_ends_with_its_video(tmp_path: Path) -> None:
    write_grey(tmp_path / "long.mp4", num_frames=12, step=16)
    frames = read_frames(f"{tmp_path}/long.mp4#frames=10,99", lambda total: [total - 1], Reading())
    assert round(frames[0].mean() / 16) == 11


def test_a_segment_beyond_its_video_is_a_clip_error(tmp_path: Path) -> None:
    write_grey(tmp_path / "long.mp4", num_frames=12)
    with pytest.raises(ClipError, match=r"long.mp4#frames=20,30: the clip begins at frame 20, but its video has 12"):
        read_frames(f"{tmp_path}/long.mp4#frames=20,30", lambda total: [0], Reading())


def test_a_list_where_nothing_can_be_read_stops_with_one_line(one_clip: ClipList, tmp_path: Path) -> None:
    for name in one_clip.paths:
        (tmp_path / name).unlink()
    loader = train_loader(ClipDataset(one_clip, SETTINGS, 0, True), 3, steps=range(1), num_workers=1)
    with pytest.raises(BadClipsError, match=r"it and the 2 clips after it cannot be read") as caught:
        list(BadClips("train", 3, 1.0).watch(loader))
    assert "\n" not in str(caught.value)
