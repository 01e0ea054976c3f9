"""Which clips a data set holds and what their labels are, read from the formats people have.

| `config.dataset` | what the data root holds |
|---|---|
| `embedded_motion`, `embedded_digit` | nothing: the package renders the clips itself |
| `ssv2` | train.json, validation.json, labels.json as published; videos/ or 20bn-something-something-v2/ |
| `kinetics400` | train.csv, val.csv as published; videos/, train/ or val/, with or without class folders |
| `epic_kitchens100` | EPIC_100_train.csv, EPIC_100_validation.csv as published; clips or whole videos in videos/ |
| `list` | train.txt, val.txt with a line `path label` per clip, or train.csv, val.csv with columns path and label |
| `folder` | train/<class>/ and val/<class>/ with the video files |

The three published ones also read train.txt and val.txt, which win where they exist: they were written on purpose.
A data root or a path in a list may be an address (`s3://bucket/ssv2`). Videos are not opened here, and only the first
few are looked for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stadapter.config import ConfigError, DataConfig
from stadapter.data.lists import storage
from stadapter.data.lists.clip_list import ClipList, Split
from stadapter.data.lists.embedded import load_embedded
from stadapter.data.lists.public_datasets import load_epic, load_kinetics, load_ssv2
from stadapter.data.lists.storage import Root
from stadapter.data.lists.user_lists import VIDEO_SUFFIXES, load_class_folders, load_csv, load_text

__all__ = ["VIDEO_SUFFIXES", "ClipList", "Split", "load_clips"]

_EMBEDDED = ("embedded_motion", "embedded_digit")
_READERS: dict[str, Callable[[DataConfig, Root, Split], ClipList]] = {
    "ssv2": load_ssv2,
    "kinetics400": load_kinetics,
    "epic_kitchens100": load_epic,
    "list": load_csv,
    "folder": load_class_folders,
}
_CONTENTS = {
    "ssv2": "train.json, validation.json, labels.json (or train.txt, val.txt) and videos/",
    "kinetics400": "train.csv, val.csv (or train.txt, val.txt) and videos/",
    "epic_kitchens100": "EPIC_100_train.csv, EPIC_100_validation.csv (or train.txt, val.txt) and videos/",
    "list": "train.txt, val.txt with lines 'path label' (or train.csv, val.csv with columns path and label)",
    "folder": "train/<class>/ and val/<class>/ with video files",
}


def load_clips(config: DataConfig, data_root: Root | None, split: Split) -> ClipList:
    """Return the clips of a split. Raises ConfigError, in one line, if the data set is missing or malformed.

    On real data sets "val" and "test" are both the validation list: papers report on it, since the labels of the test
    list are not published. The embedded world has a list for each.
    """
    if config.dataset in _EMBEDDED:
        return load_embedded(config, None if data_root is None else Path(data_root), split)
    root = _existing_root(config.dataset, data_root)
    clips = load_text(config, root, split) if config.dataset != "folder" else None
    clips = clips or _READERS[config.dataset](config, root, split)
    if not clips.paths:
        raise ConfigError(
            f"--data-root {root}: no clips found for split '{split}'; it must hold {_CONTENTS[config.dataset]}"
        )
    return clips


def _existing_root(dataset: str, data_root: Root | None) -> Root:
    if dataset not in _READERS:
        raise ConfigError(f"data.dataset = {dataset}: must be one of {', '.join([*_EMBEDDED, *_READERS])}")
    if data_root is None:
        raise ConfigError(f"--data-root is not set: '{dataset}' needs a folder with {_CONTENTS[dataset]}")
    if not storage.is_folder(data_root):
        raise ConfigError(f"--data-root {data_root}: there is no such folder; it must hold {_CONTENTS[dataset]}")
    return data_root
