"""Slurm itself, on this machine: sweeps are submitted, signalled, put back into the queue, stopped and cancelled.

Most tests have a stand-in for the script, and for Ray, which takes seconds to start; one runs a real sweep.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stadapter import record
from stadapter.ablation.__main__ import main
from stadapter.ablation.slurm import status

ROOT = Path(__file__).parent.parent
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "srun")
MISSING = [tool for tool in NEEDED if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (Debian: slurm-wlm and munge)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmctld and slurmd are started as root"),
]

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=1,bf_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Slurm cluster on loopback: two nodes of two CPUs, which are this machine."""
    folder = Path(f"/tmp/stadapter-slurm-{os.getpid()}")  # short: it holds sockets
    (folder / "state").mkdir(parents=True, mode=0o700)
    (folder / "spool").mkdir()
    held = [socket.socket() for _ in range(3)]
    for each in held:
        each.bind(("127.0.0.1", 0))
    controller, first, second = (each.getsockname()[1] for each in held)
    for each in held:
        each.close()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    configuration = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    configuration.write_text(
        CONFIGURATION.format(host=host, folder=folder, controller=controller, first=first, second=second)
    )
    sbin = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin", "SLURM_CONF": str(configuration)}
    places = {"key-file": key, "socket": folder / "munge.sock", "pid-file": folder / "munged.pid"}
    places |= {"log-file": folder / "munged.log", "seed-file": folder / "munged.seed"}
    daemons = [["munged", "--foreground", "--force", *(f"--{flag}={path}" for flag, path in places.items())]]
    daemons += [["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    started = []
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("SLURM_CONF", str(configuration))
            for command in daemons:
                started.append(
                    subprocess.Popen(command, env=sbin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                )
                if command[0] == "munged":
                    wait_until(places["socket"].exists)
            wait_until(lambda: said("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"])
            yield
            said("scancel", "--user=root")
            wait_until(lambda: not said("squeue", "-h"))
    finally:
        for daemon in reversed(started):
            daemon.terminate()
            daemon.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def wait_until(holds: Callable[[], Any], timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until, "in vain"
        time.sleep(0.1)


DRIVER = """
import os, pathlib, signal, sys, time
output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
with (output / "starts").open("a") as starts:
    print(os.environ.get("MY_TOKEN", "none"), file=starts)
def end(number, frame):
    with (output / "signals").open("a") as signals:
        print(signal.Signals(number).name, file=signals)
    output.joinpath("checkpoint").touch()
    time.sleep(0.5)
    sys.exit(130)
if "--fail" in sys.argv:
    sys.exit("a driver's last words")
if not (output / "checkpoint").exists():
    signal.signal(signal.SIGUSR1, end)
    signal.signal(signal.SIGTERM, end)
    output.joinpath("running").touch()
    time.sleep(60)
print("all of it")
"""

# `ray start --block` sleeps, and its nodes are up at once.
PYTHON = """#!/bin/bash
case "$*" in
    "-m ray.scripts.scripts start"*) exec sleep 60 ;;
    "-m stadapter.ablation.ray_jobs"*) ;;
    *) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def job(slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Submits the stand-in of a script, with more flags of Slurm's or the script's; returns what was written down."""
    checkout, tools = tmp_path / "checkout", tmp_path / "tools"
    checkout.mkdir()
    tools.mkdir()
    (checkout / "ablate.py").write_text(DRIVER)
    (tools / "python").write_text(PYTHON.format(python=sys.executable))
    (tools / "python").chmod(0o755)
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "First"]):
        subprocess.run(["git", "-c", "user.name=me", "-c", "user.email=me@here", *words], cwd=checkout, check=True)
    monkeypatch.chdir(checkout)

    def submit(*flags: str, script: tuple[str, ...] = ()) -> dict[str, Any]:
        setup = ["--setup", f'export PATH="{tools}:$PATH"', "--cpus-per-node", "1", "--records", str(tmp_path / "kept")]
        words = ["--", "ablate.py", "--output", str(tmp_path / "a run"), *script]
        assert main(["submit", "slurm", *setup, *flags, *words]) == 0
        (path,) = (tmp_path / "kept").glob("*.json")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    return submit


def command(verb: str, job: dict[str, Any], tmp_path: Path) -> None:
    assert main(["submit", verb, job["id"], "--records", str(tmp_path / "kept")]) == 0


def test_a_job_told_by_slurm_goes_back_into_the_queue_and_finishes(
    job: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a run"
    submitted = job()
    wait_until((output / "running").exists)
    # What Slurm itself does `--grace` seconds before the time limit, and at a pre-emption with send_user_signal.
    said("scancel", "--batch", "--signal=USR1", submitted["facts"]["job"])
    wait_until(lambda: "requeued 1x" in status(submitted["facts"]))
    wait_until(lambda: "pending" in status(submitted["facts"]))
    # A job that was put back waits for up to two minutes, for credentials to expire; this test does not.
    said("scontrol", "update", f"JobId={submitted['facts']['job']}", "StartTime=now")
    wait_until(lambda: status(submitted["facts"]) == "finished")
    assert (output / "signals").read_text().split() == ["SIGUSR1"]
    assert len((output / "starts").read_text().split()) == 2
    capsys.readouterr()
    command("logs", submitted, tmp_path)
    shown = capsys.readouterr().out
    assert shown.index("back into the queue") < shown.index("all of it")  # one log of both starts


def test_stop_ends_a_job_gently_and_for_good(
    job: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a run"
    submitted = job()
    wait_until((output / "running").exists)
    command("stop", submitted, tmp_path)
    wait_until(lambda: status(submitted["facts"]) == "stopped; submit it again to continue")
    assert (output / "signals").read_text().split() == ["SIGUSR1"]
    command("stop", submitted, tmp_path)
    assert "has ended already" in capsys.readouterr().out


def test_a_cancelled_job_s_driver_is_told_once(job: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    output = tmp_path / "a run"
    submitted = job()
    wait_until((output / "running").exists)
    said("scancel", submitted["facts"]["job"])
    wait_until(lambda: "stopped" in status(submitted["facts"]))
    assert (output / "signals").read_text().split() == ["SIGTERM"]
    assert not list((output / "submissions").glob("*/private"))


def test_a_job_that_waits_is_cancelled_by_stop(
    job: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said("scontrol", "update", "PartitionName=all", "State=DOWN")
    try:
        submitted = job()
        assert status(submitted["facts"]).startswith("pending")
        command("stop", submitted, tmp_path)
    finally:
        said("scontrol", "update", "PartitionName=all", "State=UP")
    assert "cancelled" in capsys.readouterr().out
    assert "submit it again to continue" in status(submitted["facts"])


def test_a_script_that_fails_says_so(
    job: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted = job(script=("--fail",))
    wait_until(lambda: status(submitted["facts"]) == "failed with exit code 1; see its logs")
    capsys.readouterr()
    command("logs", submitted, tmp_path)
    assert "a driver's last words" in capsys.readouterr().out


def test_a_secret_reaches_the_job_and_no_file(
    job: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = secrets.token_hex()
    monkeypatch.setenv("MY_TOKEN", secret)
    output = tmp_path / "a run"
    output.mkdir()
    (output / "checkpoint").touch()
    submitted = job("--secret-env", "MY_TOKEN")
    wait_until(lambda: status(submitted["facts"]) == "finished")
    assert (output / "starts").read_text().split() == [secret]
    (output / "starts").unlink()
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (output / "submissions" / submitted["id"] / "job.sh") in kept
    assert not [path for path in kept if secret.encode() in path.read_bytes()]


def test_what_slurm_refuses_has_a_one_line_answer(
    job: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["slurm", "--partition", "nowhere", "--", "ablate.py", "--output", str(tmp_path / "a run")]
    assert main(["submit", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: sbatch: ") and "invalid partition" in line


def test_a_sweep_runs_on_two_nodes(slurm: None, tiny_flags: list[str], tmp_path: Path) -> None:
    sweep = ["--values", "3", "--seeds", "1", "--recipe", "embedded", "--tracking-uri", "none", "--num-gpus", "0"]
    words = ["experiments/ablate_kernel.py", *sweep, *tiny_flags, "--output", str(tmp_path / "runs")]
    submit = [sys.executable, "-m", "stadapter.ablation", "submit"]
    where = ["--records", str(tmp_path / "kept")]
    nodes = ["slurm", "--nodes", "2", "--cpus-per-node", "1"]
    done = subprocess.run([*submit, *nodes, *where, "--", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "kept").glob("*.json")
    submitted = json.loads(path.read_text())
    wait_until(lambda: status(submitted["facts"]).startswith(("finished", "failed", "ended")), timeout_s=120)
    folder = Path(submitted["facts"]["folder"])
    log = (folder / "log.txt").read_text()
    assert status(submitted["facts"]) == "finished", log + (folder / "ray.txt").read_text()
    assert "finished  kernel 3x3x3 seed 0" in log
    (trial,) = (tmp_path / "runs" / "trials").iterdir()
    assert record.read_result(trial) is not None
    assert not (folder / "private").exists()  # the token went with the job
    assert not Path(f"/tmp/stadapter-{submitted['facts']['job']}-0").exists()
