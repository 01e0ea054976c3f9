"""The record of one training: the folder it lives in, and what it says about where its numbers came from.

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
from pathlib import Path
from typing import Any

from stadapter.config import ConfigError, Recipe, flatten, scientific_fields, unflatten
from stadapter.trials.files import remove_parts, write_json

CONFIG, METRICS, CHECKPOINT = "config.json", "metrics.jsonl", "checkpoint.pt"
TRAINED, RESULT = "trained.safetensors", "result.json"


def prepare_folder(folder: Path, recipe: Recipe) -> None:
    """Create a run folder and write its config.json. ConfigError where it cannot be written or holds another recipe."""
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
    """Whether the folder has a config.json; ConfigError where that is another recipe's."""
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
    """ConfigError where a folder's training saw other clips: `found` and `now` are the fingerprints of its lists."""
    for split, fingerprint in found.items():
        if now.get(split, fingerprint) != fingerprint:
            raise ConfigError(
                f"{folder}: holds a training on another data set (its {split} list has fingerprint {fingerprint}, not "
                f"{now[split]}); choose another --output, or the --data-root that it was made with"
            )


def read_result(folder: Path) -> dict[str, Any] | None:
    """The record of a finished training, or None where it has not finished. ConfigError if it is damaged."""
    path = folder / RESULT
    return _read_json(path) if path.exists() else None


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
    """The epochs recorded so far; a last line cut short by a crash is left out. ConfigError if another is damaged."""
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


def fingerprints(result: Mapping[str, Any]) -> dict[str, str]:
    """{split: fingerprint} of the clips that a record stands on."""
    return {split: one["fingerprint"] for split, one in result["data"].items() if isinstance(one, dict)}


def bad_clips_in_words(result: dict[str, Any]) -> str:
    """What a reader of a record must know about the clips it could not read; empty when there are none."""
    fates = {"train": "in training, replaced by neighbours", "test": "in testing, counted as wrong"}
    bad = result.get("bad_clips", {})
    counts = [f"{bad[split]['clips']} {fate}" for split, fate in fates.items() if bad.get(split, {}).get("clips")]
    return f"unreadable clips: {'; '.join(counts)}" if counts else ""
