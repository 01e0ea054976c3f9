"""Ending a sweep gently: its trials write a checkpoint first. And noticing that one has come to a halt by itself.

The first Ctrl-C, SIGTERM or SIGUSR1 leaves a file that the trials look for, wherever on the file system of --output
they run. The second ends everything at once. A trial of several processes touches a file while it moves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """A context in which the first signal calls `on_request`, and a later one raises KeyboardInterrupt.

    Signals within `one_request_s` of the first are the same request. In a thread, where signals cannot be taken, it
    does nothing.
    """

    def __init__(self, on_request: Callable[[], None], one_request_s: float = 0.0) -> None:
        self.on_request, self.one_request_s = on_request, one_request_s
        self.asked_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Take the signals, again where a library has taken them since."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def asked(self) -> bool:
        return self.asked_at is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            self.on_request()
        elif now - self.asked_at >= self.one_request_s:
            raise KeyboardInterrupt


def write(descriptor: int, text: str) -> None:
    """Print from a signal handler: not by `print`, for one may be under way. A terminal that is gone is no matter."""
    with contextlib.suppress(OSError):
        os.write(descriptor, text.encode())


_LOOK_EVERY_S = 0.2  # of a file system that many nodes share, no more is asked
_TOUCH_EVERY_S = 5.0


class GentleStop:
    """A context in which the first signal asks for an end, and the second raises KeyboardInterrupt."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / f".stop-{socket.gethostname()}-{os.getpid()}"
        self._signals = StopSignals(self._leave_file)
        self.listen = self._signals.listen

    @property
    def asked(self) -> bool:
        return self._signals.asked()

    def __enter__(self) -> GentleStop:
        self.file.unlink(missing_ok=True)  # of a process that had the same number and was killed
        self._signals.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._signals.__exit__()
        with contextlib.suppress(OSError):  # a disk that became read-only: what else it broke is told, not this
            self.file.unlink(missing_ok=True)

    def _leave_file(self) -> None:
        write(1, "\nstopping: every trial that runs writes a checkpoint first; once more to stop at once\n")
        try:
            self.file.touch()
        except OSError as error:
            write(1, f"{self.file}: cannot be written ({error.strerror}); stopping at once\n")
            raise KeyboardInterrupt from None


def watch(file: Path) -> Callable[[], bool]:
    """Whether the file is there, for a loop that asks often."""
    asked, next_look = False, 0.0

    def look() -> bool:
        nonlocal asked, next_look
        now = time.monotonic()
        if not asked and now >= next_look:
            asked, next_look = file.exists(), now + _LOOK_EVERY_S
        return asked

    return look


def moving(look: Callable[[], bool], file: Path) -> Callable[[], bool]:
    """`look`; whoever asks it often enough has the file touched every few seconds."""
    next_touch = 0.0

    def look_and_touch() -> bool:
        nonlocal next_touch
        now = time.monotonic()
        if now >= next_touch:
            next_touch = now + _TOUCH_EVERY_S
            with contextlib.suppress(OSError):  # a full disk: what else it breaks is told, not this
                file.touch()
        return look()

    return look_and_touch


class Standstill:
    """Seconds for which the file has not been touched, by this machine's clock alone; 0 until it is there."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.touched = self._touched()
        self.since: float | None = None  # nothing counts before the first touch that is seen

    def seconds(self) -> float:
        if (touched := self._touched()) != self.touched:
            self.touched, self.since = touched, time.monotonic()
        return 0.0 if self.since is None else time.monotonic() - self.since

    def _touched(self) -> int | None:
        try:
            return self.file.stat().st_mtime_ns
        except OSError:  # not there yet, or a file system that is away for a moment
            return None
