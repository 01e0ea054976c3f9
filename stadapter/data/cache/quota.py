"""Room for a cache: a folder beside others that together hold at most so many bytes of this node's disk.

What is full stays as it is: a sweep walks through its clips again and again, and replacing the clips used longest ago
would replace each just before its turn. Room is made only at a start, by removing what other data sets or settings left
behind. The folders must lie on a local file system (locks, sparse files, memory mapping).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from stadapter.config import ConfigError

GB = 10**9
BLOCK = 4096
_USED, _LOCK = "used-bytes", ".lock"


def cache_folder(kind: str) -> Path:
    """$STADAPTER_CACHE/kind, or ~/.cache/stadapter/kind."""
    return Path(os.environ.get("STADAPTER_CACHE") or Path.home() / ".cache" / "stadapter") / kind


class Room:
    """`own` and the folders beside it hold at most `limit_bytes` in all.

    Picklable: loader workers share it by its folder. The process that makes it protects `own` from removal by others
    for as long as it lives.
    """

    def __init__(self, own: Path, limit_bytes: int, flag: str) -> None:
        """ConfigError, which names the `flag`, where the folder cannot be written."""
        self.own, self.limit_bytes = own, limit_bytes
        self._protection: IO[bytes] | None = None
        try:
            self.own.mkdir(parents=True, exist_ok=True)
            self._protection = open(self.own / _LOCK, "ab")  # noqa: SIM115  # held until this process ends
        except OSError as error:
            raise ConfigError(
                f"{flag}: {own.parent} cannot be written ({error.strerror}); set STADAPTER_CACHE to a local folder"
            ) from None
        fcntl.flock(self._protection, fcntl.LOCK_SH)
        os.utime(self.own)
        self._make_room()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_protection": None}

    def take(self, size: int) -> bool:
        """Count so many bytes as used, if there is room for them."""
        with self._count() as count:
            if count[0] + size > self.limit_bytes:
                return False
            count[0] += size
            return True

    def used_bytes(self) -> int:
        """Of all folders, by their running count; exact after the start of a process that is alone."""
        with self._count() as count:
            return count[0]

    @contextlib.contextmanager
    def _count(self) -> Iterator[list[int]]:
        """[bytes used], for this process alone; what it is changed to is kept."""
        with open(self.own.parent / _USED, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            count = [int(text or 0)]
            before = count[0]
            yield count
            if count[0] != before:
                file.truncate(0)
                file.write(str(count[0]).encode())

    def _make_room(self) -> None:
        """Count what is there; above nine tenths of the limit, remove other folders, those used longest ago first."""
        with self._count() as count:
            sizes = {folder: disk_bytes(folder) for folder in self.own.parent.iterdir() if folder.is_dir()}
            others = sorted((folder for folder in sizes if folder != self.own), key=lambda f: f.stat().st_mtime)
            for folder in others:
                if sum(sizes.values()) > 0.9 * self.limit_bytes and _remove_unused(folder):
                    del sizes[folder]
            count[0] = sum(sizes.values())


def disk_bytes(folder: Path) -> int:
    """What the folder takes on the disk: holes in sparse files take nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_blocks * 512
    return total


def _remove_unused(folder: Path) -> bool:
    """Remove another cache's folder unless a running process uses it."""
    with contextlib.suppress(OSError), open(folder / _LOCK, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        doomed = folder.with_name(f".removed-{folder.name}-{time.time_ns()}")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        return True
    return False
