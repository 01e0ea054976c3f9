"""Decoded frames on this node's disk, shared by all trials, epochs and processes that look at the same clips.

A cached clip is one sparse file with a place for each of its frames, and holds those that somebody has asked for:

    header   magic, number of frames, height, width
    marks    uint64 per frame: 0 while it is missing, else 2^32 + the CRC-32 of its bytes
    frames   uint8 RGB [frames, H, W, 3]

Frames are kept as decoded, before any crop, so a cached clip gives the same numbers as a decoded one. Trials of one
seed look at the same frames in the same epochs: the second decodes nothing. A frame's mark is written after the frame,
and checked against it when it is read: a frame cut short by a crash is decoded again, never shown. Two processes that
write the same frame write the same bytes, so nobody waits.

What is full stays as it is: a sweep walks through its clips again and again, and replacing the clips used longest ago
would replace each just before its turn. Room is made only at a start, by removing what other data sets or decoder
settings left behind. The cache must lie on a local file system (locks, sparse files, memory mapping).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import mmap
import os
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import numpy as np

from stadapter.config import ConfigError
from stadapter.data.packets import Indices, PathLike, resolve_indices
from stadapter.data.storage import data_root, is_remote

Decode = Callable[[PathLike, Indices], np.ndarray]

GB = 10**9
_HEADER = struct.Struct("<8sQQQ")
_MAGIC = b"stacl\x00\x00\x01"  # the last byte counts the format's versions
BLOCK = 4096
_USED, _LOCK = "used-bytes", ".lock"


def default_folder() -> Path:
    """$STADAPTER_CACHE/clips, or ~/.cache/stadapter/clips."""
    return Path(os.environ.get("STADAPTER_CACHE") or Path.home() / ".cache" / "stadapter") / "clips"


def decode_settings(backend: str, short_side: int | None) -> str:
    """What frames depend on besides the file: readers, their versions, the size they are reduced to."""
    libraries = {"av", {"auto": "av", "pyav": "av"}.get(backend, backend)}
    versions = {}
    for library in sorted(libraries):
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = "none"
    return json.dumps({"readers": versions, "short_side": short_side}, sort_keys=True)


class ClipCache:
    """The frames of one data set, decoded with one setting, in a folder that holds at most `limit_bytes` in all.

    Picklable: loader workers share it by its folder. The process that makes it protects its frames from removal by
    others for as long as it lives.
    """

    def __init__(self, root: PathLike, limit_bytes: int, settings: str, folder: Path | None = None) -> None:
        """`root` is the data set's, `settings` as by `decode_settings`; `folder` is `default_folder()` if not given."""
        self.folder, self.limit_bytes = folder or default_folder(), limit_bytes
        text = json.dumps([_MAGIC.hex(), data_root(os.fspath(root)), settings])
        self.clips = self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._protection: IO[bytes] | None = None
        try:
            self.clips.mkdir(parents=True, exist_ok=True)
            self._protection = open(self.clips / _LOCK, "ab")  # noqa: SIM115  # held until this process ends
        except OSError as error:
            raise ConfigError(
                f"--cache-gb: {self.folder} cannot be written ({error.strerror}); set STADAPTER_CACHE to a local folder"
            ) from None
        fcntl.flock(self._protection, fcntl.LOCK_SH)
        os.utime(self.clips)
        self._make_room()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_protection": None}

    def read(self, path: PathLike, indices: Indices, decode: Decode) -> np.ndarray:
        """The frames as by `decode(path, indices)`, which is asked for missing ones only."""
        try:
            identity = _identity(path)
        except OSError:
            return decode(path, indices)  # says what is wrong
        name = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        file = self.clips / name[:2] / name
        cached = _Cached.open(file)
        if cached is None:
            totals: list[int] = []
            wanted: list[int] = []

            def once(total: int) -> list[int]:
                totals.append(total)
                wanted[:] = resolve_indices(path, indices, total)
                return wanted

            frames = decode(path, once)
            if wanted:
                self._store(file, totals[-1], dict(zip(wanted, frames, strict=True)))
            return frames
        with cached:
            wanted = resolve_indices(path, indices, cached.total)
            if not wanted:
                return decode(path, wanted)
            found = {index: frame for index in set(wanted) if (frame := cached.frame(index)) is not None}
            missing = sorted(set(wanted) - found.keys())
            if missing:
                fresh = decode(path, missing)
                if fresh.shape[1:] != cached.shape:
                    return decode(path, wanted)  # frames that change size are an error, and it tells it
                found.update(zip(missing, fresh, strict=True))
                self._store(file, cached.total, {index: found[index] for index in missing})
            return np.stack([found[index] for index in wanted])

    def used_bytes(self) -> int:
        """Of the whole folder, by its running count; exact after the start of a process that is alone."""
        with self._count() as count:
            return count[0]

    def _store(self, file: Path, total: int, frames: dict[int, np.ndarray]) -> None:
        """Keep frames if there is room; a full or broken disk leaves them out and costs nothing else."""
        first = next(iter(frames.values()))
        with contextlib.suppress(OSError):  # another node's folder, where batches are made on a cluster
            self.clips.mkdir(parents=True, exist_ok=True)
        size = sum(frame.nbytes + BLOCK for frame in frames.values()) + (0 if file.exists() else _marks_end(total))
        with contextlib.suppress(OSError):
            with self._count() as count:
                if count[0] + size > self.limit_bytes:
                    return
                count[0] += size
            if not file.exists():
                _create(file, total, first.shape[0], first.shape[1])
            _write(file, total, frames)

    @contextlib.contextmanager
    def _count(self) -> Iterator[list[int]]:
        """[bytes used], for this process alone; what it is changed to is kept."""
        with open(self.folder / _USED, "a+b") as file:
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
        """Count what is there; above nine tenths of the limit, remove other clips, those used longest ago first."""
        with self._count() as count:
            sizes = {folder: _disk_bytes(folder) for folder in self.folder.iterdir() if folder.is_dir()}
            others = sorted((folder for folder in sizes if folder != self.clips), key=lambda f: f.stat().st_mtime)
            for folder in others:
                if sum(sizes.values()) > 0.9 * self.limit_bytes and _remove_unused(folder):
                    del sizes[folder]
            count[0] = sum(sizes.values())


