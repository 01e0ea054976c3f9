"""Run on a Ray cluster that is up already, through its Jobs API.

Uploads a copy of the checkout and runs the script on the cluster's head node. The cluster's token is taken from
$RAY_AUTH_TOKEN, from the file that $RAY_AUTH_TOKEN_PATH names, or from ~/.ray/auth_token. --output and --data-root must
lie on a file system that the cluster's nodes share; the Python environment is the cluster's own.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stadapter.cluster.submit.job import COMMIT, Job, copy_code
from stadapter.config import ConfigError

SHARED_PATHS = False
SECRETS = "the job needs this environment variable, which the cluster's head must have; it is looked for, not sent"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOP_WAIT_S = 120  # for the checkpoints of running trials; Ray's own 3 s are too short for large ones
START_TIMEOUT_S = 300.0  # of the nodes of a cluster
_REQUEST_TIMEOUT_S = 20.0
_POLL_S = 1.0
_ENTRYPOINT = "submitted_job.sh"
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ray-address", default=os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS), metavar="URL",
        help="the cluster's dashboard, by way of an SSH tunnel where it is remote (default: $RAY_API_SERVER_ADDRESS, "
        f"or {DEFAULT_ADDRESS})",
    )  # fmt: skip


def artefact(job: Job, options: argparse.Namespace) -> str:
    """What the cluster is told, and the script that it runs in its copy of the checkout."""
    told = {
        "address": _checked(options.ray_address),
        "submission_id": job.id,
        "entrypoint": f"bash {_ENTRYPOINT}",
        "runtime_env": _runtime_env(job),
        "metadata": job.described(),
    }
    return f"{json.dumps(told, indent=2)}\n\n# {_ENTRYPOINT}, in a copy of {job.code.root}\n{_script(job)}"


def _runtime_env(job: Job) -> dict[str, Any]:
    env = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), COMMIT: str(job.code)}
    return {"env_vars": env | dict(job.env)}


def _script(job: Job) -> str:
    lines = [f': "${{{name}:?is not on the head node, though --secret-env names it}}"' for name in job.secret_env]
    lines.append('export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"')
    lines.append(f"exec python {shlex.join(job.words)} --address auto")
    return "\n".join(lines) + "\n"


def submit(job: Job, options: argparse.Namespace, artefact: str) -> dict[str, Any]:
    address = options.ray_address
    _request(address, "/api/jobs/")  # an address or a token that is wrong shows here, in one line
    with tempfile.TemporaryDirectory(prefix="stadapter-submit-") as folder:
        copy_code(job, Path(folder))
        (Path(folder) / _ENTRYPOINT).write_text(_script(job))
        command = ["job", "submit", "--address", address, "--no-wait", "--submission-id", job.id]
        command += ["--working-dir", folder, "--runtime-env-json", json.dumps(_runtime_env(job))]
        command += ["--metadata-json", json.dumps(job.described()), "--", "bash", _ENTRYPOINT]
        # Ray's own command uploads the folder. It finds the token by itself, where `_token` finds it.
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *command],
            capture_output=True, text=True, env=os.environ | ({"RAY_AUTH_MODE": "token"} if _token() else {}),
        )  # fmt: skip
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ConfigError(f"--ray-address {address}: refused the job ({said[-1].strip() if said else 'silently'})")
    return {"address": address, "job": job.id}


def describe(facts: dict[str, Any]) -> str:
    return f"Ray job on {facts['address']}"


def status(facts: dict[str, Any]) -> str:
    found = _job(facts)
    if found["status"] == "FAILED":
        stopped = found.get("driver_exit_code") == 130
        return "stopped; submit it again to continue" if stopped else f"failed: {found.get('message')}"
    return {"SUCCEEDED": "finished", "STOPPED": "stopped; submit it again to continue"}.get(
        found["status"], str(found["status"]).lower()
    )


def logs(facts: dict[str, Any], follow: bool) -> Iterator[str]:
    read = 0
    while True:
        # Asked before the log is read: what is said until the end is read after it.
        running = follow and _job(facts)["status"] not in _ENDED
        text = _request(facts["address"], f"/api/jobs/{facts['job']}/logs")["logs"]
        yield text[read:]
        read = len(text)
        if not running:
            return
        time.sleep(_POLL_S)


def stop(facts: dict[str, Any]) -> str:
    if _job(facts)["status"] in _ENDED:
        return "has ended already"
    _request(facts["address"], f"/api/jobs/{facts['job']}/stop", method="POST")
    return f"stopping; running trials have {STOP_WAIT_S} s to write a checkpoint"


def wait_for_nodes(address: str, count: int, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return when `count` nodes of the cluster whose dashboard is at `address` are alive; ConfigError after a while."""
    until, last = time.monotonic() + timeout_s, "no answer"
    while time.monotonic() < until:
        try:
            nodes = _request(address, "/api/v0/nodes")["data"]["result"]["result"]
            alive = sum(node["state"] == "ALIVE" for node in nodes)
            if alive >= count:
                return
            last = f"{alive} of {count} nodes are up"
        except ConfigError as error:  # not yet there
            last = str(error)
        time.sleep(_POLL_S / 4)
    raise ConfigError(f"{last}, after {timeout_s:g} s")


def _job(facts: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = _request(facts["address"], f"/api/jobs/{facts['job']}")
    return found


def _checked(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--ray-address {address}: expected the dashboard's address, such as {DEFAULT_ADDRESS}")
    if parts.password:
        raise ConfigError("--ray-address: holds a password, which would be written down; leave it out")
    return address


def _token() -> str | None:
    """The cluster's token, found where Ray itself looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip() or None
    except OSError as error:
        if named:
            raise ConfigError(f"RAY_AUTH_TOKEN_PATH {named}: cannot be read ({error.strerror})") from None
        return None


def _request(address: str, path: str, method: str = "GET") -> Any:
    """The JSON that the dashboard answers; ConfigError where it does not answer, or not to us."""
    token = _token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(_checked(address).rstrip("/") + path, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=_REQUEST_TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            found = "is not this cluster's" if token else "is missing"
            reason = f"the token {found}; set RAY_AUTH_TOKEN_PATH to the file that holds it"
        elif error.code == 404:
            reason = "does not know this job; the cluster may have been started anew"
        else:
            reason = f"answers {error.code}: {' '.join(error.read(500).decode(errors='replace').split())}"
        raise ConfigError(f"--ray-address {address}: {reason}") from None
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))
        raise ConfigError(f"--ray-address {address}: no Ray dashboard answers there ({reason})") from None


if __name__ == "__main__":  # in a Slurm job, while Ray starts
    try:
        wait_for_nodes(sys.argv[1], int(sys.argv[2]))
    except ConfigError as problem:
        sys.exit(f"error: {problem}")
