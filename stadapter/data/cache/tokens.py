"""Tokens of the clips of one list on this node's disk: a row file with a row [T, S, D] for each clip.

The CRC of a row starts from the stamp of its clip's file: once the file has changed, its row counts as missing.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import torch
from torch import Tensor

from stadapter.data.cache.frames import file_identity
from stadapter.data.cache.quota import Quota
from stadapter.data.cache.row_file import BLOCK, Layout, RowFile, create, open_rows, write_rows
from stadapter.data.lists.clip_list import split_segment

FLAG = "--cache-prefix"
MAGIC = b"stapre\x00\x01"  # the last byte counts the format's versions
_HEADER = struct.Struct("<8sQQQQ16s")  # magic, rows, T, S, D, name of the type


class Rows:
    """The tokens of the clips of one list, each under its index in the list; `shape` is (T, S, D).

    Picklable, and protected from removal by other processes, as its `Quota` is.
    """

    def __init__(self, quota: Quota, num_clips: int, shape: tuple[int, int, int]) -> None:
        self.quota, self.num_clips, self.shape = quota, num_clips, shape
        self.file = quota.folder / "rows"
        self._rows: RowFile | None = None
        self._is_full = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def stamp(self, path: str) -> int:
        """Return a number that changes with the clip's file, or -1 if there is no such file."""
        try:
            identity = file_identity(split_segment(path)[0])
        except OSError:
            return -1
        return zlib.crc32(f"{identity}/{path}".encode("utf-8", "surrogateescape"))

    def read(self, index: int, stamp: int) -> Tensor | None:
        """Return tokens [T, S, D], or None if the row is missing, damaged or of another stamp."""
        if (rows := self._open()) is None or (row := rows.read(index, stamp)) is None:
            return None
        return torch.from_numpy(row).view(_dtype(rows.layout)).view(self.shape)

    def write(self, index: int, stamp: int, tokens_TSD: Tensor) -> None:
        """Keep a row if the quota allows; a full or broken disk leaves it out, with a warning."""
        if self._is_full:
            return
        tokens = tokens_TSD.contiguous().cpu()
        layout = self._layout(tokens.dtype)
        try:
            if (rows := self._open()) is None:
                create(self.file, layout, self._parse)
                rows = self._open()
            if rows is None or rows.layout != layout:
                raise OSError(f"{self.file.name} is of another type than {tokens.dtype}")
            if not rows.has(index) and not self.quota.take(layout.row_bytes + BLOCK):
                self._is_full = True
                return
            write_rows(self.file, layout, {index: tokens.view(torch.uint8).numpy()}, stamp)
        except OSError as error:
            self._is_full = True
            self.quota.warn(error)

    def count(self) -> int:
        """Return the number of rows that are kept."""
        rows = self._open()
        return 0 if rows is None else rows.count()

    def _open(self) -> RowFile | None:
        if self._rows is None:
            self._rows = open_rows(self.file, _HEADER.size, self._parse)
        return self._rows

    def _layout(self, dtype: torch.dtype) -> Layout:
        T, S, D = self.shape
        name = str(dtype).removeprefix("torch.").encode()
        return Layout(_HEADER.pack(MAGIC, self.num_clips, T, S, D, name), self.num_clips, T * S * D * dtype.itemsize)

    def _parse(self, header: bytes) -> Layout | None:
        magic, *numbers, name = _HEADER.unpack(header)
        dtype = getattr(torch, name.rstrip(b"\0").decode(), None)
        if (magic, numbers) != (MAGIC, [self.num_clips, *self.shape]) or not isinstance(dtype, torch.dtype):
            return None
        return self._layout(dtype)


def _dtype(layout: Layout) -> torch.dtype:
    *_, name = _HEADER.unpack(layout.header)
    dtype: torch.dtype = getattr(torch, name.rstrip(b"\0").decode())
    return dtype