@functools.cache
def open_cache(root: str, gigabytes: float, backend: str, short_side: int | None) -> ClipCache | None:
    """This node's cache for a data set, opened once by each process; None where its limit is 0."""
    if not gigabytes:
        return None
    return ClipCache(root, int(gigabytes * GB), decode_settings(backend, short_side))


class _Cached:
    """A cached clip, mapped into memory."""

    def __init__(self, content: mmap.mmap, total: int, height: int, width: int) -> None:
        self.total, self.shape = total, (height, width, 3)
        self._content = content
        self._marks = np.frombuffer(content, np.uint64, total, _HEADER.size)

    @classmethod
    def open(cls, file: Path) -> _Cached | None:
        """None where there is no such file, or it is not one of these."""
        try:
            with open(file, "rb") as handle:
                magic, total, height, width = _HEADER.unpack(handle.read(_HEADER.size))
                if (
                    magic != _MAGIC
                    or os.fstat(handle.fileno()).st_size != _marks_end(total) + total * height * width * 3
                ):
                    return None
                return cls(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), total, height, width)
        except (OSError, ValueError, struct.error):
            return None

    def __enter__(self) -> _Cached:
        return self

    def __exit__(self, *_: object) -> None:
        del self._marks
        self._content.close()

    def frame(self, index: int) -> np.ndarray | None:
        """A copy, uint8 [H, W, 3], or None where the frame is missing or not as it was written."""
        mark = int(self._marks[index])
        if not mark:
            return None
        size = self.shape[0] * self.shape[1] * 3
        pixels = np.frombuffer(self._content, np.uint8, size, _marks_end(self.total) + index * size).copy()
        return pixels.reshape(self.shape) if mark == _mark(pixels) else None


def _identity(path: PathLike) -> str:
    """What changes when a file does; an address stands for a file that never changes, as in `storage`."""
    if is_remote(path):
        return os.fspath(path)
    status = os.stat(path)
    return f"{os.path.abspath(path)}/{status.st_size}/{status.st_mtime_ns}"


def _marks_end(total: int) -> int:
    return -(-(_HEADER.size + 8 * total) // BLOCK) * BLOCK


def _mark(pixels: np.ndarray) -> int:
    return 2**32 + zlib.crc32(pixels.data)


def _create(file: Path, total: int, height: int, width: int) -> None:
    """An empty clip, which appears under its name at once and whole. Of two that are made at once, one stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part_file = file.with_name(f".new-{file.name}-{os.getpid()}-{threading.get_ident()}")
    with open(part_file, "wb") as part:
        part.write(_HEADER.pack(_MAGIC, total, height, width))
        part.truncate(_marks_end(total) + total * height * width * 3)
    with contextlib.suppress(FileExistsError):
        os.link(part_file, file)
    part_file.unlink()


def _write(file: Path, total: int, frames: dict[int, np.ndarray]) -> None:
    with open(file, "r+b", buffering=0) as handle:
        for index, frame in frames.items():
            pixels = np.ascontiguousarray(frame)
            os.pwrite(handle.fileno(), pixels.data, _marks_end(total) + index * pixels.nbytes)
            os.pwrite(handle.fileno(), struct.pack("<Q", _mark(pixels)), _HEADER.size + 8 * index)


def _disk_bytes(folder: Path) -> int:
    """What the folder takes on the disk: the places of missing frames take nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_blocks * 512
    return total


def _remove_unused(folder: Path) -> bool:
    """Remove a data set's clips unless a running process uses them."""
    with contextlib.suppress(OSError), open(folder / _LOCK, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        doomed = folder.with_name(f".removed-{folder.name}-{time.time_ns()}")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        return True
    return False
