"""Ending gently: the first Ctrl-C, SIGTERM or SIGUSR1 (Slurm's warning) asks for it, the second ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ONE_REQUEST_S = 2.0  # a terminal and torchrun both pass on one Ctrl-C: within this time that is one request


class StopSignals:
    """A context in which signals are requests: `asked` says whether there was one; a later one raises
    KeyboardInterrupt. `announcement` is printed to standard error with the first."""

    def __init__(self, announcement: str) -> None:
        self.announcement = announcement
        self.asked_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        return self.asked_at is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            with contextlib.suppress(OSError):  # a terminal that is gone; not print, for one may be under way
                os.write(2, f"\n{self.announcement}\n".encode())
        elif now - self.asked_at > ONE_REQUEST_S:
            raise KeyboardInterrupt
