"""Which clips of a training or a test could not be read, and when that is too many to go on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist

from stadapter.data.video.packets import ClipError
from stadapter.trials.record import Unreadable

_NAMED = 10  # in a record


class BadClipsError(RuntimeError):
    """More clips than allowed cannot be read. One line: how many, the first one, and what to do."""


class BadClips:
    """The unreadable clips of a list, by their index in it, and why."""

    def __init__(self, split: str, num_clips: int, max_share: float, reasons: dict[int, str] | None = None) -> None:
        self.split, self.num_clips, self.max_share = split, num_clips, max_share
        self.reasons = dict(reasons or {})

    def watch(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches unchanged, their bad clips noted; BadClipsError as soon as there are too many."""
        try:
            for batch in batches:
                self.note(batch)
                yield batch
        except ClipError as error:  # a loader worker's comes with its traceback before the last line
            raise BadClipsError(str(error).splitlines()[-1]) from None

    def note(self, batch: dict[str, Any]) -> None:
        for line in filter(None, "\n".join(batch["reason"]).split("\n")):
            index, _, reason = line.partition("\t")
            self.reasons[int(index)] = reason
        self.check()

    def gather(self) -> None:
        """Afterwards every process knows the bad clips of all."""
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
        """ "path: why" of the first few in the order of the list."""
        return [self.reasons[index] for index in sorted(self.reasons)[:_NAMED]]

    def summary(self) -> Unreadable:
        """Return what a record holds of them."""
        return Unreadable(len(self.reasons), tuple(self.first()))
