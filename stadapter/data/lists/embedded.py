"""The embedded video world as a data set: mp4 files, rendered once on each machine, and their lists of clips."""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stadapter.config import ConfigError, DataConfig
from stadapter.data.lists.bounded_folder import cache_folder
from stadapter.data.lists.clip_list import ClipList, Split
from stadapter.data.lists.embedded_rendering import (
    DIGIT_CLASSES,
    MOTION_CLASSES,
    WORLD_VERSION,
    clip_labels,
    load_material,
    render_clip,
    write_mp4,
)

SPLIT_SIZES: Mapping[str, int] = {"train": 960, "val": 240, "test": 480}  # multiples of 12 motions x 10 digits


@dataclass(frozen=True)
class ClipRow:
    """One clip of the rendered world; `motion` and `digit` are class indices."""

    id: str
    path: Path
    motion: int
    digit: int


def load_embedded(config: DataConfig, root: Path | None, split: Split) -> ClipList:
    """Return the clips of a split, rendering the world first if it is missing.

    With motions as labels, outside training every clip is followed by its exact reversal, labelled with the pair's
    other class: a model blind to the order of frames gets exactly half of the directions right.
    """
    motion = config.dataset == "embedded_motion"
    names = MOTION_CLASSES if motion else DIGIT_CLASSES
    world = ensure_world(root)
    if config.num_classes != len(names):
        raise ConfigError(f"data.num_classes = {config.num_classes}: '{config.dataset}' has {len(names)} classes")
    paths: list[str] = []
    labels: list[int] = []
    backwards: list[bool] = []
    for row in load_manifest(world, split):
        path, label = os.path.relpath(row.path, world), row.motion if motion else row.digit
        directions = (False, True) if motion and split != "train" else (False,)
        paths += [path] * len(directions)
        labels += [label ^ 1 if is_backwards else label for is_backwards in directions]
        backwards += directions
    return ClipList(config.dataset, split, str(world), paths, labels, backwards, names)


def ensure_world(root: Path | None = None, sizes: Mapping[str, int] = SPLIT_SIZES) -> Path:
    """Return the folder of the world, rendering it first if it is missing.

    The world lies in `root`, or in $STADAPTER_CACHE, or in ~/.cache/stadapter. Any number of processes may call this at
    once: one renders, the others wait. No process ever sees an incomplete world, even on a file system without locks,
    because it is rendered elsewhere and renamed into place.
    """
    from filelock import FileLock  # late: 45 ms that `--help` need not take

    root = root or cache_folder()
    world = root / f"embedded-v{WORLD_VERSION}"
    if (world / "manifest.csv").exists():
        return world
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{world.name}.lock"):
            if not (world / "manifest.csv").exists():
                _render_world(world, sizes)
    except OSError as error:
        raise ConfigError(
            f"{root}: the embedded world cannot be written there ({error.strerror}); "
            "set STADAPTER_CACHE to a folder that can be written"
        ) from error
    return world


def load_manifest(world: Path, split: str) -> list[ClipRow]:
    """Return the clips of "train", "val" or "test", in the order of their indices."""
    with (world / "manifest.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    return [ClipRow(row["id"], world / row["file"], int(row["motion"]), int(row["digit"])) for row in rows]


def _file(split: str, index: int) -> str:
    return f"{split}/{index:05d}.mp4"


def _render_world(world: Path, sizes: Mapping[str, int]) -> None:
    total = sum(sizes.values())
    print(f"rendering the embedded world once: {total:,} clips into {world} ...", flush=True)
    start = time.perf_counter()
    scratch = Path(tempfile.mkdtemp(prefix=f".{world.name}.", dir=world.parent))
    try:
        clips = [(split, index) for split, size in sizes.items() for index in range(size)]
        _render_clips(scratch, clips)
        _write_manifest(scratch, clips)
        scratch.chmod(0o755)  # mkdtemp's folders are closed to other users
        try:
            scratch.rename(world)
        except OSError:
            if not (world / "manifest.csv").exists():  # else another machine was faster: its world is the same
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"rendered in {time.perf_counter() - start:.0f} s", flush=True)


def _render_clips(world: Path, clips: Sequence[tuple[str, int]]) -> None:
    for split in {split for split, _ in clips}:
        (world / split).mkdir()
    load_material()  # once, before the threads start
    # Threads, not processes: numpy and the encoder leave the interpreter free most of the time, and a process forked
    # beside PyTorch's or a decoder's threads may hang.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda clip: write_mp4(world / _file(*clip), render_clip(*clip)), clips))


def _write_manifest(world: Path, clips: Sequence[tuple[str, int]]) -> None:
    with (world / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "file", "split", "motion", "digit"))
        for split, index in clips:
            name = _file(split, index)
            writer.writerow((name.removesuffix(".mp4"), name, split, *clip_labels(index)))
