"""Atomic writing: a file of a run folder is written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PART = ".part"  # ends the names of files that are being written


class WriteError(OSError):
    """An error for a file that could not be written: one line with the file, the reason and the way on."""

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
    """Write `content` beside the file, run the block, then rename.

    A reader sees the old content or the new one, never a part, even after a power cut. Raises WriteError, and leaves
    nothing behind, if the file cannot be written.
    """
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
    """Replace the file's content at once. Raises WriteError if the file cannot be written."""
    with written_whole(path, content):
        pass


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)


def remove_parts(folder: Path) -> None:
    """Remove files that writers left half written when they died. Only the folder's one writer may call this."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write the value as JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def without_passwords(text: str) -> str:
    """Return the text with *** for the user and password in each address. Use it on all that is shown or kept."""
    return re.sub(r"//[^/\s]*@", "//***@", text)
