"""Folders on this node's disk that stay within a limit: where they lie, and what leaves them first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


def cache_folder(kind: str = "") -> Path:
    """Return $STADAPTER_CACHE/kind, or ~/.cache/stadapter/kind."""
    return Path(os.environ.get("STADAPTER_CACHE") or Path.home() / ".cache" / "stadapter") / kind


@dataclass(frozen=True)
class Entry:
    """A file or folder in a bounded folder."""

    path: Path
    num_bytes: int
    used: float  # seconds since the epoch


def remove_least_recently_used(entries: Iterable[Entry], limit_bytes: float, remove: Callable[[Path], bool]) -> int:
    """Remove the entries used longest ago until the others are within the limit; return the bytes that are left.

    `remove` returns False for an entry that must stay.
    """
    entries = sorted(entries, key=lambda entry: entry.used)
    total = sum(entry.num_bytes for entry in entries)
    for entry in entries:
        if total <= limit_bytes:
            break
        if remove(entry.path):
            total -= entry.num_bytes
    return total
