"""Why a trial failed, in error.txt of its folder. This module is light."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path

from stadapter.config import last_line
from stadapter.trials import files

ERROR = "error.txt"  # in a trial's folder: why it failed last


def write_error(folder: Path, error: Exception) -> str:
    """Write why a trial failed into its folder, the cause as the last line, and return that line."""
    text = files.without_passwords("".join(traceback.format_exception(error)))
    cause = files.without_passwords(last_line(error))
    with contextlib.suppress(OSError):  # a full or read-only disk may be the very error; the sweep learns it anyway
        folder.mkdir(parents=True, exist_ok=True)
        files.write_atomically(folder / ERROR, f"{text}\n{cause}\n".encode())
    return cause


def read_error(folder: Path) -> str | None:
    """Return the cause that `write_error` left in a trial's folder, or None."""
    path = folder / ERROR
    return path.read_text().strip().splitlines()[-1] if path.exists() else None
