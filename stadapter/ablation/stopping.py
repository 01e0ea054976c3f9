"""Ending a sweep gently: its trials write a checkpoint first.

The first Ctrl-C, SIGTERM or SIGUSR1 leaves a file that the trials look for, wherever on the file system of --output
they run. The second ends everything at once.
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
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_LOOK_EVERY_S = 0.2  # of a file system that many nodes share, no more is asked


class GentleStop:
    """A context in which the first signal asks for an end, and the second raises KeyboardInterrupt."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / f".stop-{socket.gethostname()}-{os.getpid()}"
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> GentleStop:
        self.file.unlink(missing_ok=True)  # of a process that had the same number and was killed
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in _SIGNALS}
            self.listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.file.unlink(missing_ok=True)

    def listen(self) -> None:
        """Take the signals, again where a library has taken them since."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        _write("\nstopping: every trial that runs writes a checkpoint first; once more to stop at once\n")
        try:
            self.file.touch()
        except OSError as error:
            _write(f"{self.file}: cannot be written ({error.strerror}); stopping at once\n")
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


def _write(text: str) -> None:
    # Not print: the signal may have come in the middle of one.
    with contextlib.suppress(OSError):
        os.write(1, text.encode())
