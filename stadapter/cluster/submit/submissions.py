"""Submitting a job, and the record of it that finds it again: RECORDS/<job id>.json."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stadapter.cluster.submit.backend import Backend, Handle
from stadapter.cluster.submit.job import Job
from stadapter.cluster.submit.kubernetes import Kubernetes, KubernetesHandle
from stadapter.cluster.submit.ray_jobs import RayJobs, RayJobsHandle
from stadapter.cluster.submit.slurm import Slurm, SlurmHandle
from stadapter.config import ConfigError
from stadapter.trials import files
from stadapter.trials.sweep import DEFAULT_OUTPUT

DEFAULT_RECORDS = DEFAULT_OUTPUT / "submissions"
HANDLES: dict[str, Callable[..., Handle]] = {  # made of the "facts" of a record, by its "backend"
    Slurm.name: SlurmHandle,
    RayJobs.name: RayJobsHandle,
    Kubernetes.name: KubernetesHandle,
}


@dataclass(frozen=True)
class Submission:
    """A job that was submitted, when, and the handle that finds it on its cluster."""

    job: Job
    submitted: str  # local time, ISO 8601
    backend: str  # a key of HANDLES
    handle: Handle

    def to_json(self) -> dict[str, Any]:
        facts = dict(vars(self.handle))
        return asdict(self.job) | {"submitted": self.submitted, "backend": self.backend, "facts": facts}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Submission:
        handle = HANDLES[fields["backend"]](**fields["facts"])
        return cls(Job.from_json(fields), fields["submitted"], fields["backend"], handle)


def submit(job: Job, backend: Backend, records: Path = DEFAULT_RECORDS) -> Submission:
    """Submit the job and write its record into the folder `records`. Raises ConfigError if it is refused."""
    handle = backend.submit(job, records)
    submission = Submission(job, time.strftime("%Y-%m-%dT%H:%M:%S%z"), backend.name, handle)
    try:
        records.mkdir(parents=True, exist_ok=True)
        files.write_atomically(records / f"{job.id}.json", json.dumps(submission.to_json(), indent=2).encode())
    except OSError as error:
        facts = vars(handle)
        raise ConfigError(
            f"--records {records}: cannot be written ({error.strerror}), though the job was submitted: {facts}"
        ) from None
    return submission


def load(id: str, records: Path = DEFAULT_RECORDS) -> Submission:
    """Return the submission of a job. Raises ConfigError if there is no record of it."""
    path = records / f"{id}.json"
    if Path(id).name != id or not path.is_file():
        raise ConfigError(f"{id}: nothing of this name was submitted; {records} holds the records, see --records")
    return Submission.from_json(json.loads(path.read_text()))


def load_all(records: Path = DEFAULT_RECORDS) -> list[Submission]:
    """Return every submission, the oldest first."""
    found = (Submission.from_json(json.loads(path.read_text())) for path in records.glob("*.json"))
    return sorted(found, key=lambda each: each.submitted)
