"""Slurm: an sbatch script that starts Ray across the nodes of a job and runs the command there.

Before the time limit, and when the job is pre-empted with a signal, the running trials write a checkpoint and the job
goes back into the queue, where it continues. The Python environment, --output and --data-root must lie on a file system
that the nodes share.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stadapter.cluster.submit.job import COMMIT, Job, check_no_secret, check_printable, copy_code
from stadapter.config import ConfigError
from stadapter.trials import files

KEPT_ENV = ("HOME", "USER", "LOGNAME", "PATH", "LANG")
LOG, SCRIPT, CODE, ENDED = "log.txt", "job.sh", "code", "ended"  # in OUTPUT/submissions/<id>
_POLL_S = 1.0
_NOT_ENDED = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "REQUEUED", "REQUEUE_HOLD")


@dataclass(frozen=True)
class Slurm:
    """A Slurm cluster, and what a job takes of it."""

    name: ClassVar[str] = "slurm"
    shared_paths: ClassVar[bool] = True

    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int | None = None  # None: whole nodes, with all of their CPUs
    time: str | None = None  # the limit of one start, D-HH:MM:SS; None: the partition's
    partition: str | None = None
    account: str | None = None
    grace: int = 120  # seconds before the limit at which trials write their checkpoints
    setup: str | None = None  # shell commands that make `python` the right one; None: this interpreter, by its path

    def artefact(self, job: Job) -> str:
        """Return the sbatch script: slurm_job.sh with its places filled."""
        self._check()
        folder = _folder(job)
        needed = [f': "${{{name}:?is not in the job, though --secret-env names it}}"' for name in job.secret_env]
        exported = {"PYTHONUNBUFFERED": "1", COMMIT: str(job.code), **dict(job.env)}
        return _fill(
            {
                "HEADERS": "\n".join(self._headers(job, folder)),
                "FACTS": "\n".join(
                    f"# {name}: {check_printable(name, fact)}" for name, fact in job.described().items()
                ),
                "FOLDER": shlex.quote(str(folder)),
                "SETUP": self.setup or ":",
                "PYTHON": "python" if self.setup else shlex.quote(os.path.abspath(sys.executable)),
                "EXPORTS": "\n".join(f"export {name}={shlex.quote(value)}" for name, value in exported.items()),
                "SECRETS": "\n".join(needed),
                "COMMAND": shlex.join(job.words),
            }
        )

    def submit(self, job: Job, records: Path) -> SlurmHandle:
        """Write the job's folder, OUTPUT/submissions/<id>, and hand its script to sbatch."""
        script = self.artefact(job)
        for name in job.secret_env:
            if name not in os.environ:
                raise ConfigError(f"--secret-env {name}: is not set here, so the job would not have it")
        folder = _folder(job)
        try:
            folder.mkdir(parents=True)
            copy_code(job, folder / CODE)
            files.write_atomically(folder / SCRIPT, script.encode())
            files.write_atomically(folder / "packages.txt", "\n".join(job.packages.installed).encode())
        except OSError as error:
            raise ConfigError(f"--output {job.output}: cannot be written ({error.strerror})") from None
        number = _slurm("sbatch", "--parsable", str(folder / SCRIPT)).split(";")[0]
        return SlurmHandle(number, str(folder))

    def _check(self) -> None:
        least = {"nodes": (self.nodes, 1), "cpus-per-node": (self.cpus_per_node, 1), "grace": (self.grace, 1)}
        least["gpus-per-node"] = self.gpus_per_node, 0
        for flag, (value, smallest) in least.items():
            if value is not None and value < smallest:
                raise ConfigError(f"--{flag} {value}: must be at least {smallest}")
        check_no_secret("--setup", self.setup or "")

    def _headers(self, job: Job, folder: Path) -> list[str]:
        headers: dict[str, object] = {
            "job-name": job.id,
            "output": str(folder / LOG).replace("%", "%%"),  # a % stands for the job's number and the like
            "open-mode": "append",
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "gpus-per-node": self.gpus_per_node or None,
            "cpus-per-task": self.cpus_per_node,
            "exclusive": None if self.cpus_per_node else "",
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "requeue": "",
            "signal": f"B:USR1@{self.grace}",
            "export": ",".join((*KEPT_ENV, *job.secret_env)),
        }
        return [_header(name, value) for name, value in headers.items() if value is not None]


@dataclass(frozen=True)
class SlurmHandle:
    """A job in Slurm's queue: its number, and its folder on the shared file system."""

    job: str
    folder: str

    def describe(self) -> str:
        return f"Slurm job {self.job}, log {self.folder}/{LOG}"

    def status(self) -> str:
        if state := _state(self.job):
            name, reason, restarts = state
            again = f", requeued {restarts}x" if restarts != "0" else ""
            return name.lower() + (f" ({reason})" if reason != "None" else "") + again
        ended = Path(self.folder) / ENDED
        if not ended.exists():
            return "ended without a word (cancelled, or its node was lost); submit it again to continue"
        code = ended.read_text().strip()
        if code == "0":
            return "finished"
        return (
            "stopped; submit it again to continue" if code == "130" else f"failed with exit code {code}; see its logs"
        )

    def logs(self, follow: bool) -> Iterator[str]:
        log, read = Path(self.folder) / LOG, 0
        while True:
            # Slurm is asked before the log is read: the read then includes the last lines of a job that has ended.
            running = follow and _state(self.job) is not None
            if log.exists():
                with log.open(errors="replace") as file:
                    file.seek(read)
                    yield file.read()
                    read = file.tell()
            if not running:
                return
            time.sleep(_POLL_S)

    def stop(self) -> str:
        state = _state(self.job)
        if state is None:
            return "has ended already"
        if state[0] == "RUNNING":
            # The signal goes to the script alone: it passes it on to its driver, which ends the trials, and Ray stays
            # up until they are done.
            _slurm("scancel", "--batch", "--signal=USR2", self.job)
            return "stopping; running trials write a checkpoint first"
        _slurm("scancel", self.job)
        return "cancelled"


def _folder(job: Job) -> Path:
    return Path(job.output) / "submissions" / job.id


def _header(name: str, value: object) -> str:
    text = check_printable(f"--{name}", str(value))
    if any(character in text for character in " \"'\\#"):
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{name}={text}" if text else f"#SBATCH --{name}"


def _fill(places: Mapping[str, str]) -> str:
    """Return slurm_job.sh with each @NAME@ replaced, once and line by line: a filled-in value may look like a place."""
    lines = []
    for line in (Path(__file__).parent / "slurm_job.sh").read_text().splitlines():
        place = next((name for name in places if f"@{name}@" in line), None)
        lines.append(line.replace(f"@{place}@", places[place], 1) if place else line)
    return "\n".join(lines) + "\n"


def _state(number: str) -> tuple[str, str, str] | None:
    """Return a job's state, the reason why it waits and how often it was requeued, or None once it has ended."""
    try:
        shown = _slurm("squeue", "--noheader", "--jobs", number, "--Format", "State:|,Reason:|,RestartCnt:|")
    except ConfigError as error:
        if "Invalid job id" in str(error):  # Slurm forgets a job some minutes after its end
            return None
        raise
    if not shown:
        return None
    name, reason, restarts, *_ = (word.strip() for word in shown.split("|"))
    return (name, reason, restarts) if name in _NOT_ENDED else None


def _slurm(*command: str) -> str:
    """Run one of Slurm's commands and return its output. Raises ConfigError with the reason if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError(f"{command[0]}: is not installed here; submit from a login node of the cluster") from None
    if done.returncode:
        raise ConfigError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout.strip()
