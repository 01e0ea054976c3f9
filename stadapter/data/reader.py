"""Frames of a clip that may lie far away, or inside a long video, or in a file that no decoder ever returns from.

A read that takes too long is given up: it goes on in a thread of its own, which nobody waits for, and the clip counts
as unreadable. (A thread can be left alone because every decoder here works without Python's lock.) A clip given up
twice in a process is not tried there again. decord, which is known to crash and to hang, works in a process apart.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stadapter.data.cache.frames import ClipCache, Decode
from stadapter.data.lists import storage
from stadapter.data.lists.clip_list import split_segment
from stadapter.data.lists.storage import LocalCopies
from stadapter.data.video.decoder_process import decode_apart, stop
from stadapter.data.video.decoding import Backend, ClipError, decode
from stadapter.data.video.packets import Indices, PathLike

DEFAULT_TIME_LIMIT_S = 60.0


Sampling = Callable[[int], Sequence[int]]  # number of frames -> indices

_GIVE_UPS = 2

# Whole decoded clips, for `in_memory`: (file, size, time of change, settings) -> uint8 [all frames, H, W, 3].
_MEMORY: dict[tuple[str, int, int, str], np.ndarray] = {}
_MEMORY_CLIP_FRAMES, _MEMORY_CLIP_BYTES, _MEMORY_BYTES = 64, 2**20, 2**29

_given_up: dict[str, int] = {}  # path -> times


@dataclass(frozen=True)
class Reading:
    """How frames are read: nothing here changes one.

    `in_memory` keeps every frame of tiny clips (64 frames, 1 MiB) in this process, up to 512 MiB, for all data sets
    made in it: a process that runs trial after trial decodes once. Loader workers end with their loader and gain
    nothing from it between trials.
    """

    decoder: Backend = "auto"
    time_limit_s: float = DEFAULT_TIME_LIMIT_S  # for one clip
    in_memory: bool = False
    local_copies: LocalCopies | None = None  # of clips at addresses; None: the default one
    cache: ClipCache | None = None  # this node's; None: every frame is decoded


def read_frames(path: str, indices: Sampling, reading: Reading, short_side: int | None = None) -> np.ndarray:
    """The frames of a clip, uint8 [T, H, W, 3]; `indices` count within its segment, if it is one. ClipError names it.

    `short_side` is `decode`'s.
    """
    if _given_up.get(path, 0) >= _GIVE_UPS:
        raise ClipError(f"{path}: was given up before: reading it took longer than {reading.time_limit_s:g} s")
    file, frames = split_segment(path)
    if frames is not None:
        indices = _within(path, *frames, indices)
    finished: list[np.ndarray | BaseException] = []

    def read() -> None:
        try:
            finished.append(_read(file, indices, reading, short_side))
        except BaseException as error:
            finished.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    waited_s = 0.0
    while thread.is_alive() and waited_s < reading.time_limit_s:
        # In short steps, each counted as what was asked for: time in which this process was stopped or starved by
        # others is not held against the clip.
        step_s = min(1.0, reading.time_limit_s - waited_s)
        thread.join(step_s)
        waited_s += step_s
    if not finished:
        stop()
        _given_up[path] = _given_up.get(path, 0) + 1
        raise ClipError(f"{path}: was given up: reading it took longer than {reading.time_limit_s:g} s")
    if isinstance(finished[0], BaseException):
        raise finished[0]
    return finished[0]


def _read(file: str, indices: Sampling, reading: Reading, short_side: int | None) -> np.ndarray:
    def decode_here(path: PathLike, wanted: Indices) -> np.ndarray:
        try:
            local = storage.local_copy(os.fspath(path), reading.local_copies or storage.default_local_copies())
        except OSError as error:
            raise ClipError(f"{file}: cannot be read ({error.strerror or error})") from None
        read = decode_apart if reading.decoder == "decord" else decode
        try:
            return read(local, wanted, backend=reading.decoder, short_side=short_side)
        except ClipError as error:
            raise ClipError(str(error).replace(local, file)) from None

    if reading.in_memory:
        return _through_memory(file, indices, f"{reading.decoder}/{short_side}", decode_here)
    return reading.cache.read(file, indices, decode_here) if reading.cache else decode_here(file, indices)


def _within(path: str, first: int, end: int, indices: Sampling) -> Sampling:
    """Indices into a segment as indices into its video, which may end before the segment should."""

    def shifted(total: int) -> list[int]:
        length = min(end, total) - first
        if length < 1:
            raise ClipError(f"{path}: the clip begins at frame {first}, but its video has {total}")
        return [first + index for index in indices(length)]

    return shifted


def _through_memory(file: str, indices: Sampling, settings: str, decode_here: Decode) -> np.ndarray:
    try:
        stat = os.stat(file)
    except OSError:
        return decode_here(file, indices)  # says what is wrong
    key = (file, stat.st_size, stat.st_mtime_ns, settings)
    if key in _MEMORY:
        return _MEMORY[key][indices(len(_MEMORY[key]))]
    total = 0

    def all_of_a_short_clip(num_total: int) -> Sequence[int]:
        nonlocal total
        total = num_total
        return list(range(num_total)) if num_total <= _MEMORY_CLIP_FRAMES else indices(num_total)

    frames = decode_here(file, all_of_a_short_clip)
    if total > _MEMORY_CLIP_FRAMES:
        return frames
    if frames.nbytes <= min(_MEMORY_CLIP_BYTES, _MEMORY_BYTES - sum(kept.nbytes for kept in _MEMORY.values())):
        _MEMORY[key] = frames
    return frames[indices(total)]
