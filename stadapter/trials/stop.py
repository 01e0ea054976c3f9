"""The gentle end of a sweep, whose trials write a checkpoint first, and the detection of trials that hang.

The first Ctrl-C, SIGTERM or SIGUSR1 creates a file that every trial looks for on the file system of --output. The
second ends everything at once. A trial of several processes touches a file while it makes progress.
"""

from __future__ import annotations

import contextlib
import functools
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

    Signals within `one_request_s` of the first count as the same request. Outside the main thread Python can take no
    signals, and this context does nothing.
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
        """Take the signals. Call it again after a library has taken them."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def asked(self) -> bool:
        """Return True if a signal has asked for an end."""
        return self.asked_at is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            self.on_request()
        elif now - self.asked_at >= self.one_request_s:
            raise KeyboardInterrupt


def write(descriptor: int, text: str) -> None:
    """Print from a signal handler. print() is not safe there: it may be interrupted in the middle of itself.

    Errors are ignored: the terminal may be gone.
    """
    with contextlib.suppress(OSError):
        os.write(descriptor, text.encode())


_LOOK_EVERY_S = 0.2  # no more often: many nodes share the file system
_TOUCH_EVERY_S = 5.0


class GentleStop:
    """A context in which the first signal asks the trials to end, and the second raises KeyboardInterrupt.

    `say` is called in the signal handler with a line to show; by default the line goes to standard output.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] | None = None) -> None:
        self.say = say or functools.partial(write, 1)
        self.file = folder / f".stop-{socket.gethostname()}-{os.getpid()}"
        self._signals = StopSignals(self._leave_file)
        self.listen = self._signals.listen

    @property
    def asked(self) -> bool:
        """True once a signal has asked for an end."""
        return self._signals.asked()

    def __enter__(self) -> GentleStop:
        self.file.unlink(missing_ok=True)  # left by a killed process with the same number
        self._signals.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._signals.__exit__()
        with contextlib.suppress(
            OSError
        ):  # a disk that became read-only; the results that it cost are reported elsewhere
            self.file.unlink(missing_ok=True)

    def _leave_file(self) -> None:
        self.say("\nstopping: every trial that runs writes a checkpoint first; once more to stop at once\n")
        try:
            self.file.touch()
        except OSError as error:
            self.say(f"{self.file}: cannot be written ({error.strerror}); stopping at once\n")
            raise KeyboardInterrupt from None


def watch(file: Path) -> Callable[[], bool]:
    """Return a function that says if the file exists. It may be called often: the disk is asked every 0.2 s."""
    asked, next_look = False, 0.0

    def look() -> bool:
        nonlocal asked, next_look
        now = time.monotonic()
        if not asked and now >= next_look:
            asked, next_look = file.exists(), now + _LOOK_EVERY_S
        return asked

    return look


def moving(look: Callable[[], bool], file: Path) -> Callable[[], bool]:
    """Return `look` with a heartbeat: calling it touches the file, at most every 5 s."""
    next_touch = 0.0

    def look_and_touch() -> bool:
        nonlocal next_touch
        now = time.monotonic()
        if now >= next_touch:
            next_touch = now + _TOUCH_EVERY_S
            with contextlib.suppress(OSError):  # a full disk; the results that it costs are reported elsewhere
                file.touch()
        return look()

    return look_and_touch


class Standstill:
    """A clock that runs while nobody touches the file. It reads this machine's time alone, not the file system's."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.touched = self._touched()
        self.since: float | None = None  # nothing counts before the first touch that is seen

    def seconds(self) -> float:
        """Return the seconds since the last touch that was seen here; 0 before the first."""
        if (touched := self._touched()) != self.touched:
            self.touched, self.since = touched, time.monotonic()
        return 0.0 if self.since is None else time.monotonic() - self.since

    def _touched(self) -> int | None:
        try:
            return self.file.stat().st_mtime_ns
        except OSError:  # not there yet, or a file system that is away for a moment
            return None
