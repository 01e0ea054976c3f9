"""`stadapter submit`: a command of this machine, run on a cluster. The command stands behind `--`.

Argparse and printing alone: the flags of a back end fill its options, and `stadapter.cluster.submit` does the work.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from stadapter.cluster.submit.backend import Backend
from stadapter.cluster.submit.job import make_job
from stadapter.cluster.submit.kubernetes import Kubernetes
from stadapter.cluster.submit.ray_jobs import DEFAULT_ADDRESS, RayJobs
from stadapter.cluster.submit.slurm import Slurm
from stadapter.cluster.submit.submissions import DEFAULT_RECORDS, load, load_all, submit
from stadapter.config import ConfigError

EXAMPLES = """\
  stadapter submit slurm --nodes 2 --gpus-per-node 8 -- experiments/ablate_kernel.py --data-root /shared/ssv2
  stadapter submit ray --ray-address http://127.0.0.1:8265 -- experiments/ablate_kernel.py --output /shared/runs
  stadapter submit status"""

SLURM = """\
Writes an sbatch script that starts Ray across the nodes of a job and runs the script on it, and submits it. Before the
time limit, and when the job is pre-empted with a signal, the running trials write a checkpoint and the job goes back
into the queue, where it continues. The Python environment, --output and --data-root must lie on a file system that the
nodes share."""
RAY = """\
Uploads a copy of the checkout and runs the script on the cluster's head node. The cluster's token is taken from
$RAY_AUTH_TOKEN, from the file that $RAY_AUTH_TOKEN_PATH names, or from ~/.ray/auth_token. --output and --data-root must
lie on a file system that the cluster's nodes share; the Python environment is the cluster's own."""
KUBERNETES = """\
Writes the manifest of a Ray cluster that is started for the script, with token authentication, and taken away after
it; --apply hands it to kubectl. A job that ends early (a node was lost, a pod evicted) is started again and continues.
The image holds Ray, the packages and, unless --code names an archive, the code."""


def main(arguments: list[str]) -> int:
    """Run `stadapter submit` and return its exit code. Raises ConfigError for input that cannot work."""
    # All words behind -- belong to the script, flags of this command among them.
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = _parser().parse_args(arguments[:split])
    words = arguments[split + 1 :]
    if "backend" in options:
        return _submit(options, words)
    if words:
        raise ConfigError(f"submit {options.what}: takes no command behind `--`")
    code: int = options.run(options)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stadapter submit",
        description="Run a script on a cluster: what would be typed here stands behind `--`.",
        epilog=f"examples:\n{EXAMPLES}\n\nexit codes: 0 done; 2 the input cannot work, or the cluster refused it",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    _add_slurm(what)
    _add_ray(what)
    _add_kubernetes(what)
    _add_status(what)
    _add_logs(what)
    _add_stop(what)
    return parser


def _add_slurm(what: Any) -> None:
    parser = _add_backend(what, Slurm, "run on a Slurm cluster", SLURM)
    parser.add_argument("--nodes", type=int, default=Slurm.nodes, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=Slurm.gpus_per_node, metavar="N", help="(default: none)")
    parser.add_argument(
        "--cpus-per-node", type=int, metavar="N", help="CPU cores on each node (default: whole nodes, all of theirs)"
    )
    parser.add_argument("--time", metavar="D-HH:MM:SS", help="the limit of one start (default: the partition's)")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument(
        "--grace", type=int, default=Slurm.grace, metavar="SECONDS",
        help="this long before the limit, trials write their checkpoints (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--setup", metavar="COMMANDS",
        help="shell commands that make `python` the right one on a node, such as 'module load cuda; source "
        "/shared/venv/bin/activate' (default: this interpreter, by its path)",
    )  # fmt: skip
    _add_shared(
        parser,
        "hand this variable of the environment you submit from to the job; the script holds its name only",
    )


def _add_ray(what: Any) -> None:
    parser = _add_backend(what, RayJobs, "run on a Ray cluster that is up already, through its Jobs API", RAY)
    parser.add_argument(
        "--ray-address", default=os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS), metavar="URL",
        help="the cluster's dashboard, by way of an SSH tunnel where it is remote (default: $RAY_API_SERVER_ADDRESS, "
        f"or {DEFAULT_ADDRESS})",
    )  # fmt: skip
    _add_shared(
        parser,
        "the job needs this environment variable, which the cluster's head must have; it is looked for, not sent",
    )


def _add_kubernetes(what: Any) -> None:
    parser = _add_backend(what, Kubernetes, "run on Kubernetes, as a RayJob of KubeRay", KUBERNETES)
    parser.add_argument("--image", required=True, help="with Ray, the packages and the code")
    parser.add_argument(
        "--code", default=Kubernetes.code, metavar="FOLDER|URL",
        help="the checkout: a folder of the image, or the address of a .zip in which {commit} stands for the commit, "
        "such as https://github.com/me/mine/archive/{commit}.zip (default: %(default)s)",
    )  # fmt: skip
    for flag, default, help in (
        ("--workers", Kubernetes.workers, "pods that train (default: %(default)s)"),
        ("--gpus-per-worker", Kubernetes.gpus_per_worker, "(default: none)"),
        ("--cpus-per-worker", Kubernetes.cpus_per_worker, "(default: %(default)s)"),
    ):
        parser.add_argument(flag, type=int, default=default, metavar="N", help=help)
    parser.add_argument(
        "--memory-per-worker", default=Kubernetes.memory_per_worker, metavar="SIZE", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--volume", action="append", default=[], metavar="CLAIM:/MOUNT",
        help="mount a persistent volume claim in every pod; --output must lie on one. Repeatable",
    )  # fmt: skip
    parser.add_argument("--secret", metavar="NAME", help="the Kubernetes secret that holds what --secret-env names")
    parser.add_argument("--namespace", default=Kubernetes.namespace, metavar="NAME", help="(default: %(default)s)")
    parser.add_argument(
        "--retries", type=int, default=Kubernetes.retries, metavar="N",
        help="start a job that ended early again, N times (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--apply", action="store_true", help="hand the manifest to kubectl, instead of writing it only")
    _add_shared(
        parser,
        "take this environment variable from the key of the same name in the Kubernetes secret --secret",
    )


def _add_backend(what: Any, backend: Any, summary: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = what.add_parser(
        backend.name, help=summary, description=description, usage="%(prog)s [flags] -- SCRIPT [its flags]"
    )
    parser.set_defaults(backend=backend)
    return parser


def _add_shared(parser: argparse.ArgumentParser, secrets: str) -> None:
    """Add the flags that all back ends have; `secrets` says what --secret-env does."""
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE",
        help="set this environment variable in the job; repeatable",
    )  # fmt: skip
    parser.add_argument("--secret-env", action="append", default=[], metavar="NAME", help=f"{secrets}; repeatable")
    parser.add_argument(
        "--dry-run", action="store_true", help="submit nothing and write nothing: print what would be submitted"
    )
    _add_records(parser)


def _add_status(what: Any) -> None:
    parser = what.add_parser("status", help="say how a job, or every job, is doing")
    parser.add_argument("id", nargs="?", metavar="ID")
    _add_records(parser)
    parser.set_defaults(run=_status)


def _add_logs(what: Any) -> None:
    parser = what.add_parser("logs", help="print what a job has said")
    parser.add_argument("id", metavar="ID")
    parser.add_argument("--follow", action="store_true", help="go on until the job ends")
    _add_records(parser)
    parser.set_defaults(run=_logs)


def _add_stop(what: Any) -> None:
    parser = what.add_parser(
        "stop", help="end a job; running trials write a checkpoint first, and submitting it again continues them"
    )
    parser.add_argument("id", metavar="ID")
    _add_records(parser)
    parser.set_defaults(run=_stop)


def _add_records(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--records", type=Path, default=DEFAULT_RECORDS, metavar="FOLDER",
        help="where submissions are written down, on this machine (default: %(default)s)",
    )  # fmt: skip


def _submit(options: argparse.Namespace, words: list[str]) -> int:
    backend = _filled(options)
    job = make_job(words, options.env, options.secret_env, shared_paths=backend.shared_paths)
    artefact = backend.artefact(job)
    if job.code.dirty:
        print(f"warning: {job.code.root} has changes that are in no commit", file=sys.stderr)
    if options.dry_run:
        print(artefact)
        return 0
    submission = submit(job, backend, options.records)
    if isinstance(backend, Kubernetes) and not backend.apply:
        path = options.records / f"{job.id}.yaml"
        print(f"kubectl create --filename {shlex.quote(str(path))}    # or add --apply")
    print(f"submitted {job.id} ({submission.handle.describe()})\nNext:")
    where = [] if options.records == DEFAULT_RECORDS else ["--records", str(options.records)]
    for verb, *flags in (["status"], ["logs", "--follow"], ["stop"]):
        print("  " + shlex.join(["stadapter", "submit", verb, job.id, *flags, *where]))
    return 0


def _filled(options: argparse.Namespace) -> Backend:
    """Return the back end that was asked for, its fields filled from the flags of the same names."""
    values = {field.name: getattr(options, field.name) for field in fields(options.backend)}
    backend: Backend = options.backend(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    )
    return backend


def _status(options: argparse.Namespace) -> int:
    if options.id is not None:
        found = load(options.id, options.records)
        print(f"{found.job.id}  {found.backend}  {found.handle.status()}")
        return 0
    every = load_all(options.records)
    if not every:
        print(f"{options.records}: nothing was submitted")
    for found in every:
        try:
            state = found.handle.status()
        except ConfigError as error:  # a cluster that cannot be asked hides no other
            state = f"unknown: {error}"
        print(f"{found.job.id}  {found.backend}  {state}")
    return 0


def _logs(options: argparse.Namespace) -> int:
    try:
        for text in load(options.id, options.records).handle.logs(options.follow):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        return 130  # the job goes on
    return 0


def _stop(options: argparse.Namespace) -> int:
    print(f"{options.id}: {load(options.id, options.records).handle.stop()}")
    return 0
