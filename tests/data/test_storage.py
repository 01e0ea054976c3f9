"""Clips at addresses are copied to this machine once, whole or not at all, and never more than allowed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from videos import write_grey

from stadapter import config
from stadapter.config import DataConfig, Recipe
from stadapter.data.clips import ClipDataset
from stadapter.data.lists import storage
from stadapter.data.lists.formats import load_clips
from stadapter.data.lists.storage import LocalCopies, local_copy
from stadapter.data.reader import Reading
from stadapter.training.loop import train
from stadapter.training.options import TrainOptions


@pytest.fixture
def bucket() -> Iterator[fsspec.AbstractFileSystem]:
    """Return an empty object store in memory, at memory://bucket."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@pytest.fixture
def local_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalCopies:
    monkeypatch.setattr(storage, "_added", {})
    return LocalCopies(tmp_path / "copies", 10**6)


def copied(local_copies: LocalCopies) -> list[Path]:
    return [path for path in local_copies.folder.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_local_path_is_its_own_copy(local_copies: LocalCopies) -> None:
    assert local_copy("/data/a.mp4", local_copies) == "/data/a.mp4"
    assert not local_copies.folder.exists()


def test_a_remote_file_is_copied_once(bucket: fsspec.AbstractFileSystem, local_copies: LocalCopies) -> None:
    bucket.pipe("/bucket/a.mp4", b"first")
    first = local_copy("memory://bucket/a.mp4", local_copies)
    bucket.rm("/bucket/a.mp4")
    assert local_copy("memory://bucket/a.mp4", local_copies) == first
    assert Path(first).read_bytes() == b"first"
    assert first.endswith(".mp4")


def test_the_copies_used_last_stay_within_the_limit(
    bucket: fsspec.AbstractFileSystem, local_copies: LocalCopies
) -> None:
    small = dataclasses.replace(local_copies, limit_bytes=3000)
    for name in "abc":
        bucket.pipe(f"/bucket/{name}", bytes(1000))
        local_copy(f"memory://bucket/{name}", small)
    used_again = local_copy("memory://bucket/a", small)
    bucket.pipe("/bucket/d", bytes(1000))
    newest = local_copy("memory://bucket/d", small)
    assert len(copied(small)) == 3
    assert Path(used_again).exists() and Path(newest).exists()


def test_a_copy_that_breaks_off_leaves_nothing(
    bucket: fsspec.AbstractFileSystem, local_copies: LocalCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("/bucket/a.mp4", b"half of it")

    def break_off(source: object, target: object, length: int) -> None:
        target.write(b"half")  # type: ignore[attr-defined]
        raise ConnectionResetError("gone")

    monkeypatch.setattr(storage.shutil, "copyfileobj", break_off)
    with pytest.raises(OSError, match="gone"):
        local_copy("memory://bucket/a.mp4", local_copies)
    assert copied(local_copies) == []


def test_a_file_that_is_not_there_is_a_bad_clip(bucket: fsspec.AbstractFileSystem, local_copies: LocalCopies) -> None:
    bucket.pipe("/bucket/train.txt", b"a.mp4 0\nb.mp4 1\n")
    bucket.pipe("/bucket/a.mp4", b"not a video")
    clips = load_clips(DataConfig("list", 2), "memory://bucket", "train")
    dataset = ClipDataset(clips, DataConfig("list", 2), 0, train=False, reading=Reading(local_copies=local_copies))
    (first,), (second,) = (dataset[index]["bad_clips"] for index in (0, 1))
    assert (first.index, second.index) == (0, 1)
    assert "memory://bucket/a.mp4: is not a video" in first.reason
    assert "memory://bucket/b.mp4: cannot be read" in second.reason


def test_remote_clips_give_the_pixels_of_local_ones(
    bucket: fsspec.AbstractFileSystem, local_copies: LocalCopies, tmp_path: Path
) -> None:
    path = write_grey(tmp_path / "räum te" / "a.mp4")
    (tmp_path / "train.txt").write_text("räum te/a.mp4 1\n")
    bucket.put(str(tmp_path) + "/", "/bucket", recursive=True)
    settings = DataConfig("list", 2, num_frames=4, frame_size=32)
    items = [
        ClipDataset(
            load_clips(settings, root, "train"), settings, 0, train=True, reading=Reading(local_copies=local_copies)
        )[0, 0]
        for root in (path.parent.parent, "memory://bucket")
    ]
    assert torch.equal(items[0]["pixels"], items[1]["pixels"])
    assert not items[1]["bad"]


def test_a_training_on_remote_clips_gives_the_numbers_of_local_ones(
    tiny_recipe: Recipe, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STADAPTER_CACHE", str(tmp_path))
    recipe = config.replace(tiny_recipe, **{"optim.epochs": 1})
    local = train(recipe, tmp_path / "local", TrainOptions(clip_folder))
    remote = train(recipe, tmp_path / "remote", TrainOptions(f"file://{clip_folder}", num_workers=1))
    assert remote.metrics == local.metrics
    assert remote.data == local.data
    assert len(list((tmp_path / "spill").rglob("*.mp4"))) == 16 + 7
