"""Run on Kubernetes, as a RayJob of KubeRay.

Writes the manifest of a Ray cluster that is started for the script, with token authentication, and taken away after
it; --apply hands it to kubectl. A job that ends early (a node was lost, a pod evicted) is started again and continues.
The image holds Ray, the packages and, unless --code names an archive, the code.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from stadapter.cluster.submit.job import COMMIT, Job, check_printable
from stadapter.config import ConfigError
from stadapter.data.lists.storage import is_remote
from stadapter.trials import files

SHARED_PATHS = False
SECRETS = "take this environment variable from the key of the same name in the Kubernetes secret --secret"
DEFAULT_RETRIES = 10
GRACE_S = 120
KEPT_S = 3600  # a job that has ended, so that its logs can be read


class _Plain(yaml.SafeDumper):
    """Writes a value that occurs twice twice, instead of a reference to its first place."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True, help="with Ray, the packages and the code")
    parser.add_argument(
        "--code", default="/app", metavar="FOLDER|URL",
        help="the checkout: a folder of the image, or the address of a .zip in which {commit} stands for the commit, "
        "such as https://github.com/me/mine/archive/{commit}.zip (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="pods that train (default: %(default)s)")
    parser.add_argument("--gpus-per-worker", type=int, default=0, metavar="N", help="(default: none)")
    parser.add_argument("--cpus-per-worker", type=int, default=8, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--memory-per-worker", default="32Gi", metavar="SIZE", help="(default: %(default)s)")
    parser.add_argument(
        "--volume", action="append", default=[], metavar="CLAIM:/MOUNT",
        help="mount a persistent volume claim in every pod; --output must lie on one. Repeatable",
    )  # fmt: skip
    parser.add_argument("--secret", metavar="NAME", help="the Kubernetes secret that holds what --secret-env names")
    parser.add_argument("--namespace", default="default", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument(
        "--retries", type=int, default=DEFAULT_RETRIES, metavar="N",
        help="start a job that ended early again, N times (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--apply", action="store_true", help="hand the manifest to kubectl, instead of writing it only")


def artefact(job: Job, options: argparse.Namespace) -> str:
    """The manifest."""
    for flag, least in (("workers", 1), ("gpus_per_worker", 0), ("cpus_per_worker", 1), ("retries", 0)):
        if getattr(options, flag) < least:
            raise ConfigError(f"--{flag.replace('_', '-')} {getattr(options, flag)}: must be at least {least}")
    if job.secret_env and not options.secret:
        raise ConfigError(f"--secret-env {job.secret_env[0]}: name the Kubernetes secret that holds it with --secret")
    volumes = [_volume(text) for text in options.volume]
    for flag, path in (("--output", job.output), ("--data-root", job.data_root)):
        mounts = [mount for _, mount in volumes]
        if path and not is_remote(path) and not any(PurePosixPath(path).is_relative_to(mount) for mount in mounts):
            raise ConfigError(f"{flag} {path}: lies on no --volume, and would be gone, or missing, with its pod")
    code, entrypoint = _code(job, options.code)
    env = code | {"PYTHONUNBUFFERED": "1"} | dict(job.env)
    containers = {
        "image": check_printable("--image", options.image),
        "env": [
            *({"name": name, "value": value} for name, value in env.items()),
            *(
                {"name": name, "valueFrom": {"secretKeyRef": {"name": options.secret, "key": name}}}
                for name in job.secret_env
            ),
        ],
        "volumeMounts": [{"name": f"volume-{n}", "mountPath": mount} for n, (_, mount) in enumerate(volumes)],
    }

    def pods(name: str, cpus: int, memory: str, gpus: int) -> dict[str, Any]:
        amounts: dict[str, Any] = {"cpu": str(cpus), "memory": memory} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
        return {
            "spec": {
                "terminationGracePeriodSeconds": GRACE_S,
                "containers": [{"name": name, **containers, "resources": {"requests": amounts, "limits": amounts}}],
                "volumes": [
                    {"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}}
                    for number, (claim, _) in enumerate(volumes)
                ],
            }
        }

    runtime_env: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S)}}
    if is_remote(options.code):
        runtime_env["working_dir"] = options.code.replace("{commit}", job.code.commit)
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": job.id,
            "namespace": options.namespace,
            "annotations": {f"stadapter/{name}": fact for name, fact in job.described().items()},
        },
        "spec": {
            "entrypoint": entrypoint,
            "runtimeEnvYAML": yaml.safe_dump(runtime_env),
            "backoffLimit": options.retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEPT_S,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token"},
                # The head keeps its CPUs for Ray and the driver: an evicted trial is tried again, an evicted head
                # starts the whole job again.
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},
                    "template": pods("ray-head", 2, "8Gi", 0),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": options.workers,
                        "minReplicas": options.workers,
                        "maxReplicas": options.workers,
                        "rayStartParams": {},
                        "template": pods(
                            "ray-worker", options.cpus_per_worker, options.memory_per_worker, options.gpus_per_worker
                        ),
                    }
                ],
            },
        },
    }
    return yaml.dump(manifest, Dumper=_Plain, sort_keys=False, width=1000)


