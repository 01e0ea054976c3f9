"""Frames of a video file, exactly the ones asked for.

A frame's index is its place in presentation order, whatever the container, the frame rate or the order of coding.
Two back ends return the same frames: `pyav` (every file) and `decord` (files on which it is known to be exact; it
silently returns wrong frames after open-GOP key frames and in transport streams, so such files go through `pyav`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Backend = Literal["auto", "pyav", "decord"]
Indices = Sequence[int] | Callable[[int], Sequence[int]]
PathLike = str | os.PathLike[str]

# Where one packet holds exactly one shown frame, packets can be counted and skipped instead of decoded. Elsewhere
# (hidden VP8 frames, AVI without time stamps, field pairs and cut streams in .ts) the whole file is decoded.
_INDEXED_CODECS = {"h264", "hevc", "vp9", "av1"}
_INDEXED_CONTAINERS = {"mp4", "mov", "matroska", "webm"}
_DECORD_CODECS = {"h264", "hevc", "vp9"}  # its FFmpeg is older than AV1's decoders


class ClipError(RuntimeError):
    """A clip that cannot be read. The message names the file and says what is wrong with it."""


@dataclass(frozen=True)
class _Packets:
    """The compressed pictures of a file, in coding order."""

    packets: list[Any]
    shown: list[int]  # time stamps of the shown pictures, sorted: index -> time stamp


def decode(path: PathLike, indices: Indices, *, backend: Backend = "auto") -> np.ndarray:
    """The frames at `indices` (any order, repeats allowed) as uint8 RGB [T, H, W, 3], upright.

    `indices` may be a function from the number of frames to indices, so that sampling needs no second look at the
    file. `auto` is `pyav`, the reader that is exact on every file. A frame that cannot be decoded without damage is
    a ClipError, never a concealed picture.
    """
    if backend not in ("auto", "pyav", "decord"):
        raise ValueError(f"backend = {backend}: must be one of auto, pyav, decord")
    if backend == "decord":
        frames = _decode_decord(path, indices)
        if frames is not None:
            return frames
    return _decode_pyav(path, indices)


def count_frames(path: PathLike) -> int:
    """The number of frames that can be asked for: by reading packets where that is exact, by decoding elsewhere."""
    with _open(path) as (container, stream):
        found = _read_packets(path, container, stream)
        return len(found.shown) if found is not None else sum(1 for _ in _play(container, stream))


@contextlib.contextmanager
def _open(path: PathLike) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; every failure inside becomes a ClipError that names the file."""
    import av

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


def _read_packets(path: PathLike, container: Any, stream: Any) -> _Packets | None:
    """All packets of the stream, or None where packets are not frames one to one. Truncation is a ClipError."""
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
    return _Packets(packets, shown)


def _matroska_end(path: PathLike) -> int:
    """Where a Matroska or WebM file should end by its header; 0 where that was not written."""
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


def _resolve(path: PathLike, indices: Indices, total: int) -> list[int]:
    wanted = [int(i) for i in (indices(total) if callable(indices) else indices)]
    if total == 0:
        raise ClipError(f"{os.fspath(path)}: has no frames")
    for index in wanted:
        if not 0 <= index < total:
            raise ClipError(f"{os.fspath(path)}: frame {index} was asked for, but the clip has {total}")
    return wanted


def _decode_pyav(path: PathLike, indices: Indices) -> np.ndarray:
    from av.error import InvalidDataError

    with _open(path) as (container, stream):
        found = _read_packets(path, container, stream)
        if found is not None:
            wanted = _resolve(path, indices, len(found.shown))
            try:
                pictures = _decode_packets(stream, found, {found.shown[i] for i in wanted})
            except InvalidDataError:
                pictures = None
            if pictures is not None:
                return _stack([pictures[found.shown[i]] for i in wanted], path)
    # From the first frame to the last: also the judge where starting at a key frame did not give every frame.
    with _open(path) as (container, stream):
        total = len(found.shown) if found is not None else sum(1 for _ in _play(container, stream))
        wanted = _resolve(path, indices, total)
    with _open(path) as (container, stream):
        needed = set(wanted)
        place_of = {time: place for place, time in enumerate(found.shown)} if found is not None else None
        kept: dict[int, np.ndarray] = {}
        for number, frame in enumerate(_play(container, stream)):
            place = number if place_of is None else place_of.get(frame.pts)
            if place in needed:
                kept[place] = _to_rgb(frame)
                if len(kept) == len(needed):
                    break
    missing = sorted(needed - set(kept))
    if missing:
        raise ClipError(f"{os.fspath(path)}: frame {missing[0]} of {total} cannot be decoded")
    return _stack([kept[i] for i in wanted], path)


