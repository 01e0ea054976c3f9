"""Real faults injected into a running sweep: every trial ends once, with the numbers of an undisturbed sweep.

`make faults` injects all of them and prints the matrix; `make test` injects some. The sweep has two trials, mostly one
after the other, and the fault comes in the middle of the second: the first must not be run again.

A fault's row: seconds until the next training step, counted from the fault, or from the next launch if one is needed;
trials that have no result in the end; finished trials that were trained again; steps that were trained twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
import pytest
import slurm_here
from matrix import MATRIX
from safetensors.torch import load_file

from stadapter.cluster.submit.slurm import SlurmHandle
from stadapter.cluster.submit.submissions import load_all
from stadapter.trials import record

HERE = Path(__file__).parent
STEPS = 16  # of each trial
TRIALS = 2
LAUNCH_TIMEOUT_S = 150.0


@dataclass(frozen=True)
class Step:
    """One forward pass of a training step."""

    extent: int  # the trial's kernel
    rank: int
    pid: int
    time: float


@dataclass
class Sweep:
    """The sweep of traced.py in a new folder."""

    folder: Path
    flags: list[str]
    output: Path
    logs: list[Path] = field(default_factory=list)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def command(self, *more: str) -> list[str]:
        return [sys.executable, str(HERE / "traced.py"), "--output", str(self.output), *self.flags, *more]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "TRACE": str(self.folder / "trace"), "PYTHONUNBUFFERED": "1"}

    def begin(self, *more: str) -> subprocess.Popen[bytes]:
        log = self.folder / f"launch{len(self.logs)}.log"
        self.logs.append(log)
        with log.open("w") as file:  # a new session, all of which a terminal's Ctrl-C reaches
            process = subprocess.Popen(
                self.command(*more), stdout=file, stderr=file, env=self.environment(), start_new_session=True
            )
        self.running.append(process)
        return process

    def said(self) -> str:
        return self.logs[-1].read_text() if self.logs and self.logs[-1].exists() else ""

    def steps(self) -> list[Step]:
        trace = self.folder / "trace"
        lines = [line.split() for line in trace.read_text().splitlines()] if trace.exists() else []
        return [Step(int(extent), int(rank), int(pid), float(at)) for extent, rank, pid, at in lines]

    def wait_for_step(self, number: int) -> list[Step]:
        """Wait until rank 0 has begun the given number of steps, and return the steps."""
        wait_until(lambda: sum(step.rank == 0 for step in self.steps()) >= number, self)
        return self.steps()

    def wait_for_the_middle_of_the_second(self) -> list[Step]:
        return self.wait_for_step(STEPS + 6)

    def end(self, process: subprocess.Popen[bytes], code: int = 0) -> None:
        process.wait(LAUNCH_TIMEOUT_S)
        assert process.returncode == code, self.said()

    def finished(self) -> dict[str, Path]:
        return {path.parent.name: path.parent for path in self.output.glob("trials/*/result.json")}


def wait_until(holds: Callable[[], object], sweep: Sweep | None = None, timeout_s: float = LAUNCH_TIMEOUT_S) -> None:
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until, "in vain\n" + (sweep.said() if sweep else "")
        time.sleep(0.02)


@pytest.fixture(scope="session")
def flags(tiny_flags: list[str]) -> list[str]:
    alone = ["--num-gpus", "0", "--cpus-per-process", "2", "--seeds", "1", "--checkpoint-every", "0.3"]
    return ["--recipe", "embedded", *tiny_flags, "--set", "adapter.blocks=5", "--set", "optim.epochs=4", *alone]


@contextlib.contextmanager
def sweep_in(folder: Path, flags: list[str], output: Path | None = None, store: str = "none") -> Iterator[Sweep]:
    sweep = Sweep(folder, [*flags, "--tracking-uri", store], output or folder / "runs")
    try:
        yield sweep
    finally:
        for process in sweep.running:
            if process.poll() is None:
                kill_all(process)


@pytest.fixture
def sweep(flags: list[str], tmp_path: Path) -> Iterator[Sweep]:
    with sweep_in(tmp_path, flags) as made:
        yield made


@pytest.fixture(scope="session")
def undisturbed(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    with sweep_in(tmp_path_factory.mktemp("undisturbed"), flags) as sweep:
        process = sweep.begin()
        sweep.wait_for_step(1)
        listening = addresses_of(descendants(process.pid))
        sweep.end(process)
    # Nothing that a sweep starts can be reached from another machine: 127.0.0.1, and the same in IPv6's clothes.
    assert listening == {"0100007F", "0000000000000000FFFF00000100007F"}
    assert len(sweep.steps()) == TRIALS * STEPS
    return sweep


def addresses_of(pids: set[int]) -> set[str]:
    """Return the addresses at which these processes listen, as /proc/net writes them."""
    links = set()
    for path in (path for pid in pids for path in Path(f"/proc/{pid}/fd").glob("*")):
        with contextlib.suppress(OSError):  # closed meanwhile
            links.add(os.readlink(path))
    sockets = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    rows = [line.split() for file in ("tcp", "tcp6") for line in Path("/proc/net", file).read_text().splitlines()[1:]]
    return {row[1].rpartition(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets}


def descendants(pid: int) -> set[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def kill_tree(root: int) -> None:
    for pid in descendants(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill every process of the sweep, as when the machine goes down."""
    kill_tree(process.pid)
    process.wait()


