"""Which clips a data set holds and what their labels are, read from the formats people have.

| `config.dataset` | what the data root holds |
|---|---|
| `embedded_motion`, `embedded_digit` | nothing: the package renders the clips itself |
| `ssv2` | train.json, validation.json, labels.json as published; videos/ or 20bn-something-something-v2/ |
| `kinetics400` | train.csv, val.csv as published; videos/, train/ or val/, with or without class folders |
| `epic_kitchens100` | EPIC_100_train.csv, EPIC_100_validation.csv as published; clips or whole videos in videos/ |
| `list` | train.txt, val.txt with a line `path label` per clip, or train.csv, val.csv with columns path and label |
| `folder` | train/<class>/ and val/<class>/ with the video files |

The first three also read train.txt and val.txt; where these exist they win, since somebody wrote them on purpose.
A data root or a path in a list may be an address (`s3://bucket/ssv2`). Videos are not opened here, and only a first few
are looked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from stadapter.config import ConfigError, DataConfig
from stadapter.data.lists import storage
from stadapter.data.lists.clip_list import (
    ClipList,
    Label,
    Split,
    check_label,
    check_labels,
    find_layout,
    forward_clips,
    read_csv,
)
from stadapter.data.lists.public_datasets import load_epic, load_kinetics, load_ssv2
from stadapter.data.lists.storage import Root

__all__ = ["VIDEO_SUFFIXES", "ClipList", "Split", "load_clips"]

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v")
_LIST_PREFIXES = ("", "videos/", "20bn-something-something-v2/")


def load_clips(config: DataConfig, data_root: Root | None, split: Split) -> ClipList:
    """The clips of a split; a ConfigError (one line) where the data set is missing or malformed.

    On real data sets "val" and "test" are both the validation list: papers report on it, since the labels of the test
    list are not published. The embedded world has a list of its own for each.
    """
    if config.dataset in ("embedded_motion", "embedded_digit"):
        return _load_embedded(config, data_root, split)
    readers: dict[str, Callable[[DataConfig, Root, Split], ClipList]] = {
        "ssv2": load_ssv2,
        "kinetics400": load_kinetics,
        "epic_kitchens100": load_epic,
        "list": _load_csv,
        "folder": _load_folder,
    }
    if config.dataset not in readers:
        known = ", ".join(["embedded_motion", "embedded_digit", *readers])
        raise ConfigError(f"data.dataset = {config.dataset}: must be one of {known}")
    if data_root is None:
        raise ConfigError(f"--data-root is not set: '{config.dataset}' needs a folder with {_contents(config.dataset)}")
    if not storage.is_folder(data_root):
        raise ConfigError(f"--data-root {data_root}: there is no such folder; it must hold {_contents(config.dataset)}")
    clips = _load_list(config, data_root, split) if config.dataset != "folder" else None
    clips = clips or readers[config.dataset](config, data_root, split)
    if not clips.paths:
        raise ConfigError(
            f"--data-root {data_root}: no clips found for split '{split}'; it must hold {_contents(config.dataset)}"
        )
    return clips


def _contents(dataset: str) -> str:
    return {
        "ssv2": "train.json, validation.json, labels.json (or train.txt, val.txt) and videos/",
        "kinetics400": "train.csv, val.csv (or train.txt, val.txt) and videos/",
        "epic_kitchens100": "EPIC_100_train.csv, EPIC_100_validation.csv (or train.txt, val.txt) and videos/",
        "list": "train.txt, val.txt with lines 'path label' (or train.csv, val.csv with columns path and label)",
        "folder": "train/<class>/ and val/<class>/ with video files",
    }[dataset]


# --- the embedded world


def _load_embedded(config: DataConfig, data_root: Root | None, split: Split) -> ClipList:
    """Motion: outside training every clip is followed by its exact reversal, labelled with the pair's other class, so
    that a model blind to the order of frames gets exactly half of the directions right."""
    from stadapter.data.lists import embedded

    root = embedded.ensure_world(None if data_root is None else Path(data_root))
    motion = config.dataset == "embedded_motion"
    names = embedded.MOTION_CLASSES if motion else embedded.DIGIT_CLASSES
    if config.num_classes != len(names):
        raise ConfigError(f"data.num_classes = {config.num_classes}: '{config.dataset}' has {len(names)} classes")
    paths: list[str] = []
    labels: list[int] = []
    backwards: list[bool] = []
    for row in embedded.load_manifest(root, split):
        path, label = os.path.relpath(row.path, root), row.motion if motion else row.digit
        paths.append(path)
        labels.append(label)
        backwards.append(False)
        if motion and split != "train":
            paths.append(path)
            labels.append(label ^ 1)
            backwards.append(True)
    return ClipList(config.dataset, split, str(root), paths, labels, backwards, tuple(names))


# --- lists and class folders


def _load_list(config: DataConfig, root: Root, split: Split) -> ClipList | None:
    """train.txt or val.txt with a line `path label` (`path verb noun` with label groups) per clip, paths relative to
    the root or to its videos/; None where there is neither, ConfigError where there is one."""
    train, val = storage.join(root, "train.txt"), storage.join(root, "val.txt")
    list_file, other = (train, val) if split == "train" else (val, train)
    if not storage.is_file(list_file):
        if storage.is_file(other):
            # The published lists may number the classes otherwise: a model would be tested on shuffled labels.
            raise ConfigError(f"{other}: there is no {list_file} beside it; both lists must come from one place")
        return None
    count = 1 if config.label_groups is None else len(config.label_groups)
    what = "a label" if count == 1 else "a verb and a noun class"
    paths: list[str] = []
    labels: list[Label] = []
    with storage.open_text(list_file) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            path, *words = line.strip().rsplit(" ", count)  # the path itself may hold spaces
            try:
                label = tuple(map(int, words))
            except ValueError:
                label = ()
            if not path or len(label) != count:
                raise ConfigError(f"{list_file}:{number}: must be a path, a space and {what}, but is '{line.strip()}'")
            check_labels(label, config, f"{list_file}:{number}")
            paths.append(path.strip())
            labels.append(label[0] if count == 1 else label)
    return _place(config, root, split, paths, labels, [str(i) for i in range(config.num_classes)], list_file)


def _place(
    config: DataConfig, root: Root, split: Split, paths: list[str], labels: list[Label], names: list[str], file: str
) -> ClipList:
    """The clips of a list, under the folder in which the first ones are."""
    prefix = find_layout(root, _LIST_PREFIXES, lambda prefix, place: prefix + paths[place], len(paths), file)
    return forward_clips(config, root, split, [prefix + path for path in paths] if prefix else paths, labels, names)


def _load_csv(config: DataConfig, root: Root, split: Split) -> ClipList:
    """train.csv or val.csv with columns path and label: class numbers, or names, numbered over the training list."""
    train_file = storage.join(root, "train.csv")
    list_file = train_file if split == "train" else storage.join(root, "val.csv")
    if config.label_groups is not None:
        raise ConfigError(f"{list_file}: holds one label per clip; with data.label_groups write train.txt and val.txt")
    if not storage.is_file(list_file):
        raise ConfigError(f"--data-root {root}: has neither {list_file.rpartition('/')[2][:-4]}.txt nor {list_file}")
    rows = [(line, row["path"], row["label"]) for line, row in read_csv(list_file, ("path", "label"))]
    known = {row["label"] for _, row in read_csv(train_file, ("path", "label"))} if split != "train" else set()
    known |= {label for _, _, label in rows} if split == "train" else set()
    numbered = all(label is not None and label.strip().isdecimal() for label in known)
    names = [str(i) for i in range(config.num_classes)] if numbered else sorted(filter(None, known))
    if len(names) > config.num_classes:
        raise ConfigError(f"{train_file}: has {len(names)} classes, but data.num_classes = {config.num_classes}")
    label_of = {name: label for label, name in enumerate(names)}
    labels: list[Label] = []
    for line, path, name in rows:
        if not path or not name:
            raise ConfigError(f"{list_file}:{line}: must have a path and a label")
        if numbered and name.strip().isdecimal():
            check_label(int(name), config.num_classes, f"{list_file}:{line}")
            labels.append(int(name))
        elif name in label_of:
            labels.append(label_of[name])
        else:
            raise ConfigError(f"{list_file}:{line}: the class '{name}' is not in train.csv")
    return _place(config, root, split, [path for _, path, _ in rows], labels, names, list_file)


def _load_folder(config: DataConfig, root: Root, split: Split) -> ClipList:
    own_name = "train" if split == "train" else "val"
    train, own = storage.join(root, "train"), storage.join(root, own_name)
    for folder in (train, own):
        if not storage.is_folder(folder):
            raise ConfigError(f"{folder}: the folder is missing; --data-root must hold {_contents('folder')}")
    names, _ = storage.list_folder(train)
    if len(names) != config.num_classes:
        raise ConfigError(f"{train}: has {len(names)} class folders, but data.num_classes = {config.num_classes}")
    there, _ = storage.list_folder(own)
    if extra := sorted(set(there) - set(names)):
        raise ConfigError(f"{own}/{extra[0]}: the class is not in {train}")
    paths: list[str] = []
    labels: list[Label] = []
    for label, name in enumerate(names):
        files = storage.list_folder(storage.join(own, name))[1] if name in there else []
        found = [f"{own_name}/{name}/{file}" for file in files if file.lower().endswith(VIDEO_SUFFIXES)]
        paths += found
        labels += [label] * len(found)
    return forward_clips(config, root, split, paths, labels, names)
