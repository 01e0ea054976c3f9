"""Decoded frames on this node's disk, shared by all trials, epochs and processes that look at the same clips.

A cached clip is a row file with a row for each of its frames, uint8 RGB [H, W, 3], and holds the frames that were asked
for. Frames are kept as decoded, before any crop, so a cached clip gives the same numbers as a decoded one. Trials of
one seed look at the same frames in the same epochs: the second trial decodes nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from stadapter.data.cache.quota import GB, Quota
from stadapter.data.cache.row_file import BLOCK, Layout, RowFile, create, open_rows, write_rows
from stadapter.data.lists.bounded_folder import cache_folder
from stadapter.data.lists.storage import data_root, is_remote
from stadapter.data.video.packets import Indices, PathLike, resolve_indices

Decode = Callable[[PathLike, Indices], np.ndarray]

_HEADER = struct.Struct("<8sQQQ")  # magic, frames, height, width
_MAGIC = b"stacl\x00\x00\x01"  # the last byte counts the format's versions


def default_folder() -> Path:
    """Return $STADAPTER_CACHE/clips, or ~/.cache/stadapter/clips."""
    return cache_folder("clips")


def decode_settings(backend: str, short_side: int | None) -> str:
    """Return all that frames depend on besides the file, as JSON: readers, their versions, the size they are reduced
    to."""
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

    Picklable, and protected from removal by other processes, as its `Quota` is.
    """

    def __init__(self, root: PathLike, limit_bytes: int, settings: str, folder: Path | None = None) -> None:
        """`root` is the data set's, `settings` come from `decode_settings`, `folder` defaults to `default_folder()`."""
        text = json.dumps([_MAGIC.hex(), data_root(os.fspath(root)), settings])
        self.clips = (folder or default_folder()) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.quota = Quota(self.clips, limit_bytes, "--cache-gb")

    def read(self, path: PathLike, indices: Indices, decode: Decode) -> np.ndarray:
        """Return the frames that `decode(path, indices)` returns, decoding only those that are missing here."""
        try:
            identity = file_identity(path)
        except OSError:
            return decode(path, indices)  # raises the error that names the cause
        name = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        file = self.clips / name[:2] / name
        cached = open_rows(file, _HEADER.size, _parse)
        if cached is None:
            return self._read_new(file, path, indices, decode)
        with cached:
            return self._read_cached(file, cached, path, indices, decode)

    def used_bytes(self) -> int:
        """Return the bytes that all data sets' frames take, as `Quota.used_bytes` does."""
        return self.quota.used_bytes()

    def _read_new(self, file: Path, path: PathLike, indices: Indices, decode: Decode) -> np.ndarray:
        totals: list[int] = []
        wanted: list[int] = []

        def once(total: int) -> list[int]:
            totals.append(total)
            wanted[:] = resolve_indices(path, indices, total)
            return wanted

        frames = decode(path, once)
        if wanted:
            self._keep(file, totals[-1], dict(zip(wanted, frames, strict=True)), is_new=True)
        return frames

    def _read_cached(self, file: Path, cached: RowFile, path: PathLike, indices: Indices, decode: Decode) -> np.ndarray:
        total, shape = cached.layout.num_rows, _frame_shape(cached.layout)
        wanted = resolve_indices(path, indices, total)
        if not wanted:
            return decode(path, wanted)
        found = {index: row.reshape(shape) for index in set(wanted) if (row := cached.read(index)) is not None}
        missing = sorted(set(wanted) - found.keys())
        if missing:
            fresh = decode(path, missing)
            if fresh.shape[1:] != shape:
                return decode(path, wanted)  # raises: its frames change size within the clip
            found.update(zip(missing, fresh, strict=True))
            self._keep(file, total, {index: found[index] for index in missing}, is_new=False)
        return np.stack([found[index] for index in wanted])

    def _keep(self, file: Path, total: int, frames: dict[int, np.ndarray], *, is_new: bool) -> None:
        """Write frames if the quota allows; a full or broken disk leaves them out, with a warning."""
        height, width, _ = next(iter(frames.values())).shape
        layout = Layout(_HEADER.pack(_MAGIC, total, height, width), total, height * width * 3)
        try:
            # Batches made on a cluster may be the first that another node's folder sees.
            self.clips.mkdir(parents=True, exist_ok=True)
            if self.quota.take(len(frames) * (layout.row_bytes + BLOCK) + (layout.rows_start if is_new else 0)):
                if is_new:
                    create(file, layout, _parse)
                write_rows(file, layout, frames)
        except OSError as error:
            self.quota.warn(error)


@functools.cache
def open_cache(root: str, gigabytes: float, backend: str, short_side: int | None) -> ClipCache | None:
    """Return this node's cache for a data set, opened once by each process, or None if its limit is 0."""
    if not gigabytes:
        return None
    return ClipCache(root, int(gigabytes * GB), decode_settings(backend, short_side))


def file_identity(path: PathLike) -> str:
    """Return a text that changes when the file does. An address stands for a file that never changes."""
    if is_remote(path):
        return os.fspath(path)
    status = os.stat(path)
    return f"{os.path.abspath(path)}/{status.st_size}/{status.st_mtime_ns}"


def _parse(header: bytes) -> Layout | None:
    magic, total, height, width = _HEADER.unpack(header)
    return Layout(header, total, height * width * 3) if magic == _MAGIC else None


def _frame_shape(layout: Layout) -> tuple[int, int, int]:
    _, _, height, width = _HEADER.unpack(layout.header)
    return height, width, 3