def ended(folder: Path) -> float:
    return (folder / record.RESULT).stat().st_mtime


def of(folder: Path, steps: list[Step]) -> list[Step]:
    result = record.read_result(folder)
    assert result is not None
    return [step for step in steps if step.extent == result.recipe["adapter.kernel_size"][0]]


def conclude(
    fault: str,
    how: str,
    sweep: Sweep,
    undisturbed: Sweep,
    since: float | None,
    *,
    exact: bool = True,
    hit: int | None = None,
) -> None:
    """Check that every trial has the result of an undisturbed sweep, and add a row to the matrix. `hit`: its trial."""
    finished, expected = sweep.finished(), undisturbed.finished()
    lost = len(expected.keys() - finished.keys())
    steps = [step for step in sweep.steps() if step.rank == 0]
    recovered = "-"  # nothing stood still
    if since is not None:
        later = (step.time for step in steps if step.time > since and hit in (None, step.extent))
        recovered = f"{min(later) - since:.1f}"
    repeated = [folder for folder in finished.values() if any(step.time > ended(folder) for step in of(folder, steps))]
    again = len(steps) - TRIALS * STEPS
    MATRIX.append((fault, how, recovered, str(lost), str(len(repeated)), str(again)))
    assert finished.keys() == expected.keys() and not repeated
    for trial, folder in finished.items():
        mine, reference = record.read_result(folder), record.read_result(expected[trial])
        assert mine is not None and reference is not None
        assert mine.metrics["top1"] == reference.metrics["top1"]
        if exact:
            assert mine.metrics == reference.metrics
            tensors = [load_file(each / record.TRAINED) for each in (folder, expected[trial])]
            assert all(tensors[0][name].equal(tensor) for name, tensor in tensors[1].items())


# --- processes


def test_a_trial_that_is_killed_is_tried_again_by_the_same_launch(sweep: Sweep, undisturbed: Sweep) -> None:
    process = sweep.begin()
    pid = sweep.wait_for_the_middle_of_the_second()[-1].pid
    since = time.time()
    os.kill(pid, signal.SIGKILL)
    sweep.end(process)
    conclude("a trial dies", "kill -9 of its process", sweep, undisturbed, since)


@pytest.mark.long
def test_a_worker_that_is_killed_costs_its_trial_no_epoch(sweep: Sweep, undisturbed: Sweep) -> None:
    process = sweep.begin("--processes-per-trial", "2", "--cpus-per-process", "1")
    steps = sweep.wait_for_the_middle_of_the_second()
    since = time.time()
    os.kill(next(step.pid for step in reversed(steps) if step.rank == 1), signal.SIGKILL)
    sweep.end(process)
    # Two processes add in another order than one: equal accuracies, not equal bits.
    conclude("a worker dies", "kill -9 of one of a trial's two", sweep, undisturbed, since, exact=False)


