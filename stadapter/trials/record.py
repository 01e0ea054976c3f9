"""The record of a training and the folder that holds it.

A run folder is the truth; MLflow and every table are made from it. It holds

    config.json          every field of the recipe, by dotted path
    metrics.jsonl        one line per epoch, appended
    checkpoint.pt        the trainable tensors, optimiser and step to go on from; checkpoint.previous.pt the one before
    trained.safetensors  what was trained: adapters, head, and the final norm if it was
    result.json          the record, written last and atomically: it exists if and only if the training finished
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from stadapter.config import ConfigError, Recipe, flatten, scientific_fields, unflatten
from stadapter.trials.files import remove_parts, write_json

CONFIG, METRICS, CHECKPOINT = "config.json", "metrics.jsonl", "checkpoint.pt"
TRAINED, RESULT = "trained.safetensors", "result.json"
COMMIT_DIGITS = 10  # of a commit, where one is shown


@dataclass(frozen=True)
class ClipsUsed:
    """One list of clips that a training stands on."""

    fingerprint: str
    clips: int


@dataclass(frozen=True)
class Unreadable:
    """The clips of one list that could not be read: how many, and `path: why` of the first ones."""

    clips: int = 0
    first: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokensUsed:
    """The use of a token cache: the frozen blocks it stands for, and its rows at the start and at the end."""

    blocks: int
    rows: Mapping[str, int]
    rows_at_start: Mapping[str, int]


@dataclass(frozen=True)
class Record:
    """The numbers that a finished training left, what they cost, and where they come from.

    Fields without a default are in every record. The others came later or depend on the machine: None, an empty value
    or "unknown" says that the record does not hold them. Times are in seconds; `started` and `finished` since 1970.
    """

    trial_id: str
    recipe: Mapping[str, Any]  # every field, by dotted path
    metrics: Mapping[str, float]  # of the test split; accuracies in per cent
    epoch: int
    trainable_params: int
    macs_per_view: int
    seconds: float
    device: str
    data: Mapping[str, ClipsUsed]  # by split
    started: float
    finished: float
    decoder: str | None = None
    views: int = 1
    diverged: bool = False
    total_params: int | None = None
    dead_params: int | None = None
    adapter_params: int | None = None
    head_params: int | None = None
    cpu_seconds: float | None = None
    launches: int | None = None
    peak_memory_mib: float | None = None
    processes: int | None = None
    threads: int | None = None
    precision: str | None = None
    chosen: str | None = None  # how matrices were multiplied, and why
    compiled: bool | None = None
    recomputed: bool | None = None
    prefix_cache: TokensUsed | None = None
    bad_clips: Mapping[str, Unreadable] = field(default_factory=dict)  # by split
    versions: Mapping[str, str] = field(default_factory=dict)  # by library
    git_commit: str = "unknown"
    git_dirty: bool = False
    host: str | None = None

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each list of clips, by split."""
        return {split: used.fingerprint for split, used in self.data.items()}

    @property
    def code(self) -> str:
        """The commit that made the record, shortened, and whether the tree had changes."""
        return self.git_commit[:COMMIT_DIGITS] + ("+changes" if self.git_dirty else "")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as result.json holds them. `from_json` is the inverse."""
        data: dict[str, Any] = {split: vars(used) for split, used in self.data.items()}
        if self.decoder is not None:
            data["decoder"] = self.decoder
        bad = {split: {"clips": found.clips, "first": list(found.first)} for split, found in self.bad_clips.items()}
        tokens = self.prefix_cache and vars(self.prefix_cache)
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "decoder"}
        return plain | {"data": data, "bad_clips": bad, "prefix_cache": tokens}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the record of these fields, older ones included; fields of a later version are left out.

        Null counts as missing. Raises ValueError if a field that every record has is missing, or if one is of another
        kind.
        """
        known = {f.name: value for f in fields(cls) if (value := values.get(f.name)) is not None}
        for f in fields(cls):
            if f.name in known:
                _check_kind(f.name, known[f.name], str(f.type))
            elif f.default is MISSING and f.default_factory is MISSING:
                raise ValueError(f"{f.name} is missing")
        for name, value in known["metrics"].items():
            _check_kind(f"metrics.{name}", value, "float")
        if "top1" not in known["metrics"]:
            raise ValueError("metrics.top1 is missing")
        try:
            data = dict(known["data"])
            known["decoder"] = data.pop("decoder", None)
            known["data"] = {split: ClipsUsed(used["fingerprint"], used["clips"]) for split, used in data.items()}
            bad = known.get("bad_clips", {})
            known["bad_clips"] = {split: Unreadable(one["clips"], tuple(one["first"])) for split, one in bad.items()}
            if tokens := known.pop("prefix_cache", None):
                known["prefix_cache"] = TokensUsed(tokens["blocks"], tokens["rows"], tokens["rows_at_start"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{error} is missing or of another kind") from None
        return cls(**known)


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int, float),
    "float": (int, float),
    "Mapping": (Mapping,),
}


