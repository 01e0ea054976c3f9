"""A limit on the disk that a cache's folders take together.

A full cache stays as it is: a sweep walks through its clips again and again, and replacing the clips used longest ago
would replace each just before its turn. (Local copies of remote files, which are written once and mostly read once, do
make way for each other: `data.lists.storage`.) Only at a start are the folders removed that other data sets or settings
left behind. Folders must lie on a local file system (locks).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from stadapter.config import ConfigError
from stadapter.data.lists.bounded_folder import Entry, remove_least_recently_used

GB = 10**9
_FULL = 0.9  # share of the limit above which a start removes other folders
_USED, _LOCK = "used-bytes", ".lock"


class Quota:
    """The bytes that `folder` and the folders beside it may take in all.

    Picklable: loader workers share it by its folder. The process that makes it protects `folder` from removal by other
    processes for as long as it lives.
    """

    def __init__(self, folder: Path, limit_bytes: int, flag: str) -> None:
        """Raise ConfigError, naming the `flag`, if the folder cannot be written."""
        self.folder, self.limit_bytes, self.flag = folder, limit_bytes, flag
        self._protection: IO[bytes] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._protection = open(folder / _LOCK, "ab")  # noqa: SIM115  # held until this process ends
        except OSError as error:
            raise ConfigError(
                f"{flag}: {folder.parent} cannot be written ({error.strerror}); set STADAPTER_CACHE to a local folder"
            ) from None
        fcntl.flock(self._protection, fcntl.LOCK_SH)
        os.utime(folder)
        self._remove_others()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_protection": None}

    def take(self, num_bytes: int) -> bool:
        """Count the bytes as used and return True, or return False if they are above the limit."""
        with self._count() as count:
            if count[0] + num_bytes > self.limit_bytes:
                return False
            count[0] += num_bytes
            return True

    def used_bytes(self) -> int:
        """Return the running count for all folders, which is exact after the start of a process that is alone."""
        with self._count() as count:
            return count[0]

    def warn(self, error: OSError) -> None:
        """Say that a full or broken disk keeps no more. Nothing is lost but speed, so nothing is raised."""
        # Without the name of the file: equal warnings are shown once.
        warnings.warn(f"{self.flag}: no more is kept in {self.folder}: {error.strerror or error}", stacklevel=3)

    @contextlib.contextmanager
    def _count(self) -> Iterator[list[int]]:
        """Yield [bytes used], locked for this process; a changed count is stored."""
        with open(self.folder.parent / _USED, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            count = [int(file.read() or 0)]
            before = count[0]
            yield count
            if count[0] != before:
                file.truncate(0)
                file.write(str(count[0]).encode())

    def _remove_others(self) -> None:
        """Count all folders; if they nearly fill the limit, remove others, those used longest ago first."""
        with self._count() as count:
            folders = [folder for folder in self.folder.parent.iterdir() if folder.is_dir()]
            entries = [Entry(folder, disk_bytes(folder), folder.stat().st_mtime) for folder in folders]
            count[0] = remove_least_recently_used(
                entries, _FULL * self.limit_bytes, lambda folder: folder != self.folder and _remove_unused(folder)
            )


def disk_bytes(folder: Path) -> int:
    """Return the bytes that a folder takes on the disk, where holes in sparse files take none."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_blocks * 512
    return total


def _remove_unused(folder: Path) -> bool:
    """Remove a folder and return True, or return False if a running process uses it."""
    with contextlib.suppress(OSError), open(folder / _LOCK, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        doomed = folder.with_name(f".removed-{folder.name}-{time.time_ns()}")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        return True
    return False
