"""Reading the frames of a clip: from a remote file, a segment of a long video, a cache, within a time limit.

A read that takes too long is given up: the clip counts as unreadable, and its thread is left behind. (It disturbs
nothing, because every decoder here works without Python's lock.) A clip given up twice in a process is not tried there
again. decord, which is known to crash and to hang, works in a separate process.
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
    """How frames are read. No option changes a frame.

    `in_memory` keeps every frame of tiny clips (64 frames, 1 MiB) in this process, up to 512 MiB, for all its data
    sets: a process that runs trial after trial decodes once. Loader workers gain nothing between trials, since they
    end with their loader.
    """

    decoder: Backend = "auto"
    time_limit_s: float = DEFAULT_TIME_LIMIT_S  # for one clip
    in_memory: bool = False
    local_copies: LocalCopies | None = None  # of clips at addresses; None: the default one
    cache: ClipCache | None = None  # this node's; None: every frame is decoded


def read_frames(path: str, indices: Sampling, reading: Reading, short_side: int | None = None) -> np.ndarray:
    """Return the frames of a clip, uint8 [T, H, W, 3]. Raises ClipError if it cannot be read in time.

    `indices` count within the clip's segment, if it has one; `short_side` is `decode`'s.
    """
    if _given_up.get(path, 0) >= _GIVE_UPS:
        raise ClipError(f"{path}: was given up before: reading it took longer than {reading.time_limit_s:g} s")
    file, frames = split_segment(path)
    if frames is not None:
        indices = _within_segment(path, *frames, indices)
    outcome = _within_time(lambda: _read(file, indices, reading, short_side), reading.time_limit_s)
    if outcome is None:
        stop()
        _given_up[path] = _given_up.get(path, 0) + 1
        raise ClipError(f"{path}: was given up: reading it took longer than {reading.time_limit_s:g} s")
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _within_time(read: Callable[[], np.ndarray], limit_s: float) -> np.ndarray | BaseException | None:
    """Return what `read` returned or raised in a thread, or None if it is still at work after `limit_s`."""
    finished: list[np.ndarray | BaseException] = []

    def run() -> None:
        try:
            finished.append(read())
        except BaseException as error:
            finished.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    waited_s = 0.0
    while thread.is_alive() and waited_s < limit_s:
        # In short steps, each counted with the length it should have: time in which this process was stopped or starved
        # is not held against the clip.
        step_s = min(1.0, limit_s - waited_s)
        thread.join(step_s)
        waited_s += step_s
    return finished[0] if finished else None


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


def _within_segment(path: str, first: int, end: int, indices: Sampling) -> Sampling:
    """Return indices into a segment as indices into its video, which may end before the segment should."""

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
        return decode_here(file, indices)  # raises the error that names the cause
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