@pytest.mark.long
def test_a_driver_that_is_killed_is_launched_again(sweep: Sweep, undisturbed: Sweep) -> None:
    process = sweep.begin()
    sweep.wait_for_the_middle_of_the_second()
    process.kill()
    process.wait()
    since = time.time()
    sweep.end(sweep.begin())
    conclude("the driver dies", "kill -9 of the command", sweep, undisturbed, since)


def test_after_everything_was_killed_the_next_launch_goes_on(sweep: Sweep, undisturbed: Sweep) -> None:
    process = sweep.begin()
    sweep.wait_for_the_middle_of_the_second()
    kill_all(process)
    since = time.time()
    sweep.end(sweep.begin())
    conclude("the machine goes down", "kill -9 of every process", sweep, undisturbed, since)


@pytest.mark.parametrize(
    ("fault", "how", "number", "everyone"),
    [
        pytest.param("Ctrl-C", "SIGINT to the terminal's processes", signal.SIGINT, True, marks=pytest.mark.long),
        pytest.param("SIGTERM", "to the command", signal.SIGTERM, False, marks=pytest.mark.long),
        pytest.param("SIGUSR1", "to the command", signal.SIGUSR1, False, marks=pytest.mark.long),
    ],
)
def test_a_signal_lets_the_trials_write_a_checkpoint(
    fault: str, how: str, number: int, everyone: bool, sweep: Sweep, undisturbed: Sweep
) -> None:
    process = sweep.begin()
    sweep.wait_for_the_middle_of_the_second()
    (os.killpg if everyone else os.kill)(process.pid, number)
    sweep.end(process, 130)
    assert "This continues them from their checkpoints:" in sweep.said()
    since = time.time()
    sweep.end(sweep.begin())
    conclude(fault, how, sweep, undisturbed, since)
    assert sum(step.rank == 0 for step in sweep.steps()) == TRIALS * STEPS  # not one step twice


@pytest.mark.long
def test_two_launches_at_once_share_the_trials(sweep: Sweep, undisturbed: Sweep) -> None:
    both = [sweep.begin(), sweep.begin()]
    for process in both:
        sweep.end(process)
    conclude("two launches at once", "the command, started twice", sweep, undisturbed, None)
    assert len(sweep.steps()) == TRIALS * STEPS


# --- disks


@pytest.mark.long
def test_a_checkpoint_that_was_cut_short_is_set_aside(sweep: Sweep, undisturbed: Sweep) -> None:
    process = sweep.begin()
    sweep.wait_for_the_middle_of_the_second()
    kill_all(process)
    (checkpoint,) = (
        path for path in sweep.output.glob("trials/*/checkpoint.pt") if path.parent.name not in sweep.finished()
    )
    os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    since = time.time()
    sweep.end(sweep.begin())
    assert "a damaged checkpoint was set aside" in sweep.said()
    conclude("a checkpoint is cut short", "truncated to half, after kill -9", sweep, undisturbed, since)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a new file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here ({mounted.stderr.strip()})")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.long
def test_a_disk_that_fills_up_ends_the_launch_in_one_line(
    disk: Path, flags: list[str], undisturbed: Sweep, tmp_path: Path
) -> None:
    with sweep_in(tmp_path, flags, disk / "runs") as sweep:
        process = sweep.begin()
        sweep.wait_for_the_middle_of_the_second()
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 10))
        process.wait(LAUNCH_TIMEOUT_S)
        assert process.returncode != 0 and "cannot be written (No space left on device" in sweep.said()
        assert "Traceback" not in sweep.said()
        (disk / "filler").unlink()
        since = time.time()
        sweep.end(sweep.begin())
        conclude("the disk is full", "a file system of 8 MiB, filled", sweep, undisturbed, since)


@pytest.mark.long
def test_a_disk_that_becomes_read_only_ends_the_launch_in_one_line(
    disk: Path, flags: list[str], undisturbed: Sweep, tmp_path: Path
) -> None:
    def mount(*words: str | Path) -> None:
        subprocess.run(["mount", *words], check=True)

    with sweep_in(tmp_path, flags, disk / "runs") as sweep:
        process = sweep.begin()
        sweep.wait_for_the_middle_of_the_second()
        # The same files mounted over themselves: a mount with files that are open for writing cannot become read-only.
        mount("--bind", disk, disk)
        mount("-o", "remount,ro,bind", disk)
        process.wait(LAUNCH_TIMEOUT_S)
        assert process.returncode != 0 and "cannot be written (Read-only file system" in sweep.said()
        assert "Traceback" not in sweep.said()
        subprocess.run(["umount", disk], check=True)
        since = time.time()
        sweep.end(sweep.begin())
        conclude("the disk is read-only", "mounted read-only in the middle", sweep, undisturbed, since)


