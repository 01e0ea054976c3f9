"""The command `submit`, which runs a script on a cluster.

The script and its flags stand behind `--`. Each back end is a module with the same functions.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from stadapter.ablation.exit_codes import DONE, STOPPED
from stadapter.cluster.submit import kubernetes, ray_jobs, slurm
from stadapter.cluster.submit.job import load, load_all, make_job, save
from stadapter.config import ConfigError
from stadapter.trials.sweep import DEFAULT_OUTPUT

BACKENDS = {"slurm": slurm, "ray": ray_jobs, "kubernetes": kubernetes}
DEFAULT_RECORDS = DEFAULT_OUTPUT / "submissions"

EXAMPLES = """\
  stadapter submit slurm --nodes 2 --gpus-per-node 8 -- experiments/ablate_kernel.py --data-root /shared/ssv2
  stadapter submit ray --ray-address http://127.0.0.1:8265 -- experiments/ablate_kernel.py --output /shared/runs
  stadapter submit status"""


def main(arguments: list[str]) -> int:
    """Run the words behind `submit` and return the exit code. Raises ConfigError for input that cannot work."""
    # All words behind -- belong to the script, --help included.
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = _parser().parse_args(arguments[:split])
    words = arguments[split + 1 :]
    if options.what in BACKENDS:
        return _submit(options, words)
    if words:
        raise ConfigError(f"submit {options.what}: takes no command behind `--`")
    return {"status": _status, "logs": _logs, "stop": _stop}[options.what](options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stadapter submit",
        description="Run a script on a cluster: what would be typed here stands behind `--`.",
        epilog=f"examples:\n{EXAMPLES}\n\nexit codes: 0 done; 2 the input cannot work, or the cluster refused it",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, backend in BACKENDS.items():
        summary, description = (backend.__doc__ or "").split("\n\n")[:2]
        each = what.add_parser(
            name,
            help=summary[0].lower() + summary[1:].rstrip("."),
            description=description,
            usage="%(prog)s [flags] -- SCRIPT [its flags]",
        )
        backend.add_flags(each)
        each.add_argument(
            "--env", action="append", default=[], metavar="NAME=VALUE",
            help="set this environment variable in the job; repeatable",
        )  # fmt: skip
        each.add_argument(
            "--secret-env", action="append", default=[], metavar="NAME", help=f"{backend.SECRETS}; repeatable"
        )
        each.add_argument(
            "--dry-run", action="store_true", help="submit nothing and write nothing: print what would be submitted"
        )
        _add_records(each)
    status = what.add_parser("status", help="say how a job, or every job, is doing")
    status.add_argument("id", nargs="?", metavar="ID")
    logs = what.add_parser("logs", help="print what a job has said")
    logs.add_argument("id", metavar="ID")
    logs.add_argument("--follow", action="store_true", help="go on until the job ends")
    stop = what.add_parser(
        "stop", help="end a job; running trials write a checkpoint first, and submitting it again continues them"
    )
    stop.add_argument("id", metavar="ID")
    for each in (status, logs, stop):
        _add_records(each)
    return parser


def _add_records(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--records", type=Path, default=DEFAULT_RECORDS, metavar="FOLDER",
        help="where submissions are recorded, on this machine (default: %(default)s)",
    )  # fmt: skip


def _submit(options: argparse.Namespace, words: list[str]) -> int:
    backend = BACKENDS[options.what]
    job = make_job(words, options.env, options.secret_env, shared_paths=backend.SHARED_PATHS)
    artefact = backend.artefact(job, options)
    if job.code.dirty:
        print(f"warning: {job.code.root} has changes that are in no commit", file=sys.stderr)
    if options.dry_run:
        print(artefact)
        return DONE
    facts = backend.submit(job, options, artefact)
    try:
        save(job, options.what, facts, options.records)
    except OSError as error:
        raise ConfigError(
            f"--records {options.records}: cannot be written ({error.strerror}), though the job was submitted: {facts}"
        ) from None
    print(f"submitted {job.id} ({backend.describe(facts)})\nNext:")
    where = [] if options.records == DEFAULT_RECORDS else ["--records", str(options.records)]
    for verb, *flags in (["status"], ["logs", "--follow"], ["stop"]):
        print("  " + shlex.join(["stadapter", "submit", verb, job.id, *flags, *where]))
    return DONE


def _status(options: argparse.Namespace) -> int:
    if options.id is not None:
        found = load(options.id, options.records)
        print(f"{found['id']}  {found['backend']}  {BACKENDS[found['backend']].status(found['facts'])}")
        return DONE
    every = load_all(options.records)
    if not every:
        print(f"{options.records}: nothing was submitted")
    for found in every:
        try:
            state = BACKENDS[found["backend"]].status(found["facts"])
        except ConfigError as error:  # a cluster that is away does not hide the others
            state = f"unknown: {error}"
        print(f"{found['id']}  {found['backend']}  {state}")
    return DONE


def _logs(options: argparse.Namespace) -> int:
    found = load(options.id, options.records)
    try:
        for text in BACKENDS[found["backend"]].logs(found["facts"], options.follow):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        return STOPPED  # the job goes on
    return DONE


def _stop(options: argparse.Namespace) -> int:
    found = load(options.id, options.records)
    print(f"{options.id}: {BACKENDS[found['backend']].stop(found['facts'])}")
    return DONE
