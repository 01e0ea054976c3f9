"""Decoded frames on this node's disk, shared by all trials, epochs and processes that look at the same clips.

A cached clip is one sparse file with a place for each of its frames, and holds those that somebody has asked for:

    header   magic, number of frames, height, width
    marks    uint64 per frame: 0 while it is missing, else 2^32 + the CRC-32 of its bytes
    frames   uint8 RGB [frames, H, W, 3]

Frames are kept as decoded, before any crop, so a cached clip gives the same numbers as a decoded one. Trials of one
seed look at the same frames in the same epochs: the second decodes nothing. A frame's mark is written after the frame,
and checked against it when it is read: a frame cut short by a crash is decoded again, never shown. Two processes that
write the same frame write the same bytes, so nobody waits.

How much disk they may take, and what is removed for them, is `room`'s.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from stadapter.data.cache.quota import BLOCK, GB, Room, cache_folder
from stadapter.data.lists.storage import data_root, is_remote
from stadapter.data.video.packets import Indices, PathLike, resolve_indices

Decode = Callable[[PathLike, Indices], np.ndarray]

_HEADER = struct.Struct("<8sQQQ")
_MAGIC = b"stacl\x00\x00\x01"  # the last byte counts the format's versions


def default_folder() -> Path:
    """$STADAPTER_CACHE/clips, or ~/.cache/stadapter/clips."""
    return cache_folder("clips")


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

    Picklable, and protected from removal by others, as its `Room` is.
    """

    def __init__(self, root: PathLike, limit_bytes: int, settings: str, folder: Path | None = None) -> None:
        """`root` is the data set's, `settings` as by `decode_settings`; `folder` is `default_folder()` if not given."""
        text = json.dumps([_MAGIC.hex(), data_root(os.fspath(root)), settings])
        self.clips = (folder or default_folder()) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.room = Room(self.clips, limit_bytes, "--cache-gb")

    def read(self, path: PathLike, indices: Indices, decode: Decode) -> np.ndarray:
        """The frames as by `decode(path, indices)`, which is asked for missing ones only."""
        try:
            identity = file_identity(path)
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
        """Of the whole folder: `Room.used_bytes`."""
        return self.room.used_bytes()

    def _store(self, file: Path, total: int, frames: dict[int, np.ndarray]) -> None:
        """Keep frames if there is room; a full or broken disk leaves them out and costs nothing else."""
        first = next(iter(frames.values()))
        with contextlib.suppress(OSError):  # another node's folder, where batches are made on a cluster
            self.clips.mkdir(parents=True, exist_ok=True)
        size = sum(frame.nbytes + BLOCK for frame in frames.values()) + (0 if file.exists() else _marks_end(total))
        with contextlib.suppress(OSError):
            if not self.room.take(size):
                return
            if not file.exists():
                _create(file, total, first.shape[0], first.shape[1])
            _write(file, total, frames)


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


def file_identity(path: PathLike) -> str:
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
