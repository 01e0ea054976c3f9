"""Kubernetes: the manifest of a RayJob, which KubeRay runs on a Ray cluster that it starts for it.

The cluster has token authentication and is taken away after the job. A job that ends early (a node was lost, a pod
evicted) is started again and continues. The image holds Ray, the packages and, unless `code` is the address of an
archive, the code.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import yaml

from stadapter.cluster.submit.job import COMMIT, Job, check_printable
from stadapter.config import ConfigError
from stadapter.data.lists.storage import is_remote
from stadapter.trials import files

GRACE_S = 120
KEPT_S = 3600  # a job that has ended, so that its logs can be read


class _Plain(yaml.SafeDumper):
    """A YAML dumper that writes a value that occurs twice twice, instead of a reference to its first place."""

    def ignore_aliases(self, data: object) -> bool:
        return True


@dataclass(frozen=True)
class Kubernetes:
    """A Kubernetes cluster with KubeRay, and what a job takes of it."""

    name: ClassVar[str] = "kubernetes"
    shared_paths: ClassVar[bool] = False

    image: str  # with Ray, the packages and the code
    code: str = "/app"  # a folder of the image, or the address of a .zip in which {commit} stands for the commit
    workers: int = 1  # pods that train
    gpus_per_worker: int = 0
    cpus_per_worker: int = 8
    memory_per_worker: str = "32Gi"
    volume: tuple[str, ...] = ()  # CLAIM:/MOUNT, persistent volume claims that every pod mounts
    secret: str | None = None  # the Kubernetes secret that holds the job's secret variables
    namespace: str = "default"
    retries: int = 10  # a job that ended early is started again so often
    apply: bool = False  # hand the manifest to kubectl, instead of only writing it

    def artefact(self, job: Job) -> str:
        """Return the manifest."""
        self._check(job)
        _, command = _code(job, self.code)
        manifest = {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {
                "name": job.id,
                "namespace": self.namespace,
                "annotations": {f"stadapter/{name}": fact for name, fact in job.described().items()},
            },
            "spec": {
                "entrypoint": command,
                "runtimeEnvYAML": yaml.safe_dump(self._runtime_env(job)),
                "backoffLimit": self.retries,
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": KEPT_S,
                "rayClusterSpec": self._cluster(job),
            },
        }
        return yaml.dump(manifest, Dumper=_Plain, sort_keys=False, width=1000)

    def submit(self, job: Job, records: Path) -> KubernetesHandle:
        """Write the manifest to `records`, and with `apply` hand it to kubectl."""
        manifest, path = self.artefact(job), records / f"{job.id}.yaml"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(path, manifest.encode())
        except OSError as error:
            raise ConfigError(f"--records {records}: cannot be written ({error.strerror})") from None
        if self.apply:
            _kubectl("create", "--filename", str(path))
        return KubernetesHandle(job.id, self.namespace, str(path.resolve()))

    def _check(self, job: Job) -> None:
        least = {"workers": (self.workers, 1), "gpus-per-worker": (self.gpus_per_worker, 0)}
        least |= {"cpus-per-worker": (self.cpus_per_worker, 1), "retries": (self.retries, 0)}
        for flag, (value, smallest) in least.items():
            if value < smallest:
                raise ConfigError(f"--{flag} {value}: must be at least {smallest}")
        if job.secret_env and not self.secret:
            raise ConfigError(
                f"--secret-env {job.secret_env[0]}: name the Kubernetes secret that holds it with --secret"
            )
        mounts = [mount for _, mount in self._volumes()]
        for flag, path in (("--output", job.output), ("--data-root", job.data_root)):
            if path and not is_remote(path) and not any(PurePosixPath(path).is_relative_to(mount) for mount in mounts):
                raise ConfigError(f"{flag} {path}: lies on no --volume, and would be gone, or missing, with its pod")

    def _volumes(self) -> list[tuple[str, str]]:
        return [_volume(text) for text in self.volume]

    def _runtime_env(self, job: Job) -> dict[str, Any]:
        runtime_env: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S)}}
        if is_remote(self.code):
            runtime_env["working_dir"] = self.code.replace("{commit}", job.code.commit)
        return runtime_env

    def _cluster(self, job: Job) -> dict[str, Any]:
        """Return the Ray cluster: a head with Ray and the driver alone, and workers that train.

        The head gives Ray no CPUs for trials: an evicted trial is tried again, an evicted head starts the whole job
        again.
        """
        workers = {
            "groupName": "workers",
            "replicas": self.workers,
            "minReplicas": self.workers,
            "maxReplicas": self.workers,
            "rayStartParams": {},
            "template": self._pod(
                job, "ray-worker", self.cpus_per_worker, self.memory_per_worker, self.gpus_per_worker
            ),
        }
        return {
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0"},
                "template": self._pod(job, "ray-head", 2, "8Gi", 0),
            },
            "workerGroupSpecs": [workers],
        }

    def _pod(self, job: Job, name: str, cpus: int, memory: str, gpus: int) -> dict[str, Any]:
        volumes = list(enumerate(self._volumes()))
        amounts: dict[str, Any] = {"cpu": str(cpus), "memory": memory} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
        container = {
            "name": name,
            "image": check_printable("--image", self.image),
            "env": self._variables(job),
            "volumeMounts": [{"name": f"volume-{number}", "mountPath": mount} for number, (_, mount) in volumes],
            "resources": {"requests": amounts, "limits": amounts},
        }
        return {
            "spec": {
                "terminationGracePeriodSeconds": GRACE_S,
                "containers": [container],
                "volumes": [
                    {"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}}
                    for number, (claim, _) in volumes
                ],
            }
        }

    def _variables(self, job: Job) -> list[dict[str, Any]]:
        """Return the environment of a container: values, and references to keys of the secret."""
        commit, _ = _code(job, self.code)
        plain = commit | {"PYTHONUNBUFFERED": "1"} | dict(job.env)
        return [
            *({"name": name, "value": value} for name, value in plain.items()),
            *(
                {"name": name, "valueFrom": {"secretKeyRef": {"name": self.secret, "key": name}}}
                for name in job.secret_env
            ),
        ]


@dataclass(frozen=True)
class KubernetesHandle:
    """A RayJob: its name and namespace, and the file of its manifest."""

    name: str
    namespace: str
    manifest: str

    def describe(self) -> str:
        return f"RayJob in namespace {self.namespace}, manifest {self.manifest}"

    def status(self) -> str:
        shown = _kubectl(*self._words("get"), "--output", "jsonpath={.status.jobDeploymentStatus} {.status.jobStatus}")
        return shown.strip().lower() or "waiting for KubeRay"

    def logs(self, follow: bool) -> Iterator[str]:
        """Yield the log of the Kubernetes job that submits the command; KubeRay gives it the name of the RayJob."""
        flags = ["--follow"] if follow else []
        command = ["kubectl", "--namespace", self.namespace, "logs", f"job/{self.name}", *flags]
        try:
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as shown:
                assert shown.stdout is not None
                yield from shown.stdout
        except FileNotFoundError:
            raise ConfigError("kubectl: is not installed here") from None
        if shown.returncode:
            raise ConfigError(f"kubectl logs: exit code {shown.returncode}; the job may not have started yet")

    def stop(self) -> str:
        _kubectl(*self._words("delete"), "--wait=false")
        return f"stopping; running trials have {GRACE_S} s to write a checkpoint"

    def _words(self, verb: str) -> list[str]:
        return ["--namespace", self.namespace, verb, "rayjob", self.name]


def _volume(text: str) -> tuple[str, str]:
    """Return the claim and the mount of CLAIM:/MOUNT."""
    claim, separator, mount = check_printable("--volume", text).partition(":")
    if not claim or not separator or not mount.startswith("/"):
        raise ConfigError(f"--volume {text}: expected CLAIM:/MOUNT, such as shared:/shared")
    return claim, mount


def _code(job: Job, code: str) -> tuple[dict[str, str], str]:
    """Return the environment variable of the commit, if it is known, and the command line that runs the code."""
    command = f"exec python {shlex.join(job.words)} --address auto"
    path = 'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"'
    if not is_remote(code):
        # The image may hold any code: no commit is claimed for it.
        return {}, shlex.join(
            ["bash", "-c", f"cd {shlex.quote(check_printable('--code', code))} && {path} && {command}"]
        )
    if "{commit}" not in code:
        raise ConfigError(f"--code {code}: holds no {{commit}}, so it would not be known which code runs")
    if job.code.dirty:
        raise ConfigError(f"--code {code}: {job.code.root} has changes that are in no commit; commit and push them")
    return {COMMIT: job.code.commit}, shlex.join(["bash", "-c", f"{path} && {command}"])


def _kubectl(*words: str) -> str:
    """Run kubectl and return its output. Raises ConfigError with the reason if it fails."""
    try:
        done = subprocess.run(["kubectl", *words], capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError("kubectl: is not installed here") from None
    if done.returncode:
        raise ConfigError(f"kubectl: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout
