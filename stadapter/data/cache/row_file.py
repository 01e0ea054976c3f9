"""Sparse files of rows of equal length, each row kept or missing: the format of both caches.

    header   chosen by the cache: a magic number, then the numbers that describe the rows
    marks    uint64 per row: 0 while the row is missing, else 2^32 + its CRC-32
    rows     from the next multiple of 4096 bytes on

A mark is written after its row, and checked against it when the row is read: a row that a crash cut short, or that is
damaged, counts as missing. Two processes that write a row write the same bytes, so none waits for another. Files must
lie on a local file system (holes, memory mapping).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BLOCK = 4096  # bytes; a file system allocates no less


@dataclass(frozen=True)
class Layout:
    """The place of everything in a file, in bytes."""

    header: bytes
    num_rows: int
    row_bytes: int

    @property
    def rows_start(self) -> int:
        return -(-(len(self.header) + 8 * self.num_rows) // BLOCK) * BLOCK

    @property
    def file_bytes(self) -> int:
        return self.rows_start + self.num_rows * self.row_bytes

    def mark_place(self, index: int) -> int:
        return len(self.header) + 8 * index

    def row_place(self, index: int) -> int:
        return self.rows_start + index * self.row_bytes


ParseHeader = Callable[[bytes], Layout | None]  # None for a header of another format; may raise struct.error


class RowFile:
    """The rows of a file, mapped into memory."""

    def __init__(self, content: mmap.mmap, layout: Layout) -> None:
        self.layout, self._content = layout, content

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._content.close()

    def has(self, index: int) -> bool:
        return self._mark(index) != 0

    def read(self, index: int, crc_start: int = 0) -> np.ndarray | None:
        """Return a copy of the row, uint8 [row_bytes]; None if it is missing, damaged or was written with another
        `crc_start`."""
        if not (mark := self._mark(index)):
            return None
        place = self.layout.row_place(index)
        row = np.frombuffer(self._content, np.uint8, self.layout.row_bytes, place).copy()
        return row if mark == _mark_of(row, crc_start) else None

    def count(self) -> int:
        """Return the number of rows that are kept."""
        marks = np.frombuffer(self._content, np.uint64, self.layout.num_rows, self.layout.mark_place(0))
        return int(np.count_nonzero(marks))

    def _mark(self, index: int) -> int:
        return int(struct.unpack_from("<Q", self._content, self.layout.mark_place(index))[0])


def open_rows(file: Path, header_bytes: int, parse: ParseHeader) -> RowFile | None:
    """Return the rows of a file, or None if there is no file, or a file of another format or length."""
    try:
        with open(file, "rb") as handle:
            layout = parse(handle.read(header_bytes))
            if layout is None or os.fstat(handle.fileno()).st_size != layout.file_bytes:
                return None
            return RowFile(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), layout)
    except (OSError, ValueError, struct.error):
        return None


def create(file: Path, layout: Layout, parse: ParseHeader) -> None:
    """Make a file without rows, which appears under its name at once and whole.

    Of two that are made at once one stays. A file that `open_rows` cannot read is replaced.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part_file = file.with_name(f".new-{file.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        with open(part_file, "wb") as part:
            part.write(layout.header)
            part.truncate(layout.file_bytes)
        try:
            os.link(part_file, file)
        except FileExistsError:
            if open_rows(file, len(layout.header), parse) is None:
                os.replace(part_file, file)
    finally:
        with contextlib.suppress(OSError):
            part_file.unlink(missing_ok=True)


def write_rows(file: Path, layout: Layout, rows: Mapping[int, np.ndarray], crc_start: int = 0) -> None:
    """Keep rows, each of `row_bytes` bytes, under their indices."""
    with open(file, "r+b", buffering=0) as handle:
        for index, values in rows.items():
            row = np.ascontiguousarray(values)
            os.pwrite(handle.fileno(), row.data, layout.row_place(index))
            os.pwrite(handle.fileno(), struct.pack("<Q", _mark_of(row, crc_start)), layout.mark_place(index))


def _mark_of(row: np.ndarray, crc_start: int) -> int:
    return 2**32 + zlib.crc32(row.data, crc_start)
