"""The packets of a video file: the frames they show, and the places where a decoder may start."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Indices = Sequence[int] | Callable[[int], Sequence[int]]
PathLike = str | os.PathLike[str]

# Where one packet holds exactly one shown frame, packets can be counted and skipped instead of decoded. Elsewhere
# (hidden VP8 frames, AVI without time stamps, field pairs and cut streams in .ts) the whole file is decoded.
_INDEXED_CODECS = {"h264", "hevc", "vp9", "av1"}
_INDEXED_CONTAINERS = {"mp4", "mov", "matroska", "webm"}


class ClipError(RuntimeError):
    """A clip that cannot be read. The message names the file and says what is wrong with it."""


@dataclass(frozen=True)
class Packets:
    """The compressed pictures of a file, in coding order."""

    packets: list[Any]
    shown: list[int]  # time stamps of the shown pictures, sorted: index -> time stamp


@contextlib.contextmanager
def open_video(path: PathLike) -> Iterator[tuple[Any, Any]]:
    """Open a container and its first video stream. Every failure inside becomes a ClipError that names the file."""
    import av  # late: 0.11 s that lists and `--help` need not take

    name = os.fspath(path)
    try:
        if os.path.getsize(name) == 0:
            raise ClipError(f"{name}: the file is empty (zero bytes)")
        with av.open(name) as container:
            if not container.streams.video:
                raise ClipError(f"{name}: has no video stream")
            stream = container.streams.video[0]
            # Decoder threads started in a parent process deadlock its forked children.
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except av.error.InvalidDataError as error:
        raise ClipError(f"{name}: is not a video, or is truncated or damaged ({error.strerror})") from None
    except (av.error.FFmpegError, OSError) as error:
        raise ClipError(f"{name}: cannot be read ({error.strerror or error})") from None


def read_packets(path: PathLike, container: Any, stream: Any) -> Packets | None:
    """Return all packets of the stream, or None if packets are not frames one to one. Raises ClipError if truncated."""
    indexed_container = _INDEXED_CONTAINERS & set(container.format.name.split(","))
    if not indexed_container or stream.codec_context.name.removeprefix("lib") not in _INDEXED_CODECS | {"dav1d"}:
        return None
    last_byte = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if "matroska" in indexed_container:
        last_byte = max(last_byte, _matroska_end(path))
    packets = [packet for packet in container.demux(stream) if packet.size]
    if last_byte > container.size or any(packet.is_corrupt for packet in packets):
        raise ClipError(f"{os.fspath(path)}: is truncated")
    # Pictures outside the edit list are decoded for reference but never shown.
    shown = sorted(packet.pts for packet in packets if packet.pts is not None and not packet.is_discard)
    if len(set(shown)) != len(shown) or any(packet.pts is None for packet in packets):
        container.seek(0)
        return None
    if not shown:
        raise ClipError(f"{os.fspath(path)}: has no frames")
    return Packets(packets, shown)


def _matroska_end(path: PathLike) -> int:
    """Return the byte where a Matroska or WebM file should end by its header, or 0 if the header does not say."""
    with open(path, "rb") as file:
        head = file.read(4096)
    place = 0
    for element in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):  # the EBML header, then the segment that holds all
        if head[place : place + 4] != element or place + 12 > len(head):
            return 0
        first = head[place + 4]
        width = 9 - first.bit_length()  # of the number that follows: its leading zero bits count its bytes
        size = int.from_bytes(head[place + 4 : place + 4 + width], "big") & ((1 << 7 * width) - 1)
        if size == (1 << 7 * width) - 1:  # all ones: unknown, as in a live recording
            return 0
        place += 4 + width + size
    return place


def resolve_indices(path: PathLike, indices: Indices, total: int) -> list[int]:
    """Return the request as a list. Raises ClipError if an index is not in [0, total)."""
    wanted = [int(i) for i in (indices(total) if callable(indices) else indices)]
    if total == 0:
        raise ClipError(f"{os.fspath(path)}: has no frames")
    for index in wanted:
        if not 0 <= index < total:
            raise ClipError(f"{os.fspath(path)}: frame {index} was asked for, but the clip has {total}")
    return wanted


def only_closed_gops(stream: Any, packets: list[Any]) -> bool:
    """Return True if a decoder may start at any key frame and gives all that follows, in coding order, intact."""
    latest = packets[0].pts
    for packet in packets:
        if packet.is_keyframe:
            if packet.pts < latest or (stream.codec_context.name == "h264" and not _is_idr(stream, packet)):
                return False
            latest = packet.pts
        elif packet.pts < latest:
            return False
    return packets[0].is_keyframe


def _is_idr(stream: Any, packet: Any) -> bool:
    """Return True if an H.264 key packet holds an IDR picture, not merely a point to recover from."""
    extra, data = stream.codec_context.extradata, memoryview(packet)
    if not extra or extra[0] != 1:  # not length-prefixed: nothing this reader knows
        return False
    width, place = (extra[4] & 3) + 1, 0
    while place + width < len(data):
        size = int.from_bytes(data[place : place + width], "big")
        if data[place + width] & 31 == 5:
            return True
        place += width + size
    return False
