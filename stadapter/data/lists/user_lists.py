"""Lists that users write themselves: train.txt, train.csv, or a folder for each class."""

from __future__ import annotations

from collections.abc import Sequence

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
from stadapter.data.lists.storage import Root

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v")
_LIST_PREFIXES = ("", "videos/", "20bn-something-something-v2/")


# --- train.txt, val.txt


def load_text(config: DataConfig, root: Root, split: Split) -> ClipList | None:
    """Return the clips of train.txt or val.txt, or None if there is neither. Raises ConfigError if there is only one.

    A clip is a line `path label`, or `path verb noun` with label groups; paths are relative to the root or its videos/.
    """
    train, val = storage.join(root, "train.txt"), storage.join(root, "val.txt")
    list_file, other = (train, val) if split == "train" else (val, train)
    if not storage.is_file(list_file):
        if storage.is_file(other):
            # The published lists may number the classes otherwise: a model would be tested on shuffled labels.
            raise ConfigError(f"{other}: there is no {list_file} beside it; both lists must come from one place")
        return None
    paths: list[str] = []
    labels: list[Label] = []
    with storage.open_text(list_file) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                path, label = _path_and_label(line.strip(), config, f"{list_file}:{number}")
                paths.append(path)
                labels.append(label)
    return _place(config, root, split, paths, labels, _numbers(config), list_file)


def _path_and_label(line: str, config: DataConfig, where: str) -> tuple[str, Label]:
    count = 1 if config.label_groups is None else len(config.label_groups)
    path, *words = line.rsplit(" ", count)  # the path itself may hold spaces
    try:
        label = tuple(map(int, words))
    except ValueError:
        label = ()
    if not path or len(label) != count:
        needed = "a label" if count == 1 else "a verb and a noun class"
        raise ConfigError(f"{where}: must be a path, a space and {needed}, but is '{line}'")
    check_labels(label, config, where)
    return path.strip(), label[0] if count == 1 else label


# --- train.csv, val.csv


def load_csv(config: DataConfig, root: Root, split: Split) -> ClipList:
    """Return the clips of train.csv or val.csv, with columns path and label.

    Labels are class numbers, or names, which are numbered over the training list.
    """
    train_file = storage.join(root, "train.csv")
    list_file = train_file if split == "train" else storage.join(root, "val.csv")
    if config.label_groups is not None:
        raise ConfigError(f"{list_file}: holds one label per clip; with data.label_groups write train.txt and val.txt")
    if not storage.is_file(list_file):
        raise ConfigError(f"--data-root {root}: has neither {list_file.rpartition('/')[2][:-4]}.txt nor {list_file}")
    rows = _csv_rows(list_file)
    known = {label for _, _, label in (rows if split == "train" else _csv_rows(train_file))}
    are_numbers = all(label is not None and label.strip().isdecimal() for label in known)
    names = _numbers(config) if are_numbers else sorted(filter(None, known))
    if len(names) > config.num_classes:
        raise ConfigError(f"{train_file}: has {len(names)} classes, but data.num_classes = {config.num_classes}")
    number_of = {name: number for number, name in enumerate(names)}
    labels: list[Label] = []
    for line, path, label in rows:
        if not path or not label:
            raise ConfigError(f"{list_file}:{line}: must have a path and a label")
        labels.append(_class_number(label, None if are_numbers else number_of, config, f"{list_file}:{line}"))
    return _place(config, root, split, [path for _, path, _ in rows], labels, names, list_file)


def _csv_rows(path: str) -> list[tuple[int, str, str]]:
    """Return (line number, path, label) of each row."""
    return [(line, row["path"], row["label"]) for line, row in read_csv(path, ("path", "label"))]


def _class_number(label: str, number_of: dict[str, int] | None, config: DataConfig, where: str) -> int:
    """Return the number of a class name, or the label itself if the training list has numbers (`number_of` is None)."""
    if number_of is None and label.strip().isdecimal():
        check_label(int(label), config.num_classes, where)
        return int(label)
    if number_of is None or label not in number_of:
        raise ConfigError(f"{where}: the class '{label}' is not in train.csv")
    return number_of[label]


def _numbers(config: DataConfig) -> list[str]:
    return [str(number) for number in range(config.num_classes)]


def _place(
    config: DataConfig,
    root: Root,
    split: Split,
    paths: list[str],
    labels: list[Label],
    names: Sequence[str],
    list_file: str,
) -> ClipList:
    """Return the clips of a list, under the folder in which the first ones are."""
    prefix = find_layout(root, _LIST_PREFIXES, lambda prefix, place: prefix + paths[place], len(paths), list_file)
    return forward_clips(config, root, split, [prefix + path for path in paths] if prefix else paths, labels, names)


# --- train/<class>/, val/<class>/


def load_class_folders(config: DataConfig, root: Root, split: Split) -> ClipList:
    """Return the video files in the class folders. Classes are numbered by name, over the training folder."""
    folder_name = "train" if split == "train" else "val"
    train, folder = storage.join(root, "train"), storage.join(root, folder_name)
    for needed in (train, folder):
        if not storage.is_folder(needed):
            raise ConfigError(
                f"{needed}: the folder is missing; --data-root must hold train/<class>/ and val/<class>/ with video "
                "files"
            )
    names, _ = storage.list_folder(train)
    if len(names) != config.num_classes:
        raise ConfigError(f"{train}: has {len(names)} class folders, but data.num_classes = {config.num_classes}")
    there, _ = storage.list_folder(folder)
    if extra := sorted(set(there) - set(names)):
        raise ConfigError(f"{folder}/{extra[0]}: the class is not in {train}")
    paths: list[str] = []
    labels: list[Label] = []
    for label, name in enumerate(names):
        files = storage.list_folder(storage.join(folder, name))[1] if name in there else []
        found = [f"{folder_name}/{name}/{file}" for file in files if file.lower().endswith(VIDEO_SUFFIXES)]
        paths += found
        labels += [label] * len(found)
    return forward_clips(config, root, split, paths, labels, names)
