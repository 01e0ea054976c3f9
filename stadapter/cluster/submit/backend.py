"""The two protocols of a cluster that jobs are submitted to. A back end has their methods; nothing is inherited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from stadapter.cluster.submit.job import Job


class Backend(Protocol):
    """A kind of cluster with its options: a frozen dataclass, such as `Slurm(nodes=2, gpus_per_node=8)`."""

    @property
    def name(self) -> str:
        """The word for it on the command line and in records."""

    @property
    def shared_paths(self) -> bool:
        """True if the cluster sees the files of this machine, so that relative paths have a meaning there."""

    def artefact(self, job: Job) -> str:
        """Return the text that carries the job: a script, a request or a manifest. Raises ConfigError if it cannot."""

    def submit(self, job: Job, records: Path) -> Handle:
        """Submit the job; a file that belongs to its record is written to `records`. Raises ConfigError if refused."""


class Handle(Protocol):
    """A submitted job: a frozen dataclass whose fields, all strings, are what finds the job again.

    Each method but `describe` raises ConfigError if the cluster cannot be asked.
    """

    def describe(self) -> str:
        """Return in a few words where the job was submitted to."""

    def status(self) -> str:
        """Return how the job is doing, in a few words."""

    def logs(self, follow: bool) -> Iterator[str]:
        """Yield the job's output so far; with `follow`, go on until the job ends."""

    def stop(self) -> str:
        """End the job, running trials with a checkpoint first, and return in a few words how."""
