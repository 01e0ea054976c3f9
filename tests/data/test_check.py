"""The command `stadapter check` finds every bad clip and leaves the user's files alone."""

from __future__ import annotations

import csv
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from videos import write_grey

from stadapter.commands.main import main
from stadapter.config import DataConfig
from stadapter.data import check
from stadapter.data.lists.formats import ClipList, load_clips
from stadapter.data.reader import Reading

FOUND = {
    ("val", "val/empty.mp4"): "unreadable",
    ("train", "train/gone.mp4"): "missing",
    ("train", "train/text.mp4"): "unreadable",
    ("train", "train/short.mp4"): "too_short",
    ("train", "train/copy.mp4"): "duplicate",
    ("train", "train/leak.mp4"): "duplicate",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a list with one clip of each problem. A good clip's name is its length."""
    root = tmp_path_factory.mktemp("checked")
    for length in (10, 11, 12):
        write_grey(root / "train" / f"räum té {length}.mp4", num_frames=length)
    write_grey(root / "val" / "13.mp4", num_frames=13)
    (root / "val" / "empty.mp4").touch()
    (root / "train" / "text.mp4").write_text("not a video" * 99)
    write_grey(root / "train" / "short.mp4", num_frames=3)
    shutil.copy(root / "train" / "räum té 10.mp4", root / "train" / "copy.mp4")
    shutil.copy(root / "val" / "13.mp4", root / "train" / "leak.mp4")
    good = [f"train/räum té {length}.mp4" for length in (10, 11, 12)]
    train = [*good, "train/gone.mp4", "train/text.mp4", "train/short.mp4", "train/copy.mp4", "train/leak.mp4"]
    (root / "train.txt").write_text("".join(f"{path} {i % 2}\n" for i, path in enumerate(train)))
    (root / "val.txt").write_text("val/13.mp4 1\nval/empty.mp4 0\n")
    return root


@pytest.fixture(scope="module")
def checked(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report") / "new"
    flags = ["--data-root", str(root), "--workers", "2", "--output", str(output), "--min-frames", "4"]
    assert main(["check", "list", *flags]) == 1
    return output


def test_the_report_names_every_bad_clip_and_its_problem(checked: Path) -> None:
    with (checked / "report.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(row["split"], row["path"]): row["problem"] for row in rows} == FOUND
    details = {row["path"]: row["detail"] for row in rows}
    assert details["train/short.mp4"] == "3 frames, fewer than 4"
    assert details["train/leak.mp4"] == "same content as val/13.mp4 (val)"
    assert "zero bytes" in details["val/empty.mp4"]


def test_the_cleaned_lists_hold_the_good_clips_and_load(checked: Path, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    for name in ("train.txt", "val.txt"):
        shutil.copy(checked / name, tmp_path / "data" / name)
    config = DataConfig("list", 2)
    train, val = (load_clips(config, tmp_path / "data", split) for split in ("train", "val"))
    assert train.paths == [f"train/räum té {length}.mp4" for length in (10, 11, 12)]
    assert (list(train.labels), val.paths) == ([0, 1, 0], ["val/13.mp4"])


def test_a_good_data_set_exits_with_0_and_prints_its_fingerprint(
    clip_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "folder", "--data-root", str(clip_folder), "--workers", "1"]) == 0
    clips = load_clips(DataConfig("folder", 2), clip_folder, "train")
    assert f"train: 16 clips, fingerprint {clips.fingerprint()}, decoder auto: all good" in capsys.readouterr().out


def test_a_file_in_the_way_is_not_overwritten(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.txt").write_text("mine")
    assert main(["check", "list", "--data-root", str(root), "--output", str(tmp_path)]) == 2
    assert "already holds train.txt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["train.txt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-root", "/nowhere"], "error: --data-root /nowhere: there is no such folder"),
        (["--data-root", "/", "--workers", "0"], "error: --workers 0: must be at least 1"),
    ],
)
def test_input_that_cannot_work_is_answered_in_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "list", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_segments_of_one_video_are_clips_of_their_own(tmp_path: Path) -> None:
    write_grey(tmp_path / "long.mp4", num_frames=12)
    paths = ["long.mp4#frames=0,6", "long.mp4#frames=6,12", "long.mp4#frames=0,6", "long.mp4#frames=9,12"]
    clips = ClipList("list", "train", str(tmp_path), paths, [0] * 4, [False] * 4, ("0",))
    looks = check.look_at_all(clips, 4, 1, Reading())
    assert [(found.index, found.problem) for found in check.find_problems(clips, looks, {})] == [
        (2, "duplicate"),
        (3, "too_short"),
    ]


def test_a_file_that_kills_its_process_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_look_at_some", _die_at_b)
    clips = ClipList("list", "train", "", ["a", "b", "c"], [0] * 3, [False] * 3, ("0",))
    looks = list(check.look_at_all(clips, 1, 1, Reading()))
    assert [look.detail for look in looks] == ["fine", "the decoder crashed", "fine"]


def _die_at_b(paths: list[str], min_frames: int, reading: Reading) -> list[check.Look]:
    if "b" in paths:
        assert multiprocessing.parent_process() is not None
        os._exit(1)
    return [check.Look("", "fine", path) for path in paths]