def _check_kind(name: str, value: object, annotation: str) -> None:
    """Raise ValueError if the value of a field is not of the kind that its annotation names: text, number, mapping."""
    kind = _KINDS.get(annotation.partition(" ")[0].partition("[")[0])
    if kind is not None and not isinstance(value, kind):
        raise ValueError(f"{name} is of another kind")


def prepare_folder(folder: Path, recipe: Recipe) -> None:
    """Create a run folder and write its config.json.

    Raises ConfigError if the folder cannot be written or holds another recipe.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):  # now, not after the first epoch
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        remove_parts(folder)
        if not check_config(folder, recipe):
            write_json(folder / CONFIG, flatten(recipe))
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}); choose another folder with --output"
        ) from None


def check_config(folder: Path, recipe: Recipe) -> bool:
    """Return True if the folder has a config.json. Raises ConfigError if that is another recipe's."""
    config = folder / CONFIG
    if not config.exists():
        return False
    found = scientific_fields(unflatten(_read_json(config)))
    wanted = scientific_fields(recipe)
    for path in {**wanted, **found}:
        if found.get(path) != wanted.get(path):
            raise ConfigError(
                f"{folder}: holds another training ({path} = {found.get(path)}, not {wanted.get(path)}); "
                "choose another --output"
            )
    return True


def check_data(folder: Path, found: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise ConfigError if a folder's training saw other clips.

    `found` are the fingerprints of its lists, `now` those of the lists at hand, by split.
    """
    for split, fingerprint in found.items():
        if now.get(split, fingerprint) != fingerprint:
            raise ConfigError(
                f"{folder}: holds a training on another data set (its {split} list has fingerprint {fingerprint}, not "
                f"{now[split]}); choose another --output, or the --data-root that it was made with"
            )


def read_result(folder: Path) -> Record | None:
    """Return the record of a finished training, or None if it has not finished. Raises ConfigError if it is damaged."""
    path = folder / RESULT
    if not path.exists():
        return None
    values = _read_json(path)
    try:
        return Record.from_json(values)
    except ValueError as error:
        raise ConfigError(
            f"{path}: is damaged ({error}); delete this file, and the same command makes it again from the last "
            "checkpoint"
        ) from None


def write_result(folder: Path, record: Record) -> None:
    """Write the record, whole or not at all: from then on the training counts as finished."""
    write_json(folder / RESULT, record.to_json())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:  # of JSON or of UTF-8
        reason = str(error) if path.stat().st_size else "it is empty"
        raise ConfigError(
            f"{path}: is damaged ({reason}); delete this file, and the same command makes it again from the last "
            "checkpoint"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: is damaged (holds no fields); delete this file, and run the same command again")
    return found


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the epochs recorded so far, without a last line that a crash cut short.

    Raises ConfigError if another line is damaged.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(
                f"{path}:{number}: is damaged ({error}); delete the run folder {folder.name}, and the same command "
                "trains it again"
            ) from None
    return found


def bad_clips_in_words(record: Record) -> str:
    """Return what a reader must know about the clips that could not be read; empty if there are none."""
    fates = {"train": "in training, replaced by neighbours", "test": "in testing, counted as wrong"}
    counts = {split: record.bad_clips[split].clips for split in fates if split in record.bad_clips}
    told = [f"{count} {fates[split]}" for split, count in counts.items() if count]
    return f"unreadable clips: {'; '.join(told)}" if told else ""
