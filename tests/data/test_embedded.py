"""The embedded video world: balance, determinism, files, and single frames that hide the direction of time."""

import csv
import hashlib
import multiprocessing
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from stadapter.backbone.load import EMBEDDED_WEIGHTS
from stadapter.config import RESULTS_VERSION, ConfigError
from stadapter.data.lists import embedded, embedded_rendering

FEW = {"train": 12, "val": 4, "test": 4}


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded.ensure_world(tmp_path_factory.mktemp("cache"), FEW)


@pytest.mark.parametrize("split", embedded.SPLIT_SIZES)
def test_every_combination_of_labels_is_equally_frequent(split: str) -> None:
    counts = Counter(embedded_rendering.clip_labels(index) for index in range(embedded.SPLIT_SIZES[split]))
    assert set(counts.values()) == {embedded.SPLIT_SIZES[split] // 120}
    assert len(counts) == 120


def test_splits_share_no_handwritten_digit() -> None:
    shares = {
        split: np.concatenate(embedded_rendering.digit_instances(split))
        for split in ("pretraining", "train", "val", "test")
    }
    assert {split: len(share) for split, share in shares.items()} == {
        "pretraining": 897,
        "train": 400,
        "val": 100,
        "test": 400,
    }
    assert len(set(np.concatenate(list(shares.values())))) == 1797


@pytest.mark.parametrize("pair", range(6))
def test_the_second_class_of_a_pair_is_the_first_one_backwards(pair: int) -> None:
    forwards = embedded_rendering.motion_tracks(2 * pair, np.random.default_rng(pair))
    backwards = embedded_rendering.motion_tracks(2 * pair + 1, np.random.default_rng(pair))
    moves = False
    for track, mirrored in zip(forwards, backwards, strict=True):
        for name, values in vars(track).items():
            np.testing.assert_array_equal(values[::-1], getattr(mirrored, name))
            moves |= values[0] != values[-1]
    assert moves


def test_first_and_last_frames_of_a_pair_are_distributed_alike() -> None:
    """Over many clips, class 2p starts where class 2p + 1 ends, and the sets of frames agree in the mean."""

    def positions(motion: int) -> np.ndarray:
        return np.stack(
            [embedded_rendering.motion_tracks(motion, np.random.default_rng((motion, i)))[0].x for i in range(400)]
        )

    right, left = positions(0), positions(1)
    assert right[:, -1].mean() - right[:, 0].mean() > 20
    np.testing.assert_allclose(right.mean(axis=0)[::-1], left.mean(axis=0), atol=1.0)
    np.testing.assert_allclose(np.sort(right.ravel())[::320], np.sort(left.ravel())[::320], atol=1.5)


def test_digits_stay_in_the_picture() -> None:
    for motion in range(12):
        for track in embedded_rendering.motion_tracks(motion, np.random.default_rng(motion)):
            assert min(track.x.min(), track.y.min()) >= 6
            assert max(track.x.max(), track.y.max()) <= embedded_rendering.FRAME_SIZE - 6


def test_rendering_is_a_function_of_split_and_index() -> None:
    first, again = embedded_rendering.render_clip("train", 17), embedded_rendering.render_clip("train", 17)
    assert first.shape == (16, 60, 60, 3)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, embedded_rendering.render_clip("test", 17))
    assert not np.array_equal(first, embedded_rendering.render_clip("train", 18))


def test_a_file_decodes_to_the_rendered_frames(world: Path) -> None:
    row = embedded.load_manifest(world, "val")[3]
    frames, rendered = decode(row.path), embedded_rendering.render_clip("val", 3)
    assert frames.shape == rendered.shape
    # Noise and chroma subsampling are lost; content and timing are not.
    distance = np.abs(frames[:, None].astype(np.float32) - rendered[None]).mean(axis=(2, 3, 4))
    assert (distance.argmin(axis=1) == np.arange(16)).all()
    assert distance.diagonal().max() < 12


def test_quality_has_no_trend_along_a_clip(world: Path) -> None:
    rows = embedded.load_manifest(world, "train")
    error = np.stack(
        [
            np.abs(decode(row.path).astype(np.float32) - embedded_rendering.render_clip("train", index)).mean(
                axis=(1, 2, 3)
            )
            for index, row in enumerate(rows)
        ]
    ).mean(axis=0)
    assert error[:8].mean() == pytest.approx(error[8:].mean(), rel=0.05)


def test_the_manifest_lists_every_file(world: Path) -> None:
    with (world / "manifest.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["id", "file", "split", "motion", "digit"]
    assert Counter(line["split"] for line in lines) == FEW
    assert {line["file"] for line in lines} == {str(p.relative_to(world)) for p in world.rglob("*.mp4")}
    for split, size in FEW.items():
        rows = embedded.load_manifest(world, split)
        assert [(row.motion, row.digit) for row in rows] == [
            embedded_rendering.clip_labels(index) for index in range(size)
        ]
    assert len({line["id"] for line in lines}) == len(lines)


def test_a_complete_world_is_used_again(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (world / "manifest.csv").stat().st_mtime_ns
    assert embedded.ensure_world(world.parent) == world
    assert (world / "manifest.csv").stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""


def test_processes_that_ask_at_once_get_one_world(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        worlds = pool.starmap(embedded.ensure_world, [(tmp_path, FEW)] * 3)
    assert set(worlds) == {tmp_path / f"embedded-v{embedded_rendering.WORLD_VERSION}"}
    assert len(list(worlds[0].rglob("*.mp4"))) == sum(FEW.values())
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [worlds[0].name]  # no scratch folder left


def test_the_cache_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STADAPTER_CACHE", str(tmp_path))
    assert embedded.ensure_world(sizes={"train": 1}) == tmp_path / f"embedded-v{embedded_rendering.WORLD_VERSION}"


def test_a_root_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="STADAPTER_CACHE"):
        embedded.ensure_world(tmp_path / "file" / "cache")


def test_still_images_name_their_digits_and_patches() -> None:
    for pixels, present, patches in embedded_rendering.still_images(20, seed=1):
        assert pixels.shape == (60, 60, 3)
        assert pixels.dtype == np.uint8
        assert patches.shape == (25,)
        assert 1 <= present.sum() <= 2
        assert set(patches) <= {*np.flatnonzero(present), embedded_rendering.BACKGROUND}


def test_numbers_of_older_worlds_and_weights_are_not_mistaken_for_new_ones() -> None:
    # A trial is found again by its recipe and RESULTS_VERSION. A change of the world or its backbone changes the
    # embedded recipes' numbers: raise RESULTS_VERSION, and change this line with it.
    digest = hashlib.sha256(EMBEDDED_WEIGHTS.read_bytes()).hexdigest()[:12]
    assert (RESULTS_VERSION, embedded_rendering.WORLD_VERSION, digest) == (1, 2, "e899c1d43c7f")