# --- MLflow


@dataclass
class Server:
    """A real MLflow server on a free port."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = ["server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        store = f"sqlite:///{self.folder}/server.db"
        with (self.folder / "server.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *words, "--backend-store-uri", store],
                stdout=log, stderr=log, cwd=self.folder, start_new_session=True,
            )  # fmt: skip
        wait_until(self._answers)

    def _answers(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"{self.address}/health", timeout=5).read())
        except OSError:
            return False

    def signal(self, number: int) -> None:
        assert self.process is not None
        for pid in descendants(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path, free_port())
    yield made
    if made.process is not None:
        kill_all(made.process)


def assert_in_step(server: Server, output: Path) -> None:
    """Check that after `sync` the store holds each trial once, finished, with every epoch once."""
    words = ["-m", "stadapter", "sync", "--output", str(output), "--tracking-uri", server.address]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=LAUNCH_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    client = mlflow.MlflowClient(server.address)
    experiment = client.get_experiment_by_name("stadapter")
    assert experiment is not None
    trials = [run for run in client.search_runs([experiment.experiment_id]) if "trial_id" in run.data.tags]
    assert len({run.data.tags["trial_id"] for run in trials}) == len(trials) == TRIALS
    for run in trials:
        assert run.info.status == "FINISHED"
        assert [point.step for point in client.get_metric_history(run.info.run_id, "train_loss")] == [1, 2, 3, 4]


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "how"),
    [
        ("MLflow is away from the start", "nothing listens"),
        ("MLflow dies in the middle", "kill -9 of the server"),
        ("MLflow hangs in the middle", "the server is suspended"),
    ],
)
def test_an_mlflow_server_that_is_away_costs_nothing_and_is_brought_up_to_date(
    fault: str, how: str, server: Server, flags: list[str], undisturbed: Sweep, tmp_path: Path
) -> None:
    with sweep_in(tmp_path, flags, store=server.address) as sweep:
        middle = "middle" in fault
        if middle:
            server.start()
        process = sweep.begin()
        if middle:
            sweep.wait_for_the_middle_of_the_second()
            server.signal(signal.SIGSTOP if "hangs" in fault else signal.SIGKILL)
        sweep.end(process)
        assert sweep.said().count("warning") == 1
        conclude(fault, how, sweep, undisturbed, None)
        if "hangs" in fault:
            server.signal(signal.SIGCONT)
        else:
            server.start()
        assert_in_step(server, sweep.output)


# --- several machines


@dataclass(frozen=True)
class Nodes:
    """A Ray cluster on this machine: a head that trains nothing, and two nodes, each with separate processes."""

    address: str
    raylets: list[int]

    def home_of(self, pid: int) -> int:
        """Return the raylet of the node on which a process runs."""
        (raylet,) = (raylet for raylet in self.raylets if pid in descendants(raylet))
        return raylet


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    (tmp_path / "token").write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    # The trials get their node's environment.
    environment = {**os.environ, "TRACE": str(tmp_path / "trace"), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    cluster = subprocess.Popen(
        [sys.executable, str(HERE / "nodes.py"), str(free_port())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    assert cluster.stdin is not None and cluster.stdout is not None
    try:
        yield Nodes(**json.loads(cluster.stdout.readline()))
    finally:
        cluster.stdin.close()
        cluster.wait(30)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.long
def test_a_trial_of_two_processes_that_dies_beside_another_ray_gives_its_cpus_back(
    nodes: Nodes, sweep: Sweep, undisturbed: Sweep
) -> None:
    process = sweep.begin("--processes-per-trial", "2", "--cpus-per-process", "1")
    sweep.wait_for_the_middle_of_the_second()
    since = time.time()
    for pid in descendants(process.pid):
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::ImplicitFunc"):  # starts the two, and waits
            os.kill(pid, signal.SIGKILL)
    sweep.end(process)
    conclude("a trial of two processes dies", "kill -9 of what starts them", sweep, undisturbed, since, exact=False)


def test_a_node_that_dies_takes_no_trial_with_it(nodes: Nodes, sweep: Sweep, undisturbed: Sweep) -> None:
    process = sweep.begin("--address", nodes.address)
    last = sweep.wait_for_the_middle_of_the_second()[-1]
    since = time.time()
    kill_tree(nodes.home_of(last.pid))
    sweep.end(process)
    conclude("a node dies", "kill -9 of its Ray and its trial", sweep, undisturbed, since, hit=last.extent)


@pytest.mark.long
def test_one_trial_over_two_nodes_gives_the_numbers_of_one_process(
    nodes: Nodes, sweep: Sweep, undisturbed: Sweep
) -> None:
    process = sweep.begin("--address", nodes.address, "--processes-per-trial", "2", "--only", "kernel 3")
    wait_until(lambda: {step.rank for step in sweep.steps()} == {0, 1}, sweep)
    pids = {step.rank: step.pid for step in sweep.steps()}
    assert nodes.home_of(pids[0]) != nodes.home_of(pids[1])
    sweep.end(process)
    ((trial, folder),) = sweep.finished().items()
    both = folder, undisturbed.finished()[trial]
    two, one = (record.read_result(each) for each in both)
    assert two is not None and one is not None
    assert (two.processes, one.processes) == (2, 1)
    assert two.metrics["top1"] == one.metrics["top1"]
    losses = [[line["train_loss"] for line in record.read_metrics(each)] for each in both]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- Slurm


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    with slurm_here.running():
        yield


@dataclass
class SlurmJob:
    """The sweep, submitted to Slurm on this machine."""

    sweep: Sweep

    nodes: int

    def submit(self) -> SlurmHandle:
        jobs = self.sweep.folder / "jobs"
        words = ["submit", "slurm", "--nodes", str(self.nodes), "--cpus-per-node", "2", "--records", str(jobs)]
        words += ["--env", f"TRACE={self.sweep.folder / 'trace'}"]
        done = subprocess.run(
            [sys.executable, "-m", "stadapter", *words, "--", *self.sweep.command()[1:]],
            cwd=HERE, capture_output=True, text=True, timeout=LAUNCH_TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        handle = load_all(jobs)[-1].handle
        assert isinstance(handle, SlurmHandle)
        self.sweep.logs.append(Path(handle.folder) / "log.txt")
        return handle


@slurm_here.needed
@pytest.mark.long
def test_a_pre_empted_slurm_job_goes_back_into_the_queue_and_finishes(
    slurm: None, sweep: Sweep, undisturbed: Sweep
) -> None:
    job = SlurmJob(sweep, nodes=1).submit()
    sweep.wait_for_the_middle_of_the_second()
    # Slurm sends this signal `--grace` seconds before the time limit, and at a pre-emption with send_user_signal.
    slurm_here.said("scancel", "--batch", "--signal=USR1", job.job)
    wait_until(lambda: "requeued 1x" in job.status(), sweep)
    since = time.time()
    slurm_here.wait_out_the_requeue(job.job)
    wait_until(lambda: job.status() == "finished", sweep)
    conclude("Slurm pre-empts the job", "USR1, requeued", sweep, undisturbed, since)
    assert sum(step.rank == 0 for step in sweep.steps()) == TRIALS * STEPS
    assert not Path(job.folder, "private").exists()  # the token went with the job


@slurm_here.needed
@pytest.mark.long
def test_a_cancelled_slurm_job_is_submitted_again(slurm: None, sweep: Sweep, undisturbed: Sweep) -> None:
    job = SlurmJob(sweep, nodes=2).submit()
    sweep.wait_for_the_middle_of_the_second()
    slurm_here.said("scancel", job.job)
    wait_until(lambda: "submit it again to continue" in job.status(), sweep)
    since = time.time()
    again = SlurmJob(sweep, nodes=2).submit()
    wait_until(lambda: again.status() == "finished", sweep)
    conclude("Slurm cancels the job", "scancel, submitted again", sweep, undisturbed, since)
