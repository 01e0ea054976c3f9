"""Decoding in a separate process, for a library that crashes on some files: the clip is lost, the training goes on.

    parent                              child (python -m stadapter.data.video.decoder_child FD)
    path, backend, short_side    ->
                                 <-     ("total", number of frames)    where the request is a function of it
    indices                      ->
                                 <-     ("frames", uint8 [T, H, W, 3]) or ("error", message)

One child serves this process, from its first request until it crashes, is stopped, or this process ends. It costs a
copy of the frames through a socket.
"""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import Pipe
from typing import Any

import numpy as np

from stadapter.data.video.packets import ClipError, Indices, PathLike

_child: tuple[subprocess.Popen[bytes], Any] | None = None  # the process, and this end of the socket to it


def decode_apart(path: PathLike, indices: Indices, *, backend: str, short_side: int | None = None) -> np.ndarray:
    """Return frames as `decode` does. Raises ClipError after a crash, too."""
    connection = _start()
    try:
        connection.send((os.fspath(path), None if callable(indices) else list(indices), backend, short_side))
        kind, value = connection.recv()
        while kind == "total":
            assert callable(indices)
            try:
                wanted = list(indices(value))
            except Exception:  # the caller's choice of frames failed
                stop()  # the child waits for an answer
                raise
            connection.send(wanted)
            kind, value = connection.recv()
    except (EOFError, OSError):
        if _child is not None and _child[1] is connection:  # else another thread has stopped it, and started the next
            stop()
        raise ClipError(f"{os.fspath(path)}: {backend} crashed on it, or was stopped") from None
    if kind == "error":
        raise ClipError(value)
    return value


def stop() -> None:
    """End the child at once. A thread that waits for it gets a ClipError; the next request starts a new child."""
    global _child
    if _child is not None:
        (process, _), _child = _child, None
        process.kill()
        process.wait()


def _start() -> Any:
    global _child
    if _child is None:
        ours, theirs = Pipe()
        command = [sys.executable, "-m", "stadapter.data.video.decoder_child", str(theirs.fileno())]
        # The package may be where only this process looks for it, as on a Ray worker.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
        theirs.close()  # or its end would never be seen
        _child = process, ours
    return _child[1]
