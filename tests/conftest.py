"""Shared fixtures: a small data set of real video files, and a recipe that trains on it in a second."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stadapter import config, recipes
from stadapter.config import Recipe
from stadapter.data.lists.embedded_rendering import MOTION_CLASSES, render_clip, write_mp4
from stadapter.training.loop import train
from stadapter.training.options import TrainOptions


def pytest_configure() -> None:
    # pytest-xdist's workers ignore Ctrl-C, and so would their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)


CLASSES, TRAIN_CLIPS, TEST_CLIPS = 2, 16, 7  # 7: no number of processes but 1 and 7 divides the test clips


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder of mp4 files for each of two classes, two opposite motions."""
    root = tmp_path_factory.mktemp("clips")
    for split, count in (("train", TRAIN_CLIPS), ("val", TEST_CLIPS)):
        for number in range(count):
            motion = number % CLASSES
            folder = root / split / MOTION_CLASSES[motion]
            folder.mkdir(parents=True, exist_ok=True)
            index = motion + len(MOTION_CLASSES) * (number // CLASSES)
            write_mp4(folder / f"{number}.mp4", render_clip("train" if split == "train" else "val", index))
    return root


TINY = {
    "data.dataset": "folder",
    "data.num_classes": CLASSES,
    "data.num_frames": 4,
    "backbone.weights": "seed:0",
    "adapter.bottleneck_width": 8,
    "adapter.blocks": (4, 5),
    "optim.epochs": 2,
    "optim.warmup_epochs": 0.5,
    "optim.global_batch": 4,
}


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    """Return the embedded recipe cut down to 8 steps on 16 clips."""
    return config.replace(recipes.embedded, **TINY)


@pytest.fixture(scope="session")
def tiny_flags(clip_folder: Path) -> list[str]:
    """Return the tiny recipe as command line flags."""
    values = {path: ",".join(map(str, v)) if isinstance(v, tuple) else v for path, v in TINY.items()}
    flags = [word for path, value in values.items() for word in ("--set", f"{path}={value}")]
    return [*flags, "--data-root", str(clip_folder)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Give each test one thread: the suite has two cores, and no test may change the next one's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def train_options(clip_folder: Path) -> TrainOptions:
    return TrainOptions(data_root=clip_folder)


@pytest.fixture(scope="session")
def undisturbed(tiny_recipe: Recipe, train_options: TrainOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an undisturbed training of the tiny recipe, in one process with one thread."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    train(tiny_recipe, folder, train_options)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a new file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here ({mounted.stderr.strip()})")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)
