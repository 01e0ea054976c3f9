"""Submitting a job: the artefact of each back end, the record that finds the job again, and a real Ray cluster."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stadapter.cluster.submit import job as jobs
from stadapter.cluster.submit import ray_dashboard, ray_jobs
from stadapter.cluster.submit.backend import Backend, Handle
from stadapter.cluster.submit.kubernetes import Kubernetes, KubernetesHandle
from stadapter.cluster.submit.ray_jobs import RayJobs, RayJobsHandle
from stadapter.cluster.submit.slurm import Slurm, SlurmHandle
from stadapter.cluster.submit.submissions import Submission, load, load_all
from stadapter.cluster.submit.submissions import submit as submit_job
from stadapter.commands.main import main
from stadapter.config import ConfigError
from stadapter.trials import record

SECRET = "s3cr3t-value"
BACKENDS = {
    "slurm": ["slurm"],
    "ray": ["ray"],
    "kubernetes": ["kubernetes", "--image", "me/mine:1", "--volume", "shared:/shared"],
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a git checkout with a script the current folder."""
    root = tmp_path / "my checkout"
    (root / "experiments").mkdir(parents=True)
    (root / "experiments" / "ablate.py").write_text("print('ran')\n")
    (root / ".gitignore").write_text("data/\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "First"]):
        subprocess.run(["git", "-c", "user.name=me", "-c", "user.email=me@here", *words], cwd=root, check=True)
    monkeypatch.chdir(root)
    return root


def dry_run(capsys: pytest.CaptureFixture[str], backend: str, *flags: str, script: tuple[str, ...] = ()) -> str:
    words = ["--", "experiments/ablate.py", *(script or ("--output", "/shared/runs"))]
    code = main(["submit", *BACKENDS[backend], *flags, "--dry-run", *words])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["submit", *arguments]) == 2
    shown = capsys.readouterr()
    assert not shown.out and len(shown.err.splitlines()) == 1 and shown.err.startswith("error: ")
    return shown.err


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_artefact_carries_commit_environment_and_paths(
    backend: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    shown = dry_run(capsys, backend, script=("--output", "/shared/runs", "--data-root", "/shared/ssv2"))
    assert commit in shown and "+changes" not in shown
    assert f"Python {sys.version.split()[0]}" in shown and "sha256" in shown
    assert "--output /shared/runs --data-root /shared/ssv2" in shown
    assert "sqlite:////shared/runs/mlflow.db" in shown  # the default store would vanish with the copy of the checkout


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dry_run_writes_nothing(backend: str, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(capsys, backend)
    assert not (checkout / "runs").exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_changes_without_a_commit_are_warned_about_and_recorded(
    backend: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "experiments" / "ablate.py").write_text("print('changed')\n")
    assert (
        main(["submit", *BACKENDS[backend], "--dry-run", "--", "experiments/ablate.py", "--output", "/shared/r"]) == 0
    )
    shown = capsys.readouterr()
    assert "has changes that are in no commit" in shown.err and "+changes" in shown.out


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_secret_travels_by_name_only(
    backend: str, checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    flags = ["--secret", "mine"] if backend == "kubernetes" else []
    shown = dry_run(capsys, backend, "--secret-env", "MY_TOKEN", *flags)
    assert "MY_TOKEN" in shown and SECRET not in shown


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flags", [["--env", f"MY_TOKEN={SECRET}"], ["--secret-env", f"MY_TOKEN={SECRET}"]])
def test_a_secret_s_value_is_refused_and_not_repeated(
    backend: str, flags: list[str], checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--", "experiments/ablate.py", "--output", "/shared/runs"]
    assert SECRET not in refusal(capsys, *BACKENDS[backend], *flags, *words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ray"], "no command"),
        (["ray", "--", "nowhere.py"], "no such script"),
        (["ray", "--", "experiments/ablate.py"], "--output: missing"),
        (["ray", "--", "experiments/ablate.py", "--output", "runs"], "--output runs: means nothing there"),
        (["ray", "--", "experiments/ablate.py", "--output=/r", "--weights=w.pt"], "--weights w.pt: means nothing"),
        (["ray", "--", "experiments/ablate.py", "--address", "auto"], "leave it out"),
        (["slurm", "--", "experiments/ablate.py", "--output"], "expected one argument"),
        (["slurm", "--", "experiments/ablate.py", "--tracking-uri", "http://me:secret@host"], "holds a password"),
        (["slurm", "--", "experiments/ablate.py", "--store=http://me:se@cret@host/x"], "holds a password"),
        (["slurm", "--env", "MLFLOW_TRACKING_URI=http://me:secret@host", "--", "experiments/ablate.py"], "a password"),
        (["slurm", "--setup", "export HF_TOKEN='secret'", "--", "experiments/ablate.py"], "looks like a secret"),
        (["slurm", "--nodes", "0", "--", "experiments/ablate.py"], "--nodes 0: must be at least 1"),
        (["slurm", "--partition", "a\n#SBATCH --uid=0", "--", "experiments/ablate.py"], "line break"),
        (["slurm", "--", "experiments/ablate.py", "--only", "a\nrm"], "line break"),
        (["ray", "--ray-address", "host:1", "--", "experiments/ablate.py", "--output", "/r"], "expected the dashboard"),
        (["kubernetes", "--image", "i", "--", "experiments/ablate.py", "--output", "/r"], "lies on no --volume"),
        (["status", "no-such-job"], "nothing of this name was submitted"),
        (["stop", "../records"], "nothing of this name was submitted"),
    ],
)
def test_bad_input_has_a_one_line_answer(
    arguments: list[str], message: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = refusal(capsys, *arguments)
    assert message in refused
    assert "secret@" not in refused and "'secret'" not in refused


def test_a_script_outside_git_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").touch()
    monkeypatch.chdir(tmp_path)
    assert "in no git checkout" in refusal(capsys, "slurm", "--", "own.py")


def test_the_sbatch_script_is_bash_and_keeps_every_word_whole(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty = 'it\'s $HOME `id` "x" @PYTHON@ ; #'
    shown = dry_run(capsys, "slurm", "--env", f"NOTE={nasty}", script=("--only", nasty, "--output", "/a b/100%"))
    assert subprocess.run(["bash", "-n"], input=shown, text=True, capture_output=True).returncode == 0
    assert re.search(r'^#SBATCH --output="/a b/100%%/submissions/ablate-.*/log.txt"$', shown, re.MULTILINE)
    (line,) = [line for line in shown.splitlines() if "experiments/ablate.py" in line and "driver" not in line]
    # The shell prints the words that the script would get.
    echo = line.strip().removesuffix("&").replace('"$python"', "printf '%s\\n'")
    words = subprocess.run(["bash", "-c", "address=1 port=2; " + echo], capture_output=True, text=True).stdout
    assert words.splitlines()[:5] == ["experiments/ablate.py", "--only", nasty, "--output", "/a b/100%"]
    (export,) = [line for line in shown.splitlines() if line.startswith("export NOTE")]
    assert (
        subprocess.run(["bash", "-c", export + '; printf %s "$NOTE"'], capture_output=True, text=True).stdout == nasty
    )


def test_slurm_s_relative_paths_become_absolute(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = dry_run(capsys, "slurm", script=("--data-root", "data"))
    assert f"--output '{checkout}/runs' --data-root '{checkout}/data'" in shown


def test_the_manifest_has_the_shape_of_a_rayjob(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--workers", "2", "--gpus-per-worker", "8", "--secret", "mine", "--secret-env", "HF_TOKEN"]
    manifest = yaml.safe_load(dry_run(capsys, "kubernetes", *flags, "--env", "NOTE=a: b\t# c".replace("\t", " ")))
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name := manifest["metadata"]["name"]) and len(name) <= 47
    assert all(isinstance(value, str) for value in manifest["metadata"]["annotations"].values())
    spec = manifest["spec"]
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 2
    for group in (cluster["headGroupSpec"], workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == "me/mine:1"
        assert {"name": "NOTE", "value": "a: b # c"} in container["env"]
        reference = {"secretKeyRef": {"name": "mine", "key": "HF_TOKEN"}}
        assert {"name": "HF_TOKEN", "valueFrom": reference} in container["env"]
        assert container["volumeMounts"][0]["name"] == group["template"]["spec"]["volumes"][0]["name"]
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"


@pytest.mark.parametrize("backend", [Slurm(nodes=2), RayJobs(), Kubernetes("me/mine:1", volume=("shared:/shared",))])
def test_python_makes_the_artefact_that_the_command_prints(
    backend: Backend, checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_new_id", lambda script: "ablate-1")
    words = ["experiments/ablate.py", "--output", "/shared/runs"]
    job = jobs.make_job(words, shared_paths=backend.shared_paths)
    flags = ["--nodes", "2"] if backend.name == "slurm" else []
    assert backend.artefact(job) + "\n" == dry_run(capsys, backend.name, *flags)


class Nowhere:
    """A back end for tests that takes any job and runs none."""

    name = "slurm"
    shared_paths = True

    def artefact(self, job: jobs.Job) -> str:
        return job.id

    def submit(self, job: jobs.Job, records: Path) -> Handle:
        return SlurmHandle("7", "/shared/runs/submissions/" + job.id)


def test_a_submission_is_found_again_by_its_record(checkout: Path, tmp_path: Path) -> None:
    job = jobs.make_job(["experiments/ablate.py"], ["NOTE=a"], ["HF_TOKEN"], shared_paths=True)
    done = submit_job(job, Nowhere(), tmp_path / "records")
    assert load(job.id, tmp_path / "records") == done and load_all(tmp_path / "records") == [done]


@pytest.mark.parametrize(
    ("backend", "facts", "handle"),
    [
        ("slurm", {"job": "12", "folder": "/shared/runs/x"}, SlurmHandle("12", "/shared/runs/x")),
        ("ray", {"address": "http://127.0.0.1:8265", "job": "x"}, RayJobsHandle("http://127.0.0.1:8265", "x")),
        (
            "kubernetes",
            {"name": "x", "namespace": "default", "manifest": "/home/me/x.yaml"},
            KubernetesHandle("x", "default", "/home/me/x.yaml"),
        ),
    ],
)
def test_a_record_written_before_records_had_a_type_loads_and_is_written_the_same(
    backend: str, facts: dict[str, str], handle: Handle, tmp_path: Path
) -> None:
    written = OLD_RECORD | {"backend": backend, "facts": facts}
    (tmp_path / "ablate-kernel-20261101-120000-0a1b.json").write_text(json.dumps(written))
    found = load("ablate-kernel-20261101-120000-0a1b", tmp_path)
    assert found.handle == handle and found.job.words[0] == "experiments/ablate_kernel.py"
    assert json.loads(json.dumps(found.to_json())) == written


OLD_RECORD = {
    "id": "ablate-kernel-20261101-120000-0a1b",
    "words": ["experiments/ablate_kernel.py", "--seeds", "3", "--output", "/shared/runs"],
    "output": "/shared/runs",
    "data_root": None,
    "code": {"root": "/home/me/stadapter", "commit": "0123456789abcdef", "dirty": False},
    "packages": {"python": "3.11.9", "prefix": "/home/me/venv", "installed": ["numpy==2.3.0", "ray==2.60.0"]},
    "env": [["NOTE", "a=b"]],
    "secret_env": ["HF_TOKEN"],
    "submitted": "2026-11-01T12:00:00+0000",
}


def misfits(value: Any, fields: Any, where: str = "") -> list[str]:
    """Return a line for each place where `value` deviates from the published definition."""
    if isinstance(fields, str):
        types = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list}
        allowed = tuple(types[word] for word in fields.split(" or "))
        return [] if isinstance(value, allowed) else [f"{where}: {value!r} is no {fields}"]
    if isinstance(fields, list):
        if not isinstance(value, list):
            return [f"{where}: is no array"]
        return [line for n, each in enumerate(value) for line in misfits(each, fields[0], f"{where}[{n}]")]
    if list(fields) == ["*"]:
        return [line for name, each in value.items() for line in misfits(each, fields["*"], f"{where}.{name}")]
    known = {name.rstrip("*"): below for name, below in fields.items()}
    found = [f"{where}.{name}: is missing" for name in fields if name.endswith("*") and name[:-1] not in value]
    for name, each in value.items():
        found += misfits(each, known[name], f"{where}.{name}") if name in known else [f"{where}.{name}: is unknown"]
    return found


def test_every_field_of_the_manifest_is_one_of_kuberay_s_definition(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--gpus-per-worker", "8", "--secret", "mine", "--secret-env", "HF_TOKEN", "--env", "NOTE=a"]
    manifest = yaml.safe_load(dry_run(capsys, "kubernetes", *flags, "--code", "https://host/{commit}.zip"))
    metadata = manifest.pop("metadata")
    assert set(metadata) == {"name", "namespace", "annotations"}
    fields = json.loads((Path(__file__).parent / "rayjob_fields.json").read_text())["rayjob"]
    assert misfits(manifest, fields) == []
    manifest["spec"]["backoffLimit"] = "10"
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["container"] = []
    del manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    assert len(misfits(manifest, fields)) == 3  # the check finds every misfit


def test_an_archive_is_of_the_commit_and_only_of_it(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = "https://host/archive/{commit}.zip"
    manifest = yaml.safe_load(dry_run(capsys, "kubernetes", "--code", archive))
    commit = manifest["metadata"]["annotations"]["stadapter/commit"]
    assert yaml.safe_load(manifest["spec"]["runtimeEnvYAML"])["working_dir"] == f"https://host/archive/{commit}.zip"
    (checkout / "new.py").touch()
    words = ["--code", archive, "--dry-run", "--", "experiments/ablate.py", "--output", "/shared/runs"]
    assert main(["submit", *BACKENDS["kubernetes"], *words]) == 2
    assert "commit and push them" in capsys.readouterr().err


def test_kubectl_gets_the_manifest_and_is_asked_by_name(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """kubectl is a stand-in: there is no Kubernetes cluster here."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "kubectl").write_text(f'#!/bin/sh\necho "$*" >> {tools}/said\necho Running RUNNING\n')
    (tools / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    words = ["--apply", "--", "experiments/ablate.py", "--output", "/shared/runs"]
    assert main(["submit", *BACKENDS["kubernetes"], *words]) == 0
    (saved,) = (checkout / "runs" / "submissions").glob("*.json")
    for verb in ("status", "logs", "stop"):
        assert main(["submit", verb, saved.stem]) == 0
    assert "running running" in capsys.readouterr().out
    created, asked, logs, deleted = (tools / "said").read_text().splitlines()
    assert created == f"create --filename runs/submissions/{saved.stem}.yaml"
    assert asked.startswith(f"--namespace default get rayjob {saved.stem} ")
    assert logs == f"--namespace default logs job/{saved.stem}"
    assert deleted == f"--namespace default delete rayjob {saved.stem} --wait=false"


def test_slurm_gets_the_script_and_is_asked_by_number(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's commands are stand-ins; tests/cluster/test_slurm.py has a real Slurm."""
    tools = tmp_path / "tools"
    tools.mkdir()
    answers = {"sbatch": "12;cluster", "squeue": "RUNNING |None |1 |", "scancel": ""}
    for name, answer in answers.items():
        (tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tools}/said\necho "{answer}"\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    assert main(["submit", "slurm", "--", "experiments/ablate.py"]) == 0
    found = submitted(checkout / "runs" / "submissions")
    assert isinstance(found.handle, SlurmHandle) and found.handle.job == "12"
    folder = Path(found.handle.folder)
    (folder / "log.txt").write_text("one line\n")
    for verb in ("status", "logs", "stop"):
        assert main(["submit", verb, found.job.id]) == 0
    shown = capsys.readouterr().out
    assert "running, requeued 1x" in shown and "one line" in shown and "stopping" in shown
    said = (tools / "said").read_text().splitlines()
    assert said[0] == f"sbatch --parsable {folder}/job.sh" and (folder / "code" / "experiments" / "ablate.py").exists()
    assert said[-1] == "scancel --batch --signal=USR2 12"
    (tools / "squeue").write_text("#!/bin/sh\n")  # the job has left the queue
    for code, state in (("0", "finished"), ("130", "stopped"), ("7", "failed with exit code 7")):
        (folder / "ended").write_text(code)
        assert found.handle.status().startswith(state)


def test_the_code_that_travels_is_what_git_would_commit(checkout: Path, tmp_path: Path) -> None:
    for name in ("new.py", "data/clip.mp4", "results/trial.json"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text(name)
    job = jobs.make_job(["experiments/ablate.py", "--output", "results"], [], [], shared_paths=True)
    jobs.copy_code(job, tmp_path / "copy")
    copied = {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert copied == {".gitignore", "experiments/ablate.py", "new.py"}


def test_an_output_that_holds_the_checkout_leaves_no_code_out(checkout: Path, tmp_path: Path) -> None:
    job = jobs.make_job(["experiments/ablate.py", "--output", str(checkout.parent)], [], [], shared_paths=True)
    jobs.copy_code(job, tmp_path / "copy")
    assert (tmp_path / "copy" / "experiments" / "ablate.py").exists()


def test_too_much_code_names_the_file(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_CODE_BYTES", 100)
    (checkout / "clip.mp4").write_bytes(bytes(200))
    job = jobs.make_job(["experiments/ablate.py"], [], [], shared_paths=True)
    with pytest.raises(ConfigError, match=r"clip\.mp4"):
        jobs.copy_code(job, tmp_path / "copy")


ROOT = Path(__file__).parents[2]


def submit(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stadapter", "submit", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | env,
    )  # fmt: skip


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for each in held:
        each.bind(("127.0.0.1", 0))
    return [each.getsockname()[1] for each in held]


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Yield the environment in which to talk to a new Ray cluster with token authentication."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "token").write_text(secrets.token_hex(32))
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_USAGE_STATS_ENABLED": "0"}
    scratch = f"/tmp/st-{os.getpid()}"  # short: it becomes part of a socket's name
    port, dashboard, client = free_ports(3)
    flags = [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", "--num-cpus=2"]
    flags += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0", f"--temp-dir={scratch}"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the cluster's python
    with (folder / "ray.txt").open("w") as log:
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *flags],
            stdout=log, stderr=log, env=os.environ | env | {"PATH": path}, start_new_session=True,
        )  # fmt: skip
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("RAY_AUTH_TOKEN_PATH", env["RAY_AUTH_TOKEN_PATH"])
            ray_jobs.wait_for_nodes(f"http://127.0.0.1:{dashboard}", 1, timeout_s=60)
        yield env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        head.terminate()
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)


def submitted(records: Path) -> Submission:
    (found,) = load_all(records)
    return found


def test_a_sweep_runs_as_a_ray_job(ray_cluster: dict[str, str], tiny_flags: list[str], tmp_path: Path) -> None:
    records, output = tmp_path / "records", tmp_path / "runs"
    sweep = ["--values", "3", "--seeds", "1", "--recipe", "embedded", "--tracking-uri", "none", *tiny_flags]
    words = ["--", "experiments/ablate_kernel.py", *sweep, "--output", output]
    done = submit("ray", "--records", records, *words, **ray_cluster)
    assert done.returncode == 0, done.stderr
    job = submitted(records).job
    logs = submit("logs", job.id, "--follow", "--records", records, **ray_cluster)
    assert "finished  kernel 3x3x3 seed 0" in logs.stdout, logs.stdout + logs.stderr
    assert submit("status", job.id, "--records", records, **ray_cluster).stdout.split()[-1] == "finished"
    (trial,) = (output / "trials").iterdir()
    result = record.read_result(trial)
    assert result is not None
    # It trained in a copy of the checkout, and the result names its commit.
    assert json.loads((trial / record.RESULT).read_text())["git_commit"] == job.code.commit
    token = Path(ray_cluster["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert token not in logs.stdout + done.stdout + (records / f"{job.id}.json").read_text()


def test_stop_lets_the_driver_of_a_ray_job_end_gently(
    ray_cluster: dict[str, str], checkout: Path, tmp_path: Path
) -> None:
    started, ended = tmp_path / "started", tmp_path / "ended"
    (checkout / "experiments" / "ablate.py").write_text(WAITS.format(started=str(started), ended=str(ended)))
    records = tmp_path / "records"
    arguments = ["ray", "--records", str(records), "--", "experiments/ablate.py", "--output", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patched:
        for name, value in ray_cluster.items():
            patched.setenv(name, value)
        assert main(["submit", *arguments]) == 0
        wait_until(started.exists)
        found = submitted(records)
        assert main(["submit", "stop", found.job.id, "--records", str(records)]) == 0
        wait_until(ended.exists)
        wait_until(lambda: found.handle.status().startswith("stopped"))


WAITS = """
import pathlib, signal, sys, time
def end(number, frame):
    time.sleep(3.5)  # longer than Ray's own patience
    pathlib.Path({ended!r}).touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
pathlib.Path({started!r}).touch()
time.sleep(60)
"""


def wait_until(holds: Any, timeout_s: float = 30) -> None:
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until, "in vain"
        time.sleep(0.1)


@pytest.mark.parametrize(("token", "message"), [("wrong", "the token is not this cluster's"), (None, "is missing")])
def test_a_token_that_is_wrong_or_missing_has_a_one_line_answer(
    token: str | None, message: str, ray_cluster: dict[str, str], checkout: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray_cluster["RAY_API_SERVER_ADDRESS"])
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray's own place for a token
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    assert message in refusal(capsys, "ray", "--", "experiments/ablate.py", "--output", "/shared/runs")


def test_an_address_where_nothing_answers_has_a_one_line_answer(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (port,) = free_ports(1)
    address = ["--ray-address", f"http://127.0.0.1:{port}"]
    assert "no Ray dashboard answers there" in refusal(
        capsys, "ray", *address, "--", "experiments/ablate.py", "--output", "/shared/runs"
    )


def test_a_dashboard_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_dashboard, "LIMIT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match="no Ray dashboard answers there") as refused:
            RayJobsHandle(address, "x").status()
    assert "\n" not in str(refused.value)


def test_a_job_is_looked_for_where_it_was_submitted_whatever_the_environment_names(
    ray_cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", ray_cluster["RAY_AUTH_TOKEN_PATH"])
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="does not know this job"):
        RayJobsHandle(ray_cluster["RAY_API_SERVER_ADDRESS"], "x").status()
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:9"


DRIVER = """
import pathlib, signal, sys, time
output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
told = []
signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
(output / "running").touch()
while not told:
    time.sleep(0.02)
time.sleep(0.5)  # a checkpoint
(output / "told").write_text(str(len(told)))
sys.exit(130)
"""

# Stand-ins: Ray's nodes are up at once, Slurm has one node, and a requeue leaves a file.
TOOLS = {
    "python": 'case "$*" in "-m ray.scripts.scripts start"*) exec sleep 60 ;; '
    '"-m stadapter.cluster.submit.ray_jobs"*) ;; *) exec {python} "$@" ;; esac',
    "scontrol": 'case "$1" in requeue) touch {tools}/requeued ;; *) echo here ;; esac',
}


@pytest.mark.parametrize(("asked", "requeued"), [(("USR1", "USR1"), True), (("USR1", "USR2"), False)])
def test_a_slurm_job_tells_its_driver_once_and_a_stop_after_slurm_s_warning_is_the_end(
    asked: tuple[str, ...], requeued: bool, checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test sends Slurm's signals; tests/cluster/test_slurm.py has a real Slurm."""
    tools, output = tmp_path / "tools", tmp_path / "runs"
    tools.mkdir()
    for name, line in TOOLS.items():
        (tools / name).write_text(f"#!/bin/bash\n{line.format(python=sys.executable, tools=tools)}\n")
        (tools / name).chmod(0o755)
    (checkout / "experiments" / "ablate.py").write_text(DRIVER)
    script = dry_run(
        capsys, "slurm", "--setup", f"export PATH='{tools}':$PATH", "--grace", "9", script=("--output", str(output))
    )
    (folder,) = re.findall(r"^folder='?(.*?)'?$", script, re.MULTILINE)
    shutil.copytree(checkout, Path(folder) / "code")
    env = os.environ | {"SLURM_JOB_ID": f"t{os.getpid()}", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here"}
    job = subprocess.Popen(
        ["bash", "-c", script], env=env | {"SLURM_CPUS_ON_NODE": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until((output / "running").exists)
    for number in asked:
        job.send_signal(getattr(signal, f"SIG{number}"))
        time.sleep(0.1)
    _, said = job.communicate(timeout=30)
    assert (output / "told").read_text() == "1", said
    assert (tools / "requeued").exists() is requeued
    assert job.returncode == 130 and (Path(folder) / "ended").exists() is not requeued
