"""The list of one split's clips, and the steps that the readers of all formats share."""

from __future__ import annotations

import csv
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from stadapter.config import ConfigError, DataConfig
from stadapter.data.lists import storage
from stadapter.data.lists.storage import Root

Split = Literal["train", "val", "test"]
Label = int | tuple[int, ...]  # one per head: (verb, noun) with data.label_groups

PROBED_CLIPS = 20  # published lists name clips that are gone: the layout is taken from the first of these that exists

# A clip that is part of a long video has this and two frame numbers after its path: first frame, one past the last.
SEGMENT = "#frames="


@dataclass(frozen=True)
class ClipList:
    """The clips of one split, in a fixed order; `paths`, `labels` and `reversed` have one entry per clip."""

    dataset: str
    split: str
    root: str  # the folder or address that `paths` are relative to
    paths: list[str]
    labels: Sequence[Label]
    reversed: list[bool]  # the clip is shown backwards in time
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change with any path, label, direction or order; not with the root."""
        digest = hashlib.sha256()
        for path, label, backwards in zip(self.paths, self.labels, self.reversed, strict=True):
            digest.update(f"{path}\t{label}\t{int(backwards)}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]


def forward_clips(
    config: DataConfig, root: Root, split: Split, paths: list[str], labels: Sequence[Label], names: Iterable[str]
) -> ClipList:
    """Return the list of clips that are all shown forwards in time."""
    return ClipList(config.dataset, split, str(root), paths, labels, [False] * len(paths), tuple(names))


def segment(path: str, first: int, end: int) -> str:
    """Return the path of the clip that is frames `first` to `end` - 1 of a long video."""
    return f"{path}{SEGMENT}{first},{end}"


def split_segment(path: str) -> tuple[str, tuple[int, int] | None]:
    """Return the file of a clip, and the range of its frames or None for all: the inverse of `segment`."""
    file, found, frames = path.rpartition(SEGMENT)
    if not found:
        return path, None
    first, _, end = frames.partition(",")
    return file, (int(first), int(end))


def check_label(label: int, num_classes: int, where: str) -> None:
    """Raise ConfigError if the label is not in [0, num_classes)."""
    if not 0 <= label < num_classes:
        raise ConfigError(
            f"{where}: label {label} is outside 0 ... {num_classes - 1} (data.num_classes = {num_classes})"
        )


def check_labels(label: tuple[int, ...], config: DataConfig, where: str) -> None:
    """Raise ConfigError unless each head's label is within its classes."""
    for one, classes in zip(label, config.label_groups or (config.num_classes,), strict=True):
        check_label(one, classes, where)


def read_csv(path: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, row) of a CSV file.

    Raises ConfigError if the header does not name `columns`, or if a row has more values than the header: an unquoted
    comma would shorten names of classes into one another.
    """
    try:
        with storage.open_text(path) as file:
            rows = csv.DictReader(file)
            if missing := [name for name in columns if name not in (rows.fieldnames or ())]:
                raise ConfigError(f"{path}:1: the header has no column '{missing[0]}'")
            for row in rows:
                if surplus := row.pop(None, None):  # csv keeps under None the values without a column
                    raise ConfigError(
                        f"{path}:{rows.line_num}: has more values than the header has columns (behind the last one: "
                        f"'{','.join(surplus)}'); put values that hold a comma in double quotes"
                    )
                yield rows.line_num, row
    except FileNotFoundError:
        raise ConfigError(f"{path}: the file is missing; it comes with the data set") from None


def find_layout(
    root: Root, patterns: Sequence[str], path_of: Callable[[str, int], str], count: int, list_file: str
) -> str:
    """Return the first pattern under which one of the first clips exists. Raises ConfigError if there is none."""
    for place, pattern in itertools.product(range(min(count, PROBED_CLIPS)), patterns):
        if storage.is_file(storage.join(root, split_segment(path_of(pattern, place))[0])):
            return pattern
    if not count:
        raise ConfigError(f"{list_file}: the list is empty")
    examples = ", ".join(path_of(pattern, 0) for pattern in patterns[:2])
    raise ConfigError(
        f"--data-root {root}: none of the first clips of {list_file.rpartition('/')[2]} is there; "
        f"looked for {examples}, ..."
    )
