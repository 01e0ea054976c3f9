"""A real Slurm on this machine: jobs are submitted, signalled, requeued, stopped and cancelled.

The script and Ray, which takes seconds to start, are stand-ins; tests/faults has real sweeps under Slurm.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_here
from slurm_here import said, wait_until

from stadapter.cluster.submit.slurm import SlurmHandle
from stadapter.cluster.submit.submissions import load_all
from stadapter.commands.main import main

pytestmark = slurm_here.needed


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    with slurm_here.running():
        yield


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
    "-m stadapter.cluster.submit.ray_jobs"*) ;;
    *) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def job(slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SlurmHandle]:
    """Return a function that submits the stand-in of a script, with further flags for Slurm or the script."""
    checkout, tools = tmp_path / "checkout", tmp_path / "tools"
    checkout.mkdir()
    tools.mkdir()
    (checkout / "ablate.py").write_text(DRIVER)
    (tools / "python").write_text(PYTHON.format(python=sys.executable))
    (tools / "python").chmod(0o755)
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "First"]):
        subprocess.run(["git", "-c", "user.name=me", "-c", "user.email=me@here", *words], cwd=checkout, check=True)
    monkeypatch.chdir(checkout)

    def submit(*flags: str, script: tuple[str, ...] = ()) -> SlurmHandle:
        setup = ["--setup", f'export PATH="{tools}:$PATH"', "--cpus-per-node", "1", "--records", str(tmp_path / "kept")]
        words = ["--", "ablate.py", "--output", str(tmp_path / "a run"), *script]
        assert main(["submit", "slurm", *setup, *flags, *words]) == 0
        (found,) = load_all(tmp_path / "kept")
        assert isinstance(found.handle, SlurmHandle)
        return found.handle

    return submit


def command(verb: str, job: SlurmHandle, tmp_path: Path) -> None:
    assert main(["submit", verb, Path(job.folder).name, "--records", str(tmp_path / "kept")]) == 0


def test_a_job_told_by_slurm_goes_back_into_the_queue_and_finishes(
    job: Callable[..., SlurmHandle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a run"
    submitted = job()
    wait_until((output / "running").exists)
    # Slurm sends this signal `--grace` seconds before the time limit, and at a pre-emption with send_user_signal.
    said("scancel", "--batch", "--signal=USR1", submitted.job)
    wait_until(lambda: "requeued 1x" in submitted.status())
    slurm_here.wait_out_the_requeue(submitted.job)
    wait_until(lambda: submitted.status() == "finished")
    assert (output / "signals").read_text().split() == ["SIGUSR1"]
    assert len((output / "starts").read_text().split()) == 2
    capsys.readouterr()
    command("logs", submitted, tmp_path)
    shown = capsys.readouterr().out
    assert shown.index("back into the queue") < shown.index("all of it")  # one log of both starts


def test_stop_ends_a_job_gently_and_for_good(
    job: Callable[..., SlurmHandle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a run"
    submitted = job()
    wait_until((output / "running").exists)
    command("stop", submitted, tmp_path)
    wait_until(lambda: submitted.status() == "stopped; submit it again to continue")
    assert (output / "signals").read_text().split() == ["SIGUSR1"]
    command("stop", submitted, tmp_path)
    assert "has ended already" in capsys.readouterr().out


def test_a_cancelled_job_s_driver_is_told_once(job: Callable[..., SlurmHandle], tmp_path: Path) -> None:
    output = tmp_path / "a run"
    submitted = job()
    wait_until((output / "running").exists)
    said("scancel", submitted.job)
    wait_until(lambda: "stopped" in submitted.status())
    assert (output / "signals").read_text().split() == ["SIGTERM"]
    assert not list((output / "submissions").glob("*/private"))


def test_a_job_that_waits_is_cancelled_by_stop(
    job: Callable[..., SlurmHandle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said("scontrol", "update", "PartitionName=all", "State=DOWN")
    try:
        submitted = job()
        assert submitted.status().startswith("pending")
        command("stop", submitted, tmp_path)
    finally:
        said("scontrol", "update", "PartitionName=all", "State=UP")
    assert "cancelled" in capsys.readouterr().out
    assert "submit it again to continue" in submitted.status()


def test_a_script_that_fails_says_so(
    job: Callable[..., SlurmHandle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted = job(script=("--fail",))
    wait_until(lambda: submitted.status() == "failed with exit code 1; see its logs")
    capsys.readouterr()
    command("logs", submitted, tmp_path)
    assert "a driver's last words" in capsys.readouterr().out


def test_a_secret_reaches_the_job_and_no_file(
    job: Callable[..., SlurmHandle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = secrets.token_hex()
    monkeypatch.setenv("MY_TOKEN", secret)
    output = tmp_path / "a run"
    output.mkdir()
    (output / "checkpoint").touch()
    submitted = job("--secret-env", "MY_TOKEN")
    wait_until(lambda: submitted.status() == "finished")
    assert (output / "starts").read_text().split() == [secret]
    (output / "starts").unlink()
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (output / "submissions" / Path(submitted.folder).name / "job.sh") in kept
    assert not [path for path in kept if secret.encode() in path.read_bytes()]


def test_what_slurm_refuses_has_a_one_line_answer(
    job: Callable[..., SlurmHandle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["slurm", "--partition", "nowhere", "--", "ablate.py", "--output", str(tmp_path / "a run")]
    assert main(["submit", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: sbatch: ") and "invalid partition" in line
