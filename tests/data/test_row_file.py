"""Row files: the bytes on the disk, and rows that are missing, damaged or of another file."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from videos import write_grey

from stadapter.data.cache.frames import ClipCache, file_identity
from stadapter.data.cache.quota import GB, Quota
from stadapter.data.cache.row_file import Layout, RowFile, create, open_rows, write_rows
from stadapter.data.cache.tokens import Rows

HEADER = b"a header"
LAYOUT = Layout(HEADER, num_rows=5, row_bytes=6000)
ROW = np.arange(6000, dtype=np.uint16).astype(np.uint8)


def parse(header: bytes) -> Layout | None:
    return LAYOUT if header == HEADER else None


def opened(file: Path) -> RowFile:
    rows = open_rows(file, len(HEADER), parse)
    assert rows is not None
    return rows


@pytest.fixture
def file(tmp_path: Path) -> Path:
    create(tmp_path / "rows", LAYOUT, parse)
    return tmp_path / "rows"


def test_a_new_file_has_no_rows_and_takes_next_to_nothing(file: Path) -> None:
    rows = opened(file)
    assert (rows.count(), rows.has(3), rows.read(3)) == (0, False, None)
    assert file.stat().st_size == 4096 + 5 * 6000
    assert file.stat().st_blocks * 512 <= 4096
    assert [path.name for path in file.parent.iterdir()] == ["rows"]


def test_a_row_is_there_once_it_is_written(file: Path) -> None:
    rows = opened(file)
    write_rows(file, LAYOUT, {3: ROW}, crc_start=7)
    np.testing.assert_array_equal(rows.read(3, crc_start=7), ROW)
    assert (rows.count(), rows.read(2, crc_start=7), rows.read(3, crc_start=8)) == (1, None, None)


def test_a_damaged_row_counts_as_missing(file: Path) -> None:
    write_rows(file, LAYOUT, {0: ROW, 4: ROW})
    with open(file, "r+b") as handle:
        handle.seek(LAYOUT.row_place(4) + 5999)
        handle.write(b"\xff")
    assert opened(file).read(0) is not None
    assert opened(file).read(4) is None


def test_a_file_that_is_there_stays(file: Path) -> None:
    write_rows(file, LAYOUT, {1: ROW})
    create(file, LAYOUT, parse)
    assert opened(file).has(1)


@pytest.mark.parametrize("content", [b"", b"a head", HEADER, b"another " + bytes(LAYOUT.file_bytes - 8)])
def test_a_file_of_another_format_or_length_is_not_read_but_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows").write_bytes(content)
    assert open_rows(tmp_path / "rows", len(HEADER), parse) is None
    create(tmp_path / "rows", LAYOUT, parse)
    assert opened(tmp_path / "rows").count() == 0


# --- Files that were written by earlier versions


def test_cached_frames_lie_where_they_always_lay(tmp_path: Path) -> None:
    video = write_grey(tmp_path / "a.mp4", num_frames=3, size=32)
    cache = ClipCache(tmp_path, GB, "settings", tmp_path / "cache")
    (frame,) = cache.read(video, [1], _never_the_same)
    (file,) = (path for path in cache.clips.glob("*/*") if path.is_file())
    content = file.read_bytes()
    assert content[:32] == struct.pack("<8sQQQ", b"stacl\x00\x00\x01", 3, 32, 32)
    assert content[32:56] == struct.pack("<QQQ", 0, 2**32 + zlib.crc32(frame.tobytes()), 0)
    assert content[4096 + 3072 : 4096 + 6144] == frame.tobytes()
    assert len(content) == 4096 + 3 * 3072
    assert file.name.startswith(file.parent.name) and file_identity(video).startswith(str(video))


def _never_the_same(path: object, indices: object) -> np.ndarray:
    wanted = list(indices(3)) if callable(indices) else list(indices)  # type: ignore[call-overload]
    return np.frombuffer(os.urandom(len(wanted) * 3072), np.uint8).reshape(-1, 32, 32, 3)


def test_kept_tokens_lie_where_they_always_lay(tmp_path: Path) -> None:
    rows = Rows(Quota(tmp_path / "own", 10**6, "--cache-prefix"), 2, (2, 3, 4))
    tokens = torch.randn(2, 3, 4).to(torch.bfloat16)
    rows.write(1, 77, tokens)
    content = (tmp_path / "own" / "rows").read_bytes()
    row = tokens.view(torch.uint8).numpy().tobytes()
    assert content[:56] == struct.pack("<8sQQQQ16s", b"stapre\x00\x01", 2, 2, 3, 4, b"bfloat16")
    assert content[56:72] == struct.pack("<QQ", 0, 2**32 + zlib.crc32(row, 77))
    assert content[4096:] == bytes(48) + row
