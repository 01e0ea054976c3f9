"""A real Slurm on this machine, over loopback, as two nodes of two CPUs."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "srun")
MISSING = [tool for tool in NEEDED if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") is None]
_WHY = f"not installed: {', '.join(MISSING)} (Debian: slurm-wlm and munge)" if MISSING else "its daemons start as root"
needed = pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=_WHY)

CREDENTIALS_S = 5
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthInfo=socket={folder}/munge.sock,cred_expire={credentials}
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


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Run Slurm inside a context, in which its commands find it."""
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
        CONFIGURATION.format(
            credentials=CREDENTIALS_S, host=host, folder=folder, controller=controller, first=first, second=second
        )
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
    """Return the standard output of a command, whether or not it succeeds."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def wait_until(holds: Callable[[], Any], timeout_s: float = 60) -> None:
    """Wait until `holds()` is true. Fails the test after `timeout_s`."""
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until, "in vain"
        time.sleep(0.1)


def wait_out_the_requeue(job: str) -> None:
    """Let a requeued job start: Slurm holds it for up to two minutes, until the credentials of its first start expire.

    Here they expire after 5 s.
    """
    time.sleep(CREDENTIALS_S + 1)
    said("scontrol", "update", f"JobId={job}", "StartTime=now")
