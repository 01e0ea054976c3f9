"""The checkpoints of a training: two generations, each with its checksum.

A new checkpoint is complete on the disk before the last one becomes `checkpoint.previous.pt`, and only then takes its
place. So one of the two is whole whatever dies in between. A broken one is recognised by its checksum, set aside and
never loaded. Loading a checkpoint executes no code from it (`weights_only`).
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from stadapter.trials import files, record

PREVIOUS = "checkpoint.previous.pt"
_DIGEST_BYTES = hashlib.sha256().digest_size  # at the end of the file, after torch.save's bytes


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write the newest checkpoint, and keep the one before. Raises WriteError, with both as they were, if it fails."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = folder / record.CHECKPOINT
    with files.written_whole(path, content + hashlib.sha256(content).digest()):
        if path.exists():
            os.replace(path, folder / PREVIOUS)


def set_broken_aside(folder: Path) -> list[str]:
    """Rename broken checkpoints to `*.broken`; returns a line about each, and one about how the training goes on.

    Only the folder's one writer may call this.
    """
    notes = []
    for name in (record.CHECKPOINT, PREVIOUS):
        path = folder / name
        if path.exists() and _content(path) is None:
            kept = path.with_name(f"{name}.broken")
            os.replace(path, kept)
            notes.append(f"{path}: is cut short or damaged, and is kept as {kept.name}")
    if notes:
        whole = [name for name in (record.CHECKPOINT, PREVIOUS) if (folder / name).exists()]
        notes.append(f"the training goes on from {whole[0]}" if whole else "the training starts again")
    return notes


def load(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """Return the newest whole checkpoint, or None if there is none."""
    for name in (record.CHECKPOINT, PREVIOUS):
        if (content := _content(folder / name)) is not None:
            return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    return None


def _content(path: Path) -> bytes | None:
    """Return the bytes that were saved, or None if the file is missing or its checksum is wrong."""
    try:
        stored = path.read_bytes()
    except FileNotFoundError:  # or being renamed, when a process that only watches reads it
        return None
    content, digest = stored[:-_DIGEST_BYTES], stored[-_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None
