"""The record of one training: the folder it lives in, and what it says about where its numbers came from.

A run folder is the truth; MLflow and every table are made from it. It holds

    config.json          every field of the recipe, by dotted path
    metrics.jsonl        one line per epoch, appended
    checkpoint.pt        the trainable tensors, optimiser and step to go on from; checkpoint.previous.pt the one before
    trained.safetensors  what was trained: adapters, head, and the final norm if it was
    result.json          the record, written last and atomically: it exists if and only if the training finished
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stadapter.config import ConfigError, Recipe, flatten, scientific_fields, unflatten

CONFIG, METRICS, CHECKPOINT = "config.json", "metrics.jsonl", "checkpoint.pt"
TRAINED, RESULT = "trained.safetensors", "result.json"
DEFAULT_CHECKPOINT_EVERY_S = 600.0  # within an epoch
PART = ".part"  # the end of the name of what is being written


class WriteError(OSError):
    """A file of a run folder could not be written. One line: which, why, and what to do; what was there is whole."""

    def __init__(self, path: Path, size: int, error: OSError) -> None:
        super().__init__(error.errno, error.strerror, str(path))
        self.line = f"{path}: cannot be written ({error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(path.parent).free
            self.line += f"; {size / 2**20:.1f} MiB are needed, {free / 2**20:.1f} MiB are free"
        self.line += "); what was written before is whole, and the same command goes on from it"

    def __str__(self) -> str:
        return self.line


@contextlib.contextmanager
def written_whole(path: Path, content: bytes) -> Iterator[None]:
    """Write `content` beside the file, run the block, then rename: a reader sees the old content or the new one, never
    a part, also after the machine went down. WriteError, and nothing is left behind, where it cannot be written."""
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PART}")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder may be gone or read-only: the first error is what matters
            part.unlink(missing_ok=True)
        raise WriteError(path, len(content), error) from error


def write_atomically(path: Path, content: bytes) -> None:
    """`written_whole`, with nothing in between."""
    with written_whole(path, content):
        pass


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


def remove_parts(folder: Path) -> None:
    """Remove what writers that died left half written. Only for the folder's one writer."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


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


def without_passwords(text: str) -> str:
    """The text with *** for the user and password that an address in it carries: for what is shown or kept."""
    return re.sub(r"//[^/\s]*@", "//***@", text)


def bad_clips_in_words(result: dict[str, Any]) -> str:
    """What a reader of a record must know about the clips it could not read; empty when there are none."""
    fates = {"train": "in training, replaced by neighbours", "test": "in testing, counted as wrong"}
    bad = result.get("bad_clips", {})
    counts = [f"{bad[split]['clips']} {fate}" for split, fate in fates.items() if bad.get(split, {}).get("clips")]
    return f"unreadable clips: {'; '.join(counts)}" if counts else ""
