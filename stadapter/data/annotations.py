"""Which clips a data set holds and what their labels are, read from the formats people have.

| `config.dataset` | what the data root holds |
|---|---|
| `embedded_motion`, `embedded_digit` | nothing: the package renders the clips itself |
| `ssv2` | train.json, validation.json, labels.json as published; videos/ or 20bn-something-something-v2/ |
| `kinetics400` | train.csv, val.csv as published; videos/, train/ or val/, with or without class folders |
| `folder` | train/<class>/ and val/<class>/ with the video files |

`ssv2` and `kinetics400` also read train.txt and val.txt with a line `path label` per clip; where these exist they win,
since somebody wrote them on purpose. Files are not opened here, and only a first few are looked for.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stadapter.config import ConfigError, DataConfig

Split = Literal["train", "val", "test"]

_VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v")
_SSV2_FOLDERS = ("videos", "20bn-something-something-v2")
_PROBED_CLIPS = 20  # published lists name clips that are gone: the layout is taken from the first of these that exists


@dataclass(frozen=True)
class ClipList:
    """The clips of one split, in a fixed order; `paths`, `labels` and `reversed` have one entry per clip."""

    dataset: str
    split: str
    root: str  # the folder that `paths` are relative to
    paths: list[str]
    labels: list[int]
    reversed: list[bool]  # the clip is shown backwards in time
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any path, label, direction or their order, and not with the root."""
        digest = hashlib.sha256()
        for path, label, backwards in zip(self.paths, self.labels, self.reversed, strict=True):
            digest.update(f"{path}\t{label}\t{int(backwards)}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]


def load_clips(config: DataConfig, data_root: Path | None, split: Split) -> ClipList:
    """The clips of a split; a ConfigError (one line) where the data set is missing or malformed.

    On real data sets "val" and "test" are both the validation list: papers report on it, since the labels of the test
    list are not published. The embedded world has a list of its own for each.
    """
    if config.dataset in ("embedded_motion", "embedded_digit"):
        return _load_embedded(config, data_root, split)
    readers: dict[str, Callable[[DataConfig, Path, Split], ClipList]] = {
        "ssv2": _load_ssv2,
        "kinetics400": _load_kinetics,
        "folder": _load_folder,
    }
    if config.dataset not in readers:
        known = ", ".join(["embedded_motion", "embedded_digit", *readers])
        raise ConfigError(f"data.dataset = {config.dataset}: must be one of {known}")
    if data_root is None:
        raise ConfigError(f"--data-root is not set: '{config.dataset}' needs a folder with {_contents(config.dataset)}")
    root = Path(data_root)
    if not root.is_dir():
        raise ConfigError(f"--data-root {root}: there is no such folder; it must hold {_contents(config.dataset)}")
    clips = readers[config.dataset](config, root, split)
    if not clips.paths:
        raise ConfigError(
            f"--data-root {root}: no clips found for split '{split}'; it must hold {_contents(config.dataset)}"
        )
    return clips


def _contents(dataset: str) -> str:
    return {
        "ssv2": "train.json, validation.json, labels.json (or train.txt, val.txt) and videos/",
        "kinetics400": "train.csv, val.csv (or train.txt, val.txt) and videos/",
        "folder": "train/<class>/ and val/<class>/ with video files",
    }[dataset]


def _forward_clips(
    config: DataConfig, root: Path, split: Split, paths: list[str], labels: list[int], names: Any
) -> ClipList:
    return ClipList(config.dataset, split, str(root), paths, labels, [False] * len(paths), tuple(names))


def _check_label(label: int, config: DataConfig, where: str) -> None:
    if not 0 <= label < config.num_classes:
        raise ConfigError(
            f"{where}: label {label} is outside 0 ... {config.num_classes - 1}"
            f" (data.num_classes = {config.num_classes})"
        )


# --- the embedded world


def _load_embedded(config: DataConfig, data_root: Path | None, split: Split) -> ClipList:
    """Motion: outside training every clip is followed by its exact reversal, labelled with the pair's other class, so
    that a model blind to the order of frames gets exactly half of the directions right."""
    from stadapter.data import embedded

    root = embedded.ensure_world(data_root)
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


# --- Something-Something-v2


def _load_ssv2(config: DataConfig, root: Path, split: Split) -> ClipList:
    if (listed := _load_list(config, root, split)) is not None:
        return listed
    label_file, list_file = root / "labels.json", root / ("train.json" if split == "train" else "validation.json")
    numbers = _read_json(label_file)
    try:
        label_of = {_template_key(name): int(label) for name, label in numbers.items()}
        names = sorted(label_of, key=label_of.__getitem__)
    except (AttributeError, ValueError, TypeError):
        raise ConfigError(
            f'{label_file}: must map each template to its number, as {{"Approaching something": "0", ...}}'
        ) from None
    ids: list[str] = []
    labels: list[int] = []
    for number, entry in enumerate(_read_json(list_file), start=1):
        where = f"{list_file}: entry {number}"
        try:
            clip, template = str(entry["id"]), _template_key(entry["template"])
        except (KeyError, TypeError, AttributeError):
            raise ConfigError(f'{where}: must have "id" and "template"') from None
        if template not in label_of:
            raise ConfigError(f"{where}: the template '{entry['template']}' is not in {label_file.name}")
        _check_label(label_of[template], config, where)
        ids.append(clip)
        labels.append(label_of[template])
    patterns = [f"{folder}/{{}}{suffix}" for folder in _SSV2_FOLDERS for suffix in (".mp4", ".webm")]
    pattern = _find_layout(root, patterns, lambda pattern, place: pattern.format(ids[place]), len(ids), list_file)
    return _forward_clips(config, root, split, [pattern.format(clip) for clip in ids], labels, names)


def _template_key(template: str) -> str:
    """`Holding [something] next to [something]` is listed in labels.json without its brackets."""
    return template.replace("[", "").replace("]", "")


def _read_json(path: Path) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise ConfigError(f"{path}: the file is missing; it comes with the data set's labels") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: is not valid JSON ({error.msg})") from None


# --- Kinetics


def _load_kinetics(config: DataConfig, root: Path, split: Split) -> ClipList:
    if (listed := _load_list(config, root, split)) is not None:
        return listed
    list_file = root / ("train.csv" if split == "train" else "val.csv")
    # Labels are numbered by name over the training list, so that a class absent from validation shifts nothing.
    class_file = root / "train.csv" if (root / "train.csv").is_file() else list_file
    names = sorted({name for _, name, _ in _read_kinetics_csv(class_file)})
    if len(names) > config.num_classes:
        raise ConfigError(f"{class_file}: has {len(names)} classes, but data.num_classes = {config.num_classes}")
    label_of = {name: label for label, name in enumerate(names)}
    clips: list[str] = []
    labels: list[int] = []
    for line, name, clip in _read_kinetics_csv(list_file):
        if name not in label_of:
            raise ConfigError(f"{list_file}:{line}: the class '{name}' is not in {class_file.name}")
        clips.append(clip)
        labels.append(label_of[name])
    own_folder = "train" if split == "train" else "val"
    patterns = [
        f"{folder}/{inner}{{clip}}.mp4"
        for folder in ("videos", own_folder, f"videos/{own_folder}")
        for inner in ("", "{label}/", "{label_}/")
    ]

    def path_of(pattern: str, place: int) -> str:
        label = names[labels[place]]
        return pattern.format(clip=clips[place], label=label, label_=label.replace(" ", "_"))

    pattern = _find_layout(root, patterns, path_of, len(clips), list_file)
    return _forward_clips(config, root, split, [path_of(pattern, place) for place in range(len(clips))], labels, names)


def _read_kinetics_csv(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, class, file name without suffix) of each row of `label,youtube_id,time_start,time_end,split`."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if missing := {"label", "youtube_id", "time_start", "time_end"} - set(rows.fieldnames or ()):
                raise ConfigError(f"{path}:1: the header has no column '{sorted(missing)[0]}'")
            for row in rows:
                try:
                    clip = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
                except (TypeError, ValueError):
                    raise ConfigError(
                        f"{path}:{rows.line_num}: time_start and time_end must be whole seconds"
                    ) from None
                yield rows.line_num, row["label"], clip
    except FileNotFoundError:
        raise ConfigError(f"{path}: the file is missing; it comes with the data set") from None


# --- `path label` lists and class folders


def _load_list(config: DataConfig, root: Path, split: Split) -> ClipList | None:
    """train.txt or val.txt with a line `path label` per clip, paths relative to the root or to its videos/."""
    list_file = root / ("train.txt" if split == "train" else "val.txt")
    if not list_file.is_file():
        return None
    paths: list[str] = []
    labels: list[int] = []
    with open(list_file, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            path, _, label = line.strip().rpartition(" ")  # the path itself may hold spaces
            try:
                labels.append(int(label))
            except ValueError:
                path = ""
            if not path:
                raise ConfigError(f"{list_file}:{number}: must be a path, a space and a label, but is '{line.strip()}'")
            _check_label(labels[-1], config, f"{list_file}:{number}")
            paths.append(path.strip())
    if not paths:
        raise ConfigError(f"{list_file}: the list is empty")
    prefixes = ["", *(f"{folder}/" for folder in _SSV2_FOLDERS)]
    prefix = _find_layout(root, prefixes, lambda prefix, place: prefix + paths[place], len(paths), list_file)
    if prefix:
        paths = [prefix + path for path in paths]
    return _forward_clips(config, root, split, paths, labels, map(str, range(config.num_classes)))


def _load_folder(config: DataConfig, root: Path, split: Split) -> ClipList:
    train, own = root / "train", root / ("train" if split == "train" else "val")
    for folder in (train, own):
        if not folder.is_dir():
            raise ConfigError(f"{folder}: the folder is missing; --data-root must hold {_contents('folder')}")
    names = sorted(entry.name for entry in os.scandir(train) if entry.is_dir())
    if len(names) != config.num_classes:
        raise ConfigError(f"{train}: has {len(names)} class folders, but data.num_classes = {config.num_classes}")
    if extra := sorted({entry.name for entry in os.scandir(own) if entry.is_dir()} - set(names)):
        raise ConfigError(f"{own / extra[0]}: the class is not in {train}")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        folder = own / name
        files = sorted(os.listdir(folder)) if folder.is_dir() else []
        found = [f"{own.name}/{name}/{file}" for file in files if file.lower().endswith(_VIDEO_SUFFIXES)]
        paths += found
        labels += [label] * len(found)
    return _forward_clips(config, root, split, paths, labels, names)


def _find_layout(
    root: Path, patterns: list[str], path_of: Callable[[str, int], str], count: int, list_file: Path
) -> str:
    """The first pattern under which one of the first clips exists."""
    for place, pattern in itertools.product(range(min(count, _PROBED_CLIPS)), patterns):
        if (root / path_of(pattern, place)).is_file():
            return pattern
    if not count:
        raise ConfigError(f"{list_file}: the list is empty")
    examples = ", ".join(path_of(pattern, 0) for pattern in patterns[:2])
    raise ConfigError(
        f"--data-root {root}: none of the first clips of {list_file.name} is there; looked for {examples}, ..."
    )
