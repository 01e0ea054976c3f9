"""Tokens of the clips of one list, kept on this node's disk in one sparse file, a row for each clip."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
import warnings
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stadapter.data.cache.frames import file_identity
from stadapter.data.cache.quota import BLOCK, Room
from stadapter.data.lists.clip_list import split_segment

FLAG = "--cache-prefix"


_HEADER = struct.Struct("<8sQQQQ16s")


_MAGIC = b"stapre\x00\x01"  # the last byte counts the format's versions


class Rows:
    """The tokens of the clips of one list, each under its index in the list; `shape` is (T, S, D).

    Picklable, and protected from removal by others, as its `Room` is.
    """

    def __init__(self, room: Room, num_clips: int, shape: tuple[int, int, int]) -> None:
        self.room, self.num_clips, self.shape = room, num_clips, shape
        self.file = room.own / "rows"
        self._content: mmap.mmap | None = None
        self._dtype = torch.float32
        self._is_full = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_content": None}

    def stamp(self, path: str) -> int:
        """A number that changes with the clip's file; -1 where there is no such file."""
        try:
            identity = file_identity(split_segment(path)[0])
        except OSError:
            return -1
        return zlib.crc32(f"{identity}/{path}".encode("utf-8", "surrogateescape"))

    def read(self, index: int, stamp: int) -> Tensor | None:
        """[T, S, D], or None where the row is missing or not as it was written."""
        if (content := self._open()) is None or not (mark := self._mark(content, index)):
            return None
        size = self._row_bytes(self._dtype)
        row = np.frombuffer(content, np.uint8, size, _marks_end(self.num_clips) + index * size).copy()
        if mark != _mark(row, stamp):
            return None
        return torch.from_numpy(row).view(self._dtype).view(self.shape)

    def write(self, index: int, stamp: int, tokens_TSD: Tensor) -> None:
        """Keep a row if there is room; a disk that is full or broken leaves it out, with a warning."""
        if self._is_full:
            return
        tokens = tokens_TSD.contiguous().cpu()
        try:
            if (content := self._open()) is None:
                self._create(tokens.dtype)
                content = self._open()
            if content is None or tokens.dtype != self._dtype:
                raise OSError(f"{self.file} is of another type than {tokens.dtype}")
            size = self._row_bytes(tokens.dtype)
            if not self._mark(content, index) and not self.room.take(size + BLOCK):
                self._is_full = True
                return
            row = tokens.view(torch.uint8).numpy()
            with open(self.file, "r+b", buffering=0) as handle:
                os.pwrite(handle.fileno(), row.data, _marks_end(self.num_clips) + index * size)
                os.pwrite(handle.fileno(), struct.pack("<Q", _mark(row, stamp)), _HEADER.size + 8 * index)
        except OSError as error:
            self._is_full = True
            warnings.warn(f"{FLAG}: no more tokens are kept in {self.file}: {error}", stacklevel=2)

    def count(self) -> int:
        """How many rows are there."""
        content = self._open()
        if content is None:
            return 0
        return int(np.count_nonzero(np.frombuffer(content, np.uint64, self.num_clips, _HEADER.size)))

    def _row_bytes(self, dtype: torch.dtype) -> int:
        T, S, D = self.shape
        return T * S * D * dtype.itemsize

    def _mark(self, content: mmap.mmap, index: int) -> int:
        return int(struct.unpack_from("<Q", content, _HEADER.size + 8 * index)[0])

    def _open(self) -> mmap.mmap | None:
        """The file in memory; None where there is none yet, or it is not one of these."""
        if self._content is None:
            with contextlib.suppress(OSError, ValueError, struct.error), open(self.file, "rb") as handle:
                magic, *numbers, name = _HEADER.unpack(handle.read(_HEADER.size))
                dtype = getattr(torch, name.rstrip(b"\0").decode(), None)
                if (magic, numbers) == (_MAGIC, [self.num_clips, *self.shape]) and isinstance(dtype, torch.dtype):
                    end = _marks_end(self.num_clips) + self.num_clips * self._row_bytes(dtype)
                    if os.fstat(handle.fileno()).st_size == end:
                        self._content = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
                        self._dtype = dtype
        return self._content

    def _create(self, dtype: torch.dtype) -> None:
        """An empty file, which appears under its name at once and whole; one that cannot be read is replaced."""
        part = self.file.with_name(f".new-{os.getpid()}-{threading.get_ident()}")
        name = str(dtype).removeprefix("torch.").encode()
        with open(part, "wb") as file:
            file.write(_HEADER.pack(_MAGIC, self.num_clips, *self.shape, name))
            file.truncate(_marks_end(self.num_clips) + self.num_clips * self._row_bytes(dtype))
        try:
            os.link(part, self.file)
        except FileExistsError:
            if self._open() is None:  # else another process was faster
                os.replace(part, self.file)
        part.unlink(missing_ok=True)


def _marks_end(num_clips: int) -> int:
    return -(-(_HEADER.size + 8 * num_clips) // BLOCK) * BLOCK


def _mark(row: np.ndarray, stamp: int) -> int:
    return 2**32 + zlib.crc32(row.data, stamp)
