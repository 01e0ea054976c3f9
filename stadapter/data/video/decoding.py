"""Frames of a video file, exactly the ones asked for.

A frame's index is its place in presentation order, whatever the container, the frame rate or the order of coding.
Every back end returns the same frames: `pyav` reads any file; `decord` and `torchcodec` read the files on which they
are known to be exact, and leave the others to `pyav` (see `exact_backends`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np

from stadapter.config import ConfigError
from stadapter.data.video import exact_backends
from stadapter.data.video.packets import (
    ClipError,
    Indices,
    Packets,
    PathLike,
    open_video,
    read_packets,
    resolve_indices,
)

__all__ = ["Backend", "ClipError", "check_backend", "count_frames", "decode", "frame_size", "reduced_size"]

Backend = Literal["auto", "pyav", "decord", "torchcodec"]


def check_backend(backend: str) -> None:
    """Raise ConfigError if a back end is unknown, not installed or does not start on this machine."""
    if backend not in get_args(Backend):
        raise ConfigError(f"--decoder {backend}: must be one of {', '.join(get_args(Backend))}")
    if backend in exact_backends.LIBRARIES:
        _load(backend)


def _load(library: str) -> Any:
    """Return the module of a library. Raises ConfigError, which says how to get it, if it does not load."""
    try:
        return importlib.import_module(exact_backends.LIBRARIES[library])
    except ImportError:
        raise ConfigError(
            f"--decoder {library}: it is not installed; pip install {library}, or use --decoder auto"
        ) from None
    except (RuntimeError, OSError):
        raise ConfigError(
            f"--decoder {library}: it does not start; it needs FFmpeg's libraries (apt-get install ffmpeg) and "
            "a release made for the installed torch; or use --decoder auto"
        ) from None


def decode(path: PathLike, indices: Indices, *, backend: Backend = "auto", short_side: int | None = None) -> np.ndarray:
    """Return the frames at `indices` (any order, repeats allowed) as uint8 RGB [T, H, W, 3], upright.

    `indices` may be a function from the number of frames to indices, so that sampling needs no second look at the
    file. `auto` is `pyav`, the fastest reader measured (benchmarks/README.md) and exact on every file. With
    `short_side`, larger frames are reduced to it while they are converted to RGB (bicubic with antialiasing, by
    FFmpeg's scaler, whatever the back end: no other scales alike). Raises ClipError for a frame that cannot be decoded
    without damage: a concealed picture is never returned.
    """
    if callable(indices):
        # A request that draws random numbers is made once, whichever readers it takes to answer it.
        indices = functools.cache(indices)
    if backend in exact_backends.LIBRARIES and short_side is None:
        frames = exact_backends.decode_where_exact(path, indices, backend, _load(backend))
        if frames is not None:
            return frames
    return _decode_pyav(path, indices, short_side)


def count_frames(path: PathLike) -> int:
    """Return the number of frames of a clip, by reading packets where that is exact, else by decoding."""
    with open_video(path) as (container, stream):
        found = read_packets(path, container, stream)
        return len(found.shown) if found is not None else sum(1 for _ in _play(container, stream))


def frame_size(path: PathLike) -> tuple[int, int]:
    """Return (height, width) as coded, from the file's header: a turned video is shown with the two swapped."""
    with open_video(path) as (_, stream):
        return stream.codec_context.height, stream.codec_context.width


def reduced_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """Return (height, width) with the shorter one at most `short_side`; never enlarged."""
    if short_side is None or min(height, width) <= short_side:
        return height, width
    if height < width:
        return short_side, round(width * short_side / height)
    return round(height * short_side / width), short_side


def _decode_pyav(path: PathLike, indices: Indices, short_side: int | None) -> np.ndarray:
    from av.error import InvalidDataError

    with open_video(path) as (container, stream):
        found = read_packets(path, container, stream)
        if found is not None:
            wanted = resolve_indices(path, indices, len(found.shown))
            try:
                pictures = _decode_packets(stream, found, {found.shown[i] for i in wanted}, short_side)
            except InvalidDataError:
                pictures = None
            if pictures is not None:
                return _stack([pictures[found.shown[i]] for i in wanted], path)
    return _decode_from_the_start(path, indices, found, short_side)


def _decode_from_the_start(
    path: PathLike, indices: Indices, found: Packets | None, short_side: int | None
) -> np.ndarray:
    """Decode from the first frame on: also where starting at key frames did not give every frame."""
    with open_video(path) as (container, stream):
        total = len(found.shown) if found is not None else sum(1 for _ in _play(container, stream))
        wanted = resolve_indices(path, indices, total)
    with open_video(path) as (container, stream):
        needed = set(wanted)
        place_of = {time: place for place, time in enumerate(found.shown)} if found is not None else None
        kept: dict[int, np.ndarray] = {}
        for number, frame in enumerate(_play(container, stream)):
            place = number if place_of is None else place_of.get(frame.pts)
            if place in needed:
                kept[place] = _to_rgb(frame, short_side)
                if len(kept) == len(needed):
                    break
    missing = sorted(needed - set(kept))
    if missing:
        raise ClipError(f"{path}: frame {missing[0]} of {total} cannot be decoded")
    return _stack([kept[i] for i in wanted], path)


def _decode_packets(
    stream: Any, found: Packets, wanted: set[int], short_side: int | None
) -> dict[int, np.ndarray] | None:
    """Return {time stamp: uint8 [H, W, 3]}, decoding as few packets as the codec allows; None if a frame is missing."""
    from av.error import InvalidDataError

    context = stream.codec_context
    # H.264 marks pictures that no other refers to; skipping one leaves all others as they are. (HEVC marks them per
    # temporal layer only, and other codecs not at all.) Per packet this works because one thread decodes in step.
    can_skip = context.name == "h264"
    pictures: dict[int, np.ndarray] = {}
    fed, start_time = -1, 0
    for start, end in _runs(found, wanted):
        if start > fed:
            if fed >= 0:
                _keep(context.decode(None), wanted, pictures, short_side)
                context.flush_buffers()
            fed, start_time = start - 1, found.packets[start].pts
        for packet in found.packets[fed + 1 : end + 1]:
            if can_skip:
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            try:
                _keep(context.decode(packet), wanted, pictures, short_side)
            except InvalidDataError:
                # A picture shown before the key frame refers to packets that were skipped; it is not wanted.
                if packet.pts >= start_time:
                    raise
        fed = max(fed, end)
    _keep(context.decode(None), wanted, pictures, short_side)
    return pictures if wanted <= pictures.keys() else None


def _runs(found: Packets, wanted: set[int]) -> list[tuple[int, int]]:
    """Return the (first, last) packets to feed for the wanted time stamps, each run starting at a key frame.

    A key frame at time k is a safe start for a picture at time p coded after it when k <= p: pictures shown before
    an open-GOP key frame may refer to what came before it, pictures shown after it may not.
    """
    runs: dict[int, int] = {}
    keys: list[int] = []
    for place, packet in enumerate(found.packets):
        if packet.is_keyframe:
            keys.append(place)
        if packet.pts in wanted:
            start = next((k for k in reversed(keys) if found.packets[k].pts <= packet.pts), 0)
            runs[start] = place
    return sorted(runs.items())


def _keep(frames: list[Any], wanted: set[int], pictures: dict[int, np.ndarray], short_side: int | None) -> None:
    for frame in frames:
        if frame.pts in wanted and not frame.is_corrupt:
            pictures[frame.pts] = _to_rgb(frame, short_side)


def _play(container: Any, stream: Any) -> Iterator[Any]:
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise ClipError(f"{container.name}: is damaged at {frame.time} s")
        yield frame


def _to_rgb(frame: Any, short_side: int | None) -> np.ndarray:
    """Return uint8 [H, W, 3], turned upright by the file's display matrix (quarter turns; players show the same)."""
    height, width = reduced_size(frame.height, frame.width, short_side)
    if (height, width) != (frame.height, frame.width):
        frame = frame.reformat(width, height, "rgb24", interpolation="BICUBIC", threads=1)
    pixels = frame.to_ndarray(format="rgb24", threads=1)
    turns = round(frame.rotation / 90) % 4
    return np.rot90(pixels, turns) if turns else pixels


def _stack(frames: list[np.ndarray], path: PathLike) -> np.ndarray:
    if not frames:
        return np.zeros((0, 0, 0, 3), np.uint8)
    if any(frame.shape != frames[0].shape for frame in frames):
        raise ClipError(f"{path}: its frames change size within the clip")
    return np.stack(frames)