def _decode_packets(stream: Any, found: _Packets, wanted: set[int]) -> dict[int, np.ndarray] | None:
    """{time stamp: uint8 [H, W, 3]} by decoding as few packets as the codec allows; None if a frame did not come out.

    A key frame at time k is a safe start for a picture at time p coded after it when k <= p: pictures shown before
    an open-GOP key frame may refer to what came before it, pictures shown after it may not.
    """
    from av.error import InvalidDataError

    context = stream.codec_context
    # H.264 marks pictures that no other refers to; skipping one leaves all others as they are. (HEVC marks them per
    # temporal layer only, and other codecs not at all.) Per packet this works because one thread decodes in step.
    can_skip = context.name == "h264"
    runs: dict[int, int] = {}  # place of the key frame -> place of the last packet to feed
    keys: list[int] = []
    for place, packet in enumerate(found.packets):
        if packet.is_keyframe:
            keys.append(place)
        if packet.pts in wanted:
            start = next((k for k in reversed(keys) if found.packets[k].pts <= packet.pts), 0)
            runs[start] = place
    pictures: dict[int, np.ndarray] = {}
    fed, start_time = -1, 0
    for start, end in sorted(runs.items()):
        if start > fed:
            if fed >= 0:
                _keep(context.decode(None), wanted, pictures)
                context.flush_buffers()
            fed, start_time = start - 1, found.packets[start].pts
        for packet in found.packets[fed + 1 : end + 1]:
            if can_skip:
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            try:
                _keep(context.decode(packet), wanted, pictures)
            except InvalidDataError:
                # Pictures shown before the key frame refer to what was not decoded here; nobody wants them.
                if packet.pts >= start_time:
                    raise
        fed = max(fed, end)
    _keep(context.decode(None), wanted, pictures)
    return pictures if wanted <= pictures.keys() else None


def _keep(frames: list[Any], wanted: set[int], pictures: dict[int, np.ndarray]) -> None:
    for frame in frames:
        if frame.pts in wanted and not frame.is_corrupt:
            pictures[frame.pts] = _to_rgb(frame)


def _play(container: Any, stream: Any) -> Iterator[Any]:
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise ClipError(f"{container.name}: is damaged at {frame.time} s")
        yield frame


def _to_rgb(frame: Any) -> np.ndarray:
    """uint8 [H, W, 3], turned upright by the file's display matrix (quarter turns; players show the same)."""
    pixels = frame.to_ndarray(format="rgb24", threads=1)
    turns = round(frame.rotation / 90) % 4
    return np.rot90(pixels, turns) if turns else pixels


def _stack(frames: list[np.ndarray], path: PathLike) -> np.ndarray:
    if not frames:
        return np.zeros((0, 0, 0, 3), np.uint8)
    if any(frame.shape != frames[0].shape for frame in frames):
        raise ClipError(f"{os.fspath(path)}: its frames change size within the clip")
    return np.stack(frames)


def _decode_decord(path: PathLike, indices: Indices) -> np.ndarray | None:
    """As `decode`, or None for a file on which decord cannot be trusted."""
    try:
        import decord
    except ImportError:
        raise RuntimeError("the decord back end needs the package: pip install decord, or use backend='pyav'") from None
    with _open(path) as (container, stream):
        found = _read_packets(path, container, stream)
        if (
            stream.codec_context.name not in _DECORD_CODECS
            or found is None
            or not _only_closed_gops(stream, found.packets)
        ):
            return None
        wanted = _resolve(path, indices, len(found.shown))
        context = stream.codec_context
        first = [*context.decode(found.packets[0]), *context.decode(None)]
        # decord mixes up height and width of turned videos, and the chroma of interlaced ones.
        if not first or first[0].rotation or first[0].interlaced_frame:
            return None
    try:
        reader = decord.VideoReader(os.fspath(path), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != len(found.shown):
            return None
        return reader.get_batch(wanted).asnumpy()
    except (decord.DECORDError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ClipError(f"{os.fspath(path)}: decord cannot decode it ({reason})") from None


def _only_closed_gops(stream: Any, packets: list[Any]) -> bool:
    """Whether decoding can start at every key frame and give all that follows, in coding order, intact."""
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
    """Whether an H.264 key packet holds an IDR picture, not merely a point to recover from."""
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
