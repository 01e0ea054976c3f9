"""Run on a Slurm cluster.

Writes an sbatch script that starts Ray across the nodes of a job and runs the script on it, and submits it. Before the
time limit, and when the job is pre-empted with a signal, the running trials write a checkpoint and the job goes back
into the queue, where it continues. The Python environment, --output and --data-root must lie on a file system that the
nodes share.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stadapter.cluster.submit.job import COMMIT, Job, check_no_secret, check_printable, copy_code
from stadapter.config import ConfigError
from stadapter.trials import files

SHARED_PATHS = True
SECRETS = "hand this variable of the environment you submit from to the job; the script holds its name only"
DEFAULT_GRACE_S = 120
KEPT_ENV = ("HOME", "USER", "LOGNAME", "PATH", "LANG")
LOG, SCRIPT, CODE, ENDED = "log.txt", "job.sh", "code", "ended"  # in OUTPUT/submissions/<id>
_POLL_S = 1.0
_NOT_ENDED = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "REQUEUED", "REQUEUE_HOLD")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="(default: none)")
    parser.add_argument(
        "--cpus-per-node", type=int, metavar="N", help="CPU cores on each node (default: whole nodes, all of theirs)"
    )
    parser.add_argument("--time", metavar="D-HH:MM:SS", help="the limit of one start (default: the partition's)")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument(
        "--grace", type=int, default=DEFAULT_GRACE_S, metavar="SECONDS",
        help="this long before the limit, trials write their checkpoints (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--setup", metavar="COMMANDS",
        help="shell commands that make `python` the right one on a node, such as 'module load cuda; source "
        "/shared/venv/bin/activate' (default: this interpreter, by its path)",
    )  # fmt: skip


def artefact(job: Job, options: argparse.Namespace) -> str:
    """The sbatch script."""
    for flag, least in (("nodes", 1), ("cpus_per_node", 1), ("grace", 1), ("gpus_per_node", 0)):
        value = getattr(options, flag)
        if value is not None and value < least:
            raise ConfigError(f"--{flag.replace('_', '-')} {value}: must be at least {least}")
    check_no_secret("--setup", options.setup or "")
    folder = _folder(job)
    headers = {
        "job-name": job.id,
        "output": str(folder / LOG).replace("%", "%%"),  # a % stands for the job's number and the like
        "open-mode": "append",
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": options.gpus_per_node or None,
        "cpus-per-task": options.cpus_per_node,
        "exclusive": None if options.cpus_per_node else "",
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "requeue": "",
        "signal": f"B:USR1@{options.grace}",
        "export": ",".join((*KEPT_ENV, *job.secret_env)),
    }
    exported = {"PYTHONUNBUFFERED": "1", COMMIT: str(job.code), **dict(job.env)}
    needed = [f': "${{{name}:?is not in the job, though --secret-env names it}}"' for name in job.secret_env]
    filled = {
        "HEADERS": "\n".join(_header(name, value) for name, value in headers.items() if value is not None),
        "FACTS": "\n".join(f"# {name}: {check_printable(name, fact)}" for name, fact in job.described().items()),
        "FOLDER": shlex.quote(str(folder)),
        "SETUP": options.setup or ":",
        "PYTHON": "python" if options.setup else shlex.quote(os.path.abspath(sys.executable)),
        "EXPORTS": "\n".join(f"export {name}={shlex.quote(value)}" for name, value in exported.items()),
        "SECRETS": "\n".join(needed),
        "COMMAND": shlex.join(job.words),
    }
    # Line by line, and each place once: what a user typed may look like a place.
    lines = []
    for line in (Path(__file__).parent / "slurm_job.sh").read_text().splitlines():
        place = next((name for name in filled if f"@{name}@" in line), None)
        lines.append(line.replace(f"@{place}@", filled[place], 1) if place else line)
    return "\n".join(lines) + "\n"


def _folder(job: Job) -> Path:
    return Path(job.output) / "submissions" / job.id


def _header(name: str, value: object) -> str:
    text = check_printable(f"--{name}", str(value))
    if any(character in text for character in " \"'\\#"):
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{name}={text}" if text else f"#SBATCH --{name}"


def submit(job: Job, options: argparse.Namespace, script: str) -> dict[str, Any]:
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
    return {"job": number, "folder": str(folder)}


def describe(facts: dict[str, Any]) -> str:
    return f"Slurm job {facts['job']}, log {facts['folder']}/{LOG}"


def status(facts: dict[str, Any]) -> str:
    if state := _state(facts["job"]):
        name, reason, restarts = state
        again = f", requeued {restarts}x" if restarts != "0" else ""
        return name.lower() + (f" ({reason})" if reason != "None" else "") + again
    ended = Path(facts["folder"]) / ENDED
    if not ended.exists():
        return "ended without a word (cancelled, or its node was lost); submit it again to continue"
    code = ended.read_text().strip()
    if code == "0":
        return "finished"
    return "stopped; submit it again to continue" if code == "130" else f"failed with exit code {code}; see its logs"


def logs(facts: dict[str, Any], follow: bool) -> Iterator[str]:
    log, read = Path(facts["folder"]) / LOG, 0
    while True:
        # Asked before the log is read: what is said until the end is read after it.
        running = follow and _state(facts["job"]) is not None
        if log.exists():
            with log.open(errors="replace") as file:
                file.seek(read)
                yield file.read()
                read = file.tell()
        if not running:
            return
        time.sleep(_POLL_S)


def stop(facts: dict[str, Any]) -> str:
    state = _state(facts["job"])
    if state is None:
        return "has ended already"
    if state[0] == "RUNNING":
        # To the script alone: it tells its driver, which tells the trials, and Ray stays up until they are done.
        _slurm("scancel", "--batch", "--signal=USR2", facts["job"])
        return "stopping; running trials write a checkpoint first"
    _slurm("scancel", facts["job"])
    return "cancelled"


def _state(number: str) -> tuple[str, str, str] | None:
    """A job's state, the reason why it waits and how often it was requeued; None once it has ended."""
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
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError(f"{command[0]}: is not installed here; submit from a login node of the cluster") from None
    if done.returncode:
        raise ConfigError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout.strip()
