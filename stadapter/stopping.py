"""Ending gently: the first Ctrl-C, SIGTERM or SIGUSR1 (Slurm's warning) asks for it, the second ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
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
