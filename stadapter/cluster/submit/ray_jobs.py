"""Ray Jobs: a running Ray cluster takes a copy of the checkout and runs the command on its head node.

The cluster's token is taken from $RAY_AUTH_TOKEN, from the file that $RAY_AUTH_TOKEN_PATH names, or from
~/.ray/auth_token. --output and --data-root must lie on a file system that the cluster's nodes share; the Python
environment is the cluster's own.

`python -m stadapter.cluster.submit.ray_jobs ADDRESS COUNT` waits for the nodes of a cluster; slurm_job.sh calls it.
This module is light: Ray's client loads with the first question to a cluster.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from stadapter.cluster.submit.job import COMMIT, Job, copy_code
from stadapter.config import ConfigError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOP_WAIT_S = 120  # for the checkpoints of running trials; Ray's own 3 s are too short for large ones
START_TIMEOUT_S = 300.0  # for the nodes of a cluster to come up
_POLL_S = 1.0
_ENTRYPOINT = "submitted_job.sh"
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class RayJobs:
    """A running Ray cluster, by the address of its dashboard."""

    name: ClassVar[str] = "ray"
    shared_paths: ClassVar[bool] = False

    ray_address: str = DEFAULT_ADDRESS

    def artefact(self, job: Job) -> str:
        """Return the request to the cluster, and the script that it runs in its copy of the checkout."""
        request = {"address": _checked(self.ray_address)} | _request(job)
        return f"{json.dumps(request, indent=2)}\n\n# {_ENTRYPOINT}, in a copy of {job.code.root}\n{_script(job)}"

    def submit(self, job: Job, records: Path) -> RayJobsHandle:
        """Upload a copy of the checkout and start the job."""
        from stadapter.cluster.submit.ray_dashboard import ask

        address = _checked(self.ray_address)
        ask(address, lambda client: client.get_version())  # a wrong address or token shows before anything is copied
        request = _request(job)
        with tempfile.TemporaryDirectory(prefix="stadapter-submit-") as folder:
            copy_code(job, Path(folder))
            (Path(folder) / _ENTRYPOINT).write_text(_script(job))
            request["runtime_env"]["working_dir"] = folder
            ask(address, lambda client: client.submit_job(**request), limited=False)  # an upload may take long
        return RayJobsHandle(address, job.id)


@dataclass(frozen=True)
class RayJobsHandle:
    """A job of a Ray cluster: the address of its dashboard, and the job's name there."""

    address: str
    job: str

    def describe(self) -> str:
        return f"Ray job on {self.address}"

    def status(self) -> str:
        found = self._details()
        if found.status == "FAILED":
            stopped = found.driver_exit_code == 130
            return "stopped; submit it again to continue" if stopped else f"failed: {found.message}"
        named = {"SUCCEEDED": "finished", "STOPPED": "stopped; submit it again to continue"}
        return named.get(found.status, str(found.status.value).lower())

    def logs(self, follow: bool) -> Iterator[str]:
        """Yield the log, asked for each second: Ray's tail_job_logs does not notice that a connection went dead."""
        from stadapter.cluster.submit.ray_dashboard import ask

        read = 0
        while True:
            # The state is asked before the log is read: the read then includes the last lines of a job that has ended.
            running = follow and self._details().status not in _ENDED
            text = ask(self.address, lambda client: client.get_job_logs(self.job))
            yield text[read:]
            read = len(text)
            if not running:
                return
            time.sleep(_POLL_S)

    def stop(self) -> str:
        from stadapter.cluster.submit.ray_dashboard import ask

        if not ask(self.address, lambda client: client.stop_job(self.job)):
            return "has ended already"
        return f"stopping; running trials have {STOP_WAIT_S} s to write a checkpoint"

    def _details(self) -> JobDetails:
        from stadapter.cluster.submit.ray_dashboard import ask

        return ask(self.address, lambda client: client.get_job_info(self.job))


def wait_for_nodes(address: str, count: int, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return once `count` nodes of the cluster whose dashboard is at `address` are alive.

    Raises ConfigError after `timeout_s`.
    """
    from stadapter.cluster.submit.ray_dashboard import nodes_alive

    until, last = time.monotonic() + timeout_s, "no answer"
    while time.monotonic() < until:
        try:
            alive = nodes_alive(address)
            if alive >= count:
                return
            last = f"{alive} of {count} nodes are up"
        except ConfigError as error:  # the dashboard is not up yet
            last = str(error)
        time.sleep(_POLL_S / 4)
    raise ConfigError(f"{last}, after {timeout_s:g} s")


def _request(job: Job) -> dict[str, Any]:
    """Return the arguments of Ray's submit_job, without the folder that is uploaded."""
    env = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), COMMIT: str(job.code)}
    return {
        "submission_id": job.id,
        "entrypoint": f"bash {_ENTRYPOINT}",
        "runtime_env": {"env_vars": env | dict(job.env)},
        "metadata": job.described(),
    }


def _script(job: Job) -> str:
    lines = [f': "${{{name}:?is not on the head node, though --secret-env names it}}"' for name in job.secret_env]
    lines.append('export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"')
    lines.append(f"exec python {shlex.join(job.words)} --address auto")
    return "\n".join(lines) + "\n"


def _checked(address: str) -> str:
    """Return the address. Raises ConfigError if it cannot be a dashboard's, or holds a password."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--ray-address {address}: expected the dashboard's address, such as {DEFAULT_ADDRESS}")
    if parts.password:
        raise ConfigError("--ray-address: holds a password, which would be written down; leave it out")
    return address


if __name__ == "__main__":
    try:
        wait_for_nodes(sys.argv[1], int(sys.argv[2]))
    except ConfigError as problem:
        sys.exit(f"error: {problem}")
