"""Annotations as their makers publish them: Something-Something-v2, Kinetics and EPIC-Kitchens-100."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

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
    segment,
)
from stadapter.data.lists.storage import Root

_SSV2_FOLDERS = ("videos", "20bn-something-something-v2")

# --- Something-Something-v2


def load_ssv2(config: DataConfig, root: Root, split: Split) -> ClipList:
    """Return the clips of train.json or validation.json, labelled by the numbers in labels.json."""
    label_file = storage.join(root, "labels.json")
    list_file = storage.join(root, "train.json" if split == "train" else "validation.json")
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
            raise ConfigError(f"{where}: the template '{entry['template']}' is not in labels.json")
        check_label(label_of[template], config.num_classes, where)
        ids.append(clip)
        labels.append(label_of[template])
    patterns = [f"{folder}/{{}}{suffix}" for folder in _SSV2_FOLDERS for suffix in (".mp4", ".webm")]
    pattern = find_layout(root, patterns, lambda pattern, place: pattern.format(ids[place]), len(ids), list_file)
    return forward_clips(config, root, split, [pattern.format(clip) for clip in ids], labels, names)


def _template_key(template: str) -> str:
    """Return `Holding [something] next to [something]` without its brackets, as labels.json has it."""
    return template.replace("[", "").replace("]", "")


def _read_json(path: str) -> Any:
    try:
        with storage.open_text(path) as file:
            return json.load(file)
    except FileNotFoundError:
        raise ConfigError(f"{path}: the file is missing; it comes with the data set's labels") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: is not valid JSON ({error.msg})") from None


# --- Kinetics


def load_kinetics(config: DataConfig, root: Root, split: Split) -> ClipList:
    """Return the clips of train.csv or val.csv, whose class names are numbered over the training list."""
    train_file = storage.join(root, "train.csv")
    list_file = train_file if split == "train" else storage.join(root, "val.csv")
    # Over the training list: a class that is absent from validation shifts nothing.
    class_file = train_file if storage.is_file(train_file) else list_file
    names = sorted({name for _, name, _ in _read_kinetics_csv(class_file)})
    if len(names) > config.num_classes:
        raise ConfigError(f"{class_file}: has {len(names)} classes, but data.num_classes = {config.num_classes}")
    label_of = {name: label for label, name in enumerate(names)}
    clips: list[str] = []
    labels: list[int] = []
    for line, name, clip in _read_kinetics_csv(list_file):
        if name not in label_of:
            raise ConfigError(f"{list_file}:{line}: the class '{name}' is not in {class_file.rpartition('/')[2]}")
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

    pattern = find_layout(root, patterns, path_of, len(clips), list_file)
    return forward_clips(config, root, split, [path_of(pattern, place) for place in range(len(clips))], labels, names)


def _read_kinetics_csv(path: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, class, file stem) of each row of `label,youtube_id,time_start,time_end,split`."""
    for line, row in read_csv(path, ("label", "youtube_id", "time_start", "time_end")):
        try:
            clip = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
        except (TypeError, ValueError):
            raise ConfigError(f"{path}:{line}: time_start and time_end must be whole seconds") from None
        yield line, row["label"], clip


# --- EPIC-Kitchens-100

_EPIC_COLUMNS = (
    *("narration_id", "participant_id", "video_id", "start_frame", "stop_frame"),
    *("verb_class", "noun_class"),
)
_EPIC_CLIPS = tuple(
    f"{folder}/{inner}{{clip}}{suffix}"
    for folder in ("videos", "clips")
    for inner in ("", "{participant}/")
    for suffix in (".mp4", ".MP4")
)
_EPIC_VIDEOS = tuple(
    f"{folder}{{video}}{suffix}"
    for folder in ("videos/", "videos/{participant}/", "{participant}/videos/")
    for suffix in (".MP4", ".mp4")
)


def load_epic(config: DataConfig, root: Root, split: Split) -> ClipList:
    """Return the clips, each with two labels: (verb, noun).

    A clip is a file of its own, named by narration, or a segment of a published video, whose frames are numbered from 1
    in the list and from 0 here.
    """
    if config.label_groups is None:
        raise ConfigError("data.label_groups is none: 'epic_kitchens100' has two labels per clip, such as 97,300")
    list_file = storage.join(root, "EPIC_100_train.csv" if split == "train" else "EPIC_100_validation.csv")
    rows: list[tuple[str, str, str, int, int]] = []  # narration, participant, video, first frame, one past the last
    labels: list[Label] = []
    for line, row in read_csv(list_file, _EPIC_COLUMNS):
        where = f"{list_file}:{line}"
        try:
            first, end, *label = (int(row[name]) for name in ("start_frame", "stop_frame", "verb_class", "noun_class"))
        except (TypeError, ValueError):
            raise ConfigError(
                f"{where}: start_frame, stop_frame, verb_class and noun_class must be whole numbers"
            ) from None
        if not 1 <= first < end:
            raise ConfigError(f"{where}: start_frame {first} and stop_frame {end} are not a segment of a video")
        check_labels(tuple(label), config, where)
        rows.append((row["narration_id"], row["participant_id"], row["video_id"], first - 1, end))
        labels.append(tuple(label))

    def path_of(pattern: str, place: int) -> str:
        clip, participant, video, first, end = rows[place]
        path = pattern.format(clip=clip, participant=participant, video=video)
        return segment(path, first, end) if "{video}" in pattern else path

    pattern = find_layout(root, _EPIC_CLIPS + _EPIC_VIDEOS, path_of, len(rows), list_file)
    paths = [path_of(pattern, place) for place in range(len(rows))]
    return forward_clips(config, root, split, paths, labels, map(str, range(config.num_classes)))
