"""A check of every clip of a data set: which are missing, unreadable, too short or there twice.

Every clip is opened as training opens it and frames over its whole length are decoded, so a clip that passes here reads
later too. Clips are equal when their files are, byte for byte (and, inside a long video, their segments).
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from stadapter.config import ConfigError, DataConfig
from stadapter.data.lists import storage
from stadapter.data.lists.clip_list import ClipList, split_segment
from stadapter.data.reader import Reading, read_frames
from stadapter.data.sampling import uniform_indices
from stadapter.data.video.decoding import ClipError
from stadapter.trials import files

PROBLEMS = ("missing", "unreadable", "too_short", "duplicate")
REPORT = "report.csv"
_LOOKED_AT = 8  # frames per clip, its first and last ones among them
_PER_TASK = 16  # clips handed to a worker at a time
_ANY_LABEL = 100_000  # classes of a list of numbers whose number of classes was not given


@dataclass(frozen=True)
class Finding:
    """A problem with one clip of a list."""

    split: str
    index: int
    problem: str  # of PROBLEMS
    detail: str


@dataclass(frozen=True)
class Look:
    """The result of opening one clip; `problem` is empty for a good one."""

    problem: str
    detail: str
    content: str  # hash of the file (and the segment), empty where it could not be read


def look_at(path: str, min_frames: int, reading: Reading) -> Look:
    """Open a clip, decode frames over its whole length, and hash its file."""
    file, segment = split_segment(path)
    try:
        local = storage.local_copy(file, reading.local_copies or storage.default_local_copies())
        if not os.path.exists(local):
            return Look("missing", "there is no such file", "")
    except OSError as error:
        return Look("missing", error.strerror or str(error), "")
    total = 0

    def all_over(num_total: int) -> list[int]:
        nonlocal total
        total = num_total
        middle = uniform_indices(num_total, min(_LOOKED_AT, num_total))
        return sorted({0, *middle, num_total - 1})

    try:
        read_frames(path, all_over, reading)
        with open(local, "rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
    except (ClipError, OSError) as error:
        return Look("unreadable", " ".join(str(error).split()).removeprefix(f"{path}: "), "")
    if total < min_frames:
        return Look("too_short", f"{total} frames, fewer than {min_frames}", content)
    return Look("", "", f"{content}/{segment}")


def look_at_all(clips: ClipList, min_frames: int, workers: int, reading: Reading) -> Iterator[Look]:
    """Yield `look_at` of each clip, in the order of the list, from `workers` processes.

    A file that crashes its process is found, and counts as unreadable.
    """
    paths = [storage.join(clips.root, path) for path in clips.paths]
    tasks = [paths[start : start + _PER_TASK] for start in range(0, len(paths), _PER_TASK)]
    done = 0
    while done < len(tasks):
        try:
            for looks in _run(tasks[done:], min_frames, workers, reading):
                yield from looks
                done += 1
        except BrokenProcessPool:  # by a task in work: go through the first of them clip by clip
            for path in tasks[done]:
                try:
                    yield next(_run([[path]], min_frames, 1, reading))[0]
                except BrokenProcessPool:
                    yield Look("unreadable", "the decoder crashed", "")
            done += 1


def _run(tasks: list[list[str]], min_frames: int, workers: int, reading: Reading) -> Iterator[list[Look]]:
    # Neither a decoder nor its threads survive a fork.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver"))
    try:
        yield from pool.map(_look_at_some, tasks, itertools.repeat(min_frames), itertools.repeat(reading))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _look_at_some(paths: list[str], min_frames: int, reading: Reading) -> list[Look]:
    return [look_at(path, min_frames, reading) for path in paths]


def find_problems(
    clips: ClipList, looks: Iterable[Look], seen: dict[str, str], on_clip: Callable[[], object] = lambda: None
) -> Iterator[Finding]:
    """Yield the problems of one list. `seen` maps contents to the clip that had them first, and grows."""
    for index, look in enumerate(looks):
        on_clip()
        if look.problem:
            yield Finding(clips.split, index, look.problem, look.detail)
        elif look.content in seen:
            yield Finding(clips.split, index, "duplicate", f"same content as {seen[look.content]}")
        else:
            seen[look.content] = f"{clips.paths[index]} ({clips.split})"


def write_report(folder: Path, lists: Sequence[ClipList], findings: Sequence[Finding]) -> None:
    """Write report.csv, a row per problem, and lists train.txt and val.txt without the clips that have one."""
    by_split = {clips.split: clips for clips in lists}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("split", "path", "label", "problem", "detail"))
    for found in findings:
        clips = by_split[found.split]
        label = _words(clips.labels[found.index])
        writer.writerow((found.split, clips.paths[found.index], label, found.problem, found.detail))
    files.write_atomically(folder / REPORT, text.getvalue().encode("utf-8", "surrogateescape"))
    for clips in lists:
        doomed = {found.index for found in findings if found.split == clips.split}
        lines = [
            f"{path} {_words(label)}\n"
            for index, (path, label) in enumerate(zip(clips.paths, clips.labels, strict=True))
            if index not in doomed
        ]
        files.write_atomically(folder / f"{clips.split}.txt", "".join(lines).encode("utf-8", "surrogateescape"))


def _words(label: int | tuple[int, ...]) -> str:
    return str(label) if isinstance(label, int) else " ".join(map(str, label))


def prepare_output(folder: Path) -> None:
    """Create the folder. Raises ConfigError if it cannot be written or holds files that would be overwritten."""
    for name in (REPORT, "train.txt", "val.txt"):
        if (folder / name).exists():
            raise ConfigError(f"--output {folder}: already holds {name}, which is not overwritten; choose another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot be written ({error.strerror}); choose another") from None


def class_config(dataset: str, data_root: str, num_classes: int | None) -> DataConfig:
    """Return the settings needed to read a data set's lists, counting its classes if their number is not given."""
    published = {"ssv2": 174, "kinetics400": 400, "epic_kitchens100": 397}
    groups = (97, 300) if dataset == "epic_kitchens100" else None
    if num_classes is None:
        num_classes = published.get(dataset)
    if num_classes is None and dataset == "folder" and storage.is_folder(storage.join(data_root, "train")):
        num_classes = len(storage.list_folder(storage.join(data_root, "train"))[0])
    if num_classes is None:
        num_classes = _ANY_LABEL
    return DataConfig(dataset, num_classes, label_groups=groups)


def summary(clips: ClipList, findings: Sequence[Finding], decoder: str) -> str:
    """Return `train: 16 clips, fingerprint 0123456789abcdef, decoder auto: 1 missing, 2 unreadable`."""
    count = Counter(found.problem for found in findings if found.split == clips.split)
    said = ", ".join(f"{count[problem]:,} {problem.replace('_', ' ')}" for problem in PROBLEMS if count[problem])
    data = f"{len(clips):,} clips, fingerprint {clips.fingerprint()}, decoder {decoder}"
    return f"{clips.split}: {data}: {said or 'all good'}"
