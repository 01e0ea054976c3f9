"""An estimate of the disk that a data set's frames will need in the clip cache, from a few of its clips."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stadapter.config import DataConfig
from stadapter.data.cache.frames import default_folder
from stadapter.data.cache.quota import GB
from stadapter.data.cache.row_file import BLOCK
from stadapter.data.lists import storage
from stadapter.data.lists.clip_list import ClipList, split_segment
from stadapter.data.video.decoding import ClipError, count_frames, frame_size, reduced_size

_LOOKED_AT = 16  # clips per list


@dataclass(frozen=True)
class DiskNeed:
    """Bytes of decoded frames: those that the trainings will look at, and those of all clips."""

    looked_at: int
    all_frames: int


def disk_need(clips: Mapping[str, ClipList], config: DataConfig, epochs: int, num_seeds: int) -> DiskNeed:
    """Estimate the need for the lists "train", "val" and "test" of a recipe. Unreadable clips are left out."""
    looked_at = all_frames = 0.0
    test_frames = config.num_frames * config.test_temporal_views
    for split, one in clips.items():
        if split == "val" and one.paths == clips["test"].paths:
            continue  # the test frames hold those of validation, or nearly
        for total, frame_bytes in (found := _look(one, config.decoded_short_side)):
            distinct = float(min(total, config.num_frames if split == "val" else test_frames))
            if split == "train":
                draws = 1 if config.fixed_frames else epochs * config.repeated_augmentation * num_seeds
                distinct = total * (1 - max(0.0, 1 - config.num_frames / total) ** draws)
            share = len(one) / len(found)
            looked_at += share * distinct * (frame_bytes + BLOCK)
            all_frames += share * total * frame_bytes
    return DiskNeed(round(looked_at), round(all_frames))


def describe(need: DiskNeed, gigabytes: float, num_seeds: int, folder: Path | None = None) -> str:
    """Return one or two lines for the user to read before the start."""
    folder = folder or default_folder()
    seeds = "one seed looks at" if num_seeds == 1 else f"{num_seeds} seeds look at"
    text = (
        f"clip cache: {folder}, at most {gigabytes:g} GB per node; the frames that {seeds} need about "
        f"{need.looked_at / GB:.2g} GB, all frames {need.all_frames / GB:.2g} GB"
    )
    room = min(gigabytes * GB, _free_bytes(folder))
    if need.looked_at > room:
        text += (
            f"\n            room for {100 * room / need.looked_at:.0f} % of them: the others are decoded each time "
            "(data.fixed_frames or data.decoded_short_side need less, and change the numbers)"
        )
    return text


def _look(clips: ClipList, short_side: int | None) -> list[tuple[int, int]]:
    """Return (frames, bytes per frame) of some clips, evenly spread over the list."""
    found = []
    for place in np.unique(np.linspace(0, len(clips) - 1, _LOOKED_AT).astype(int)):
        file, part = split_segment(storage.join(clips.root, clips.paths[place]))
        try:
            local = storage.local_copy(file, storage.default_local_copies())
            total = part[1] - part[0] if part else count_frames(local)
            height, width = reduced_size(*frame_size(local), short_side)
        except (ClipError, OSError):
            continue
        found.append((total, height * width * 3))
    return found


def _free_bytes(folder: Path) -> int:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(existing).free
