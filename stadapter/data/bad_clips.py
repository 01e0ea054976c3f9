"""Clips that could not be read: which, why, and when there are too many to go on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from stadapter.config import last_line
from stadapter.data.video.packets import ClipError
from stadapter.trials.record import Unreadable

_NAMED = 10  # in a record


@dataclass(frozen=True)
class BadClip:
    """A clip that could not be read, by its index in the list."""

    index: int
    reason: str  # one line, "path: why"

    @classmethod
    def of(cls, index: int, error: ClipError) -> BadClip:
        """Return the clip with the error's message on one line."""
        return cls(index, " ".join(str(error).split()))


class BadClipsError(RuntimeError):
    """More clips than allowed cannot be read. The message is one line: how many, the first one, and what to do."""


class BadClips:
    """The unreadable clips of a list; `reasons` maps their indices to "path: why"."""

    def __init__(self, split: str, num_clips: int, max_share: float, reasons: dict[int, str] | None = None) -> None:
        self.split, self.num_clips, self.max_share = split, num_clips, max_share
        self.reasons = dict(reasons or {})

    def watch(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the batches unchanged, noting their bad clips. Raises BadClipsError as soon as there are too many."""
        try:
            for batch in batches:
                self.note(batch)
                yield batch
        except ClipError as error:  # from a loader worker, the traceback comes before the last line
            raise BadClipsError(last_line(error)) from None

    def note(self, batch: dict[str, Any]) -> None:
        self.reasons.update({bad.index: bad.reason for bad in batch["bad_clips"]})
        self.check()

    def gather(self) -> None:
        """Let every process know the bad clips of all processes."""
        everywhere: list[dict[int, str]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, self.reasons)
        self.reasons = {index: reason for reasons in everywhere for index, reason in reasons.items()}
        self.check()

    def check(self) -> None:
        if len(self.reasons) > self.max_share * self.num_clips:
            raise BadClipsError(
                f"{len(self.reasons)} of {self.num_clips} {self.split} clips cannot be read, more than --max-bad-share "
                f"{self.max_share:g}; the first: {self.first()[0]}; `stadapter check` lists all"
            )

    def first(self) -> list[str]:
        """Return "path: why" of the first few in the order of the list."""
        return [self.reasons[index] for index in sorted(self.reasons)[:_NAMED]]

    def summary(self) -> Unreadable:
        """Return the number and the first few, as a record holds them."""
        return Unreadable(len(self.reasons), tuple(self.first()))
