"""The readers decord and torchcodec, each used only on files on which it gives every frame as coded.

Neither says so when it returns a wrong frame, so the packets are looked at first. decord was seen to return wrong
frames after open-GOP key frames and in transport streams, to mix up height and width of turned videos, and to lack
AV1's decoders. torchcodec was seen to fail on open GOPs and to shift the frames of AVI files without time stamps.
Both convert the colours of interlaced pictures otherwise than FFmpeg's scaler does.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from stadapter.config import last_line
from stadapter.data.video.packets import (
    ClipError,
    Indices,
    PathLike,
    only_closed_gops,
    open_video,
    read_packets,
    resolve_indices,
)

LIBRARIES = {"decord": "decord", "torchcodec": "torchcodec.decoders"}
_CODECS = {"h264", "hevc", "vp9"}


def decode_where_exact(path: PathLike, indices: Indices, library: str, module: Any) -> np.ndarray | None:
    """Return frames as `decoding.decode` does, or None for a file on which the library cannot be trusted."""
    with open_video(path) as (container, stream):
        found = read_packets(path, container, stream)
        context = stream.codec_context
        if found is None or context.name not in _CODECS or not only_closed_gops(stream, found.packets):
            return None
        wanted = resolve_indices(path, indices, len(found.shown))
        first = [*context.decode(found.packets[0]), *context.decode(None)]
        if not first or first[0].rotation or first[0].interlaced_frame:
            return None
    if not wanted:
        return np.zeros((0, 0, 0, 3), np.uint8)
    read = _read_decord if library == "decord" else _read_torchcodec
    try:
        return read(module, os.fspath(path), wanted, len(found.shown))
    except (RuntimeError, getattr(module, "DECORDError", RuntimeError)) as error:
        raise ClipError(f"{os.fspath(path)}: {library} cannot decode it ({last_line(error)})") from None


def _read_decord(decord: Any, path: str, wanted: list[int], total: int) -> np.ndarray | None:
    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    return reader.get_batch(wanted).asnumpy() if len(reader) == total else None


def _read_torchcodec(decoders: Any, path: str, wanted: list[int], total: int) -> np.ndarray | None:
    reader = decoders.VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    return reader.get_frames_at(wanted).data.numpy() if len(reader) == total else None
