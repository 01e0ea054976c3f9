"""Trained models predict the classes of videos (`stadapter predict`) and are tested again (`stadapter evaluate`)."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stadapter import config, recipes
from stadapter.commands.main import main
from stadapter.config import ConfigError
from stadapter.data.clips import ClipDataset
from stadapter.data.lists.formats import load_clips
from stadapter.inference.predict import find_videos, predict, top_classes
from stadapter.inference.trained import open_trained, test
from stadapter.training.options import TrainOptions
from stadapter.trials import record

# --- predict


def test_the_printed_classes_are_right_as_often_as_the_record_says(
    undisturbed: Path, clip_folder: Path, capsys: Any
) -> None:
    assert main(["predict", str(undisturbed), str(clip_folder / "val"), "--clips-per-pass", "3", "--top", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    videos, tops = said[::2], said[1::2]
    assert videos == find_videos([clip_folder / "val"]) and len(videos) == len(tops) == 7
    right = sum(top.endswith(f"%  {Path(video).parent.name}") for video, top in zip(videos, tops, strict=True))
    result = record.read_result(undisturbed)
    assert result is not None
    assert 100 * right / len(videos) == pytest.approx(result.metrics["top1"])


def test_probabilities_are_the_mean_over_the_recipes_views_whatever_the_batch(
    undisturbed: Path, clip_folder: Path
) -> None:
    views = {"data.test_spatial_views": 3, "data.test_temporal_views": 2}
    model, recipe, _ = open_trained(undisturbed, changes=views)
    videos = find_videos([clip_folder / "val"])[:3]
    alone, together = (
        dict(predict(model, recipe, videos, TrainOptions(clips_per_pass=clips, num_workers=0))) for clips in (1, 3)
    )
    clips = load_clips(recipe.data, clip_folder, "test")
    dataset = ClipDataset(clips, recipe.data, 0, train=False)
    for index in range(len(clips)):
        if (video := dataset.path(index)) in videos:
            with torch.no_grad():
                expected = model(dataset[index]["pixels"]).softmax(-1).mean(0)
            assert len(dataset[index]["pixels"]) == 6
            for found in (alone[video], together[video]):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_video_that_cannot_be_read_does_not_cost_the_others(
    undisturbed: Path, clip_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copy(find_videos([clip_folder / "val"])[0], tmp_path / "deep.MP4")
    (tmp_path / "broken.mp4").write_text("no video")
    assert main(["predict", str(undisturbed), str(tmp_path), str(tmp_path / "gone.mp4")]) == 1
    said = capsys.readouterr()
    assert re.search(rf"{tmp_path}/deep.MP4\n +\d+\.\d\d %  \w+\n +\d+\.\d\d %  \w+\n$", said.out)
    assert f"error: {tmp_path}/broken.mp4: is not a video" in said.err
    assert f"error: {tmp_path}/gone.mp4: cannot be read (No such file or directory)" in said.err
    assert "2 of 3 videos cannot be read" in said.err


def test_verbs_and_nouns_are_ranked_by_themselves() -> None:
    data = dataclasses.replace(recipes.get("epic_kitchens100_clip_b16").data, num_classes=5, label_groups=(2, 3))
    prob_K = torch.tensor([0.4, 0.6, 0.2, 0.1, 0.7])
    verbs, nouns = top_classes(prob_K, data, ["take", "put", "cup", "pan", "lid"], 2)
    assert [name for name, _ in verbs + nouns] == ["put", "take", "lid", "cup"]
    assert [name for name, _ in top_classes(prob_K, data, (), 1)[1]] == ["noun 2"]


def test_what_cannot_be_asked_is_one_line(undisturbed: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "theirs.pth").touch()
    for words, why in (
        ([undisturbed, tmp_path / "empty"], "there is no video in this folder"),
        ([tmp_path / "empty", "x.mp4"], "has no trained.safetensors: its training has not finished"),
        ([tmp_path / "theirs.pth", "x.mp4"], "`stadapter convert` makes one"),
        ([undisturbed, "x.mp4", "--top", "0"], "--top 0: must be at least 1"),
    ):
        assert main(["predict", *map(str, words)]) == 2
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1


# --- evaluate


def test_a_finished_training_is_tested_again_with_the_same_numbers(
    undisturbed: Path, clip_folder: Path, capsys: Any
) -> None:
    result = record.read_result(undisturbed)
    assert result is not None
    model, recipe, _ = open_trained(undisturbed)
    assert test(model, recipe, TrainOptions(clip_folder)) == pytest.approx(result.metrics, rel=1e-6)
    assert main(["evaluate", str(undisturbed / record.TRAINED), "--data-root", str(clip_folder)]) == 0
    said = capsys.readouterr()
    assert f"fingerprint {result.data['test'].fingerprint}" in said.out
    assert f"top1 {result.metrics['top1']:.2f}" in said.out and "note" not in said.err


def test_other_clips_than_those_of_the_record_are_pointed_out(
    undisturbed: Path, clip_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(clip_folder, tmp_path / "clips")
    find = find_videos([tmp_path / "clips" / "val"])
    Path(find[0]).unlink()
    Path(find[1]).write_text("no video")
    words = ["evaluate", str(undisturbed), "--data-root", str(tmp_path / "clips")]
    assert main([*words, "--max-bad-share", "0.5"]) == 0
    said = capsys.readouterr()
    assert "are not those that the training was tested on" in said.err and "bad_clips 1.00" in said.out
    assert main(words) == 1
    assert "1 of 6 test clips cannot be read" in capsys.readouterr().err


def test_only_how_clips_are_looked_at_can_change(undisturbed: Path) -> None:
    recipe = open_trained(undisturbed, changes={"data.test_spatial_views": 3})[1]
    assert recipe == config.replace(open_trained(undisturbed)[1], **{"data.test_spatial_views": 3})
    for field in ("adapter.kernel_size", "data.num_classes", "seed", "optim.epochs"):
        with pytest.raises(ConfigError, match=f"--set {field}: was decided when"):
            open_trained(undisturbed, changes={field: 1})