def _volume(text: str) -> tuple[str, str]:
    claim, separator, mount = check_printable("--volume", text).partition(":")
    if not claim or not separator or not mount.startswith("/"):
        raise ConfigError(f"--volume {text}: expected CLAIM:/MOUNT, such as shared:/shared")
    return claim, mount


def _code(job: Job, code: str) -> tuple[dict[str, str], str]:
    """The environment that tells which code runs, and the command line that runs it."""
    command = f"exec python {shlex.join(job.words)} --address auto"
    path = 'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"'
    if not is_remote(code):
        # What the image holds is not known here, so no commit is claimed for it.
        return {}, shlex.join(
            ["bash", "-c", f"cd {shlex.quote(check_printable('--code', code))} && {path} && {command}"]
        )
    if "{commit}" not in code:
        raise ConfigError(f"--code {code}: holds no {{commit}}, so it would not be known which code runs")
    if job.code.dirty:
        raise ConfigError(f"--code {code}: {job.code.root} has changes that are in no commit; commit and push them")
    return {COMMIT: job.code.commit}, shlex.join(["bash", "-c", f"{path} && {command}"])


def submit(job: Job, options: argparse.Namespace, manifest: str) -> dict[str, Any]:
    path = options.records / f"{job.id}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, manifest.encode())
    except OSError as error:
        raise ConfigError(f"--records {options.records}: cannot be written ({error.strerror})") from None
    if options.apply:
        _kubectl("create", "--filename", str(path))
    else:
        print(f"kubectl create --filename {shlex.quote(str(path))}    # or add --apply")
    return {"name": job.id, "namespace": options.namespace, "manifest": str(Path(path).resolve())}


def describe(facts: dict[str, Any]) -> str:
    return f"RayJob in namespace {facts['namespace']}, manifest {facts['manifest']}"


def status(facts: dict[str, Any]) -> str:
    shown = _kubectl(*_job(facts, "get"), "--output", "jsonpath={.status.jobDeploymentStatus} {.status.jobStatus}")
    return shown.strip().lower() or "waiting for KubeRay"


def logs(facts: dict[str, Any], follow: bool) -> Iterator[str]:
    # KubeRay gives the Kubernetes job that submits the script, and prints its log, the name of the RayJob.
    flags = ["--follow"] if follow else []
    command = ["kubectl", "--namespace", facts["namespace"], "logs", f"job/{facts['name']}", *flags]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as shown:
            assert shown.stdout is not None
            yield from shown.stdout
    except FileNotFoundError:
        raise ConfigError("kubectl: is not installed here") from None
    if shown.returncode:
        raise ConfigError(f"kubectl logs: exit code {shown.returncode}; the job may not have started yet")


def stop(facts: dict[str, Any]) -> str:
    _kubectl(*_job(facts, "delete"), "--wait=false")
    return f"stopping; running trials have {GRACE_S} s to write a checkpoint"


def _job(facts: dict[str, Any], verb: str) -> list[str]:
    return ["--namespace", facts["namespace"], verb, "rayjob", facts["name"]]


def _kubectl(*words: str) -> str:
    try:
        done = subprocess.run(["kubectl", *words], capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError("kubectl: is not installed here") from None
    if done.returncode:
        raise ConfigError(f"kubectl: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout
