"""The states of trials: finished ones never run again, failed ones a few times, and each has one writer.

tests/faults injects faults into whole sweeps.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_up
import pytest

from stadapter.ablation.launch import Launch
from stadapter.ablation.observer import Silent
from stadapter.ablation.options import SweepOptions
from stadapter.ablation.prepare import Request
from stadapter.cluster.failure import write_error
from stadapter.config import ConfigError, Recipe, replace
from stadapter.trials import files, lock, record, status
from stadapter.trials.stop import GentleStop, Standstill, moving, watch
from stadapter.trials.sweep import Arm, make_sweep

ROOT = Path(__file__).parents[2]
KERNEL = str(ROOT / "experiments" / "ablate_kernel.py")


def words(flags: list[str], output: Path, *more: str) -> list[str]:
    flags = ["--recipe", "embedded", *flags, "--num-gpus", "0", "--output", str(output), "--tracking-uri", "none"]
    return [sys.executable, KERNEL, *flags, *more]


def launch(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


# --- which trials


def test_only_chooses_trials_by_words_in_their_names() -> None:
    trials = made_up.kernel_sweep(12).trials
    assert {t.name for t in status.select(trials, ["kernel 1x3x3 seed 1"])} == {"kernel 1x3x3 seed 1"}  # not seed 11
    assert len(status.select(trials, ["seed 1"])) == 4
    assert len(status.select(trials, ["kernel 3x3x3", "seed 0"])) == 12 + 3
    assert len(status.select(trials, None)) == 48
    with pytest.raises(ConfigError, match="--only 'kernel 9': no trial of this sweep has that in its name; there are"):
        status.select(trials, ["kernel 9"])


@pytest.mark.parametrize(
    ("sweep", "recipe"), [("../kernel", "embedded"), ("kernel", "../../mine"), ("a/b", "embedded")]
)
def test_a_name_that_leads_out_of_the_output_folder_is_refused(sweep: str, recipe: str, tiny_recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="becomes that of a folder"):
        make_sweep(sweep, "?", replace(tiny_recipe, name=recipe), [Arm("only", {})], 1)


def test_force_keeps_the_old_record_and_forgets_failures(tmp_path: Path) -> None:
    sweep = made_up.kernel_sweep(1)
    made_up.write(sweep, tmp_path, made_up.KERNEL, leave_out=1)
    status.count_failure(sweep.trials[1].folder(tmp_path), 2, "it broke")
    before = record.read_result(sweep.trials[0].folder(tmp_path))
    (moved,) = status.set_aside(sweep.trials[:2], tmp_path)
    assert record.read_result(moved) == before
    assert not sweep.trials[0].folder(tmp_path).exists()
    assert status.read_failures(sweep.trials[1].folder(tmp_path)).count == 0
    assert status.entry(sweep.trials[2], tmp_path).status == "done"


def test_failures_are_counted_over_launches_and_anew_under_another_limit(tmp_path: Path) -> None:
    status.count_failure(tmp_path, 2, "first")
    assert not status.is_exhausted(tmp_path, 2)
    status.count_failure(tmp_path, 2, "second")
    assert status.is_exhausted(tmp_path, 2)
    assert not status.is_exhausted(tmp_path, 3)
    assert status.count_failure(tmp_path, 3, "third") == status.Failures(1, 3, "third")


def test_tables_of_other_arms_are_kept_aside_and_those_of_more_seeds_are_not(tmp_path: Path) -> None:
    sweep = made_up.kernel_sweep(2)
    made_up.write(sweep, tmp_path, made_up.KERNEL)
    (sweep.folder(tmp_path) / "table.txt").write_text("numbers")
    fewer = make_sweep("kernel", "?", sweep.recipe, sweep.arms[:2], 2)
    kept = status.keep_tables(sweep, fewer, tmp_path)
    assert kept is not None and (kept / "table.txt").read_text() == "numbers"
    assert status.keep_tables(sweep, made_up.kernel_sweep(3), tmp_path) is None


# --- one writer


HOLD = "import sys, time, pathlib\nfrom stadapter.trials import lock\n"
HOLD += (
    "with lock.writing(pathlib.Path(sys.argv[1]), 'the other'):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """Return a trial's folder that another process has locked."""
    folder = tmp_path / "trials" / "abc"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    yield folder, other
    other.kill()
    other.communicate()


def test_a_second_writer_is_told_who_the_first_is(held: tuple[Path, subprocess.Popen[str]]) -> None:
    folder, other = held
    told = rf"abc is being written by process {other.pid} on .* \(the other\)"
    with pytest.raises(lock.Busy, match=told), lock.writing(folder):
        pass
    assert lock.owner_of(folder) is not None


def test_a_password_in_a_command_is_told_to_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "trials" / "abc"
    with lock.writing(folder, "ablate_kernel.py --tracking-uri http://me:pass@word@host:1/x --seeds 2"):
        assert "ablate_kernel.py --tracking-uri http://***@host:1/x --seeds 2" in str(lock.owner_of(folder))
        kept = [path.read_text() for path in (tmp_path / "locks").iterdir()]
    assert not any("word" in text for text in kept)
    error = OSError("s3: no answer from https://me:password@host/bucket")
    assert write_error(folder, error) == "s3: no answer from https://***@host/bucket"
    assert "password" not in (folder / "error.txt").read_text()


def test_a_writer_that_was_killed_blocks_nobody(held: tuple[Path, subprocess.Popen[str]]) -> None:
    folder, other = held
    other.kill()
    other.wait()
    assert lock.owner_of(folder) is None
    with lock.writing(folder):
        owner = lock.owner_of(folder)
        assert owner is not None and owner.pid == os.getpid()
    assert lock.owner_of(folder) is None


def test_a_live_owner_on_another_machine_is_left_alone_until_it_falls_silent(tmp_path: Path) -> None:
    folder = tmp_path / "trials" / "abc"
    path = tmp_path / "locks" / "abc.owner"
    path.parent.mkdir()
    files.write_json(path, {"host": "node7", "pid": 1, "command": "x", "machine": "another", "token": "t"})
    with pytest.raises(lock.Busy, match="process 1 on node7"), lock.writing(folder):
        pass
    silent = time.time() - 2 * lock.SILENT_S
    os.utime(path, (silent, silent))
    with lock.writing(folder):
        pass


@pytest.mark.parametrize("is_there", [False, True])
def test_a_file_system_without_flock_is_refused_in_one_line_and_nothing_is_written(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def no_flock(*arguments: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    folder, locks = tmp_path / "trials" / "abc", tmp_path / "locks"
    if is_there:  # from a machine that mounts it with flock
        locks.mkdir()
        (locks / "abc.lock").touch()
    monkeypatch.setattr(fcntl, "flock", no_flock)
    with (
        pytest.raises(ConfigError, match=r"no file locks.*choose an --output on another one"),
        lock.writing(folder),
    ):
        pass
    with pytest.raises(ConfigError, match="or have it mounted with flock or localflock"):
        lock.check_flock(locks)
    assert {path.name for path in locks.iterdir()} <= {"abc.lock"}
    assert not folder.exists() and not recwarn.list
    monkeypatch.undo()
    lock.check_flock(locks)
    with lock.writing(folder):
        pass


# --- asking for an end


def test_the_first_signal_asks_for_an_end_and_the_second_ends(tmp_path: Path, capfd: Any) -> None:
    with GentleStop(tmp_path) as stop:
        look = watch(stop.file)
        assert not look()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.asked and stop.file.exists()
        assert watch(stop.file)()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert not stop.file.exists()
    assert "once more to stop at once" in capfd.readouterr().out


def test_a_training_stands_still_from_the_last_time_that_it_was_seen_to_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, clock = tmp_path / "moves", [100.0]
    file.touch()  # by a launch before
    os.utime(file, (0, 0))
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    standstill, look = Standstill(file), moving(lambda: False, file)
    clock[0] += 1e6
    assert standstill.seconds() == 0  # waiting for its processes to start is no standstill
    assert look() is False
    assert standstill.seconds() == 0
    clock[0] += 4
    look()  # too soon to touch the file again
    assert standstill.seconds() == 4
    clock[0] += 4
    look()
    assert standstill.seconds() == 0


def test_a_full_disk_is_told_in_one_line_and_does_not_break_into_ray(small_disk: Path) -> None:
    sweep = made_up.kernel_sweep(1)
    trial = sweep.trials[0]
    trial.folder(small_disk).mkdir(parents=True)
    with pytest.raises(OSError, match="No space"), open(small_disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    why = write_error(trial.folder(small_disk), files.WriteError(small_disk / "x", 1, OSError(errno.ENOSPC, "full")))
    assert why.startswith(f"{small_disk / 'x'}: cannot be written (full")
    request = Request(sweep, [trial], frozenset(), small_disk, SweepOptions(max_failures=2))
    launched = Launch(request, Silent(), None, GentleStop(small_disk))
    launched.event("failed", trial, {"message": why})
    assert isinstance(launched.unwritten, files.WriteError)  # raised when the round is over


# --- whole sweeps


def test_a_trial_that_failed_as_often_as_it_may_is_given_up(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = [*tiny_flags, "--values", "3", "--seeds", "1"]
    planned = launch(words(flags, tmp_path, "--plan"))
    (trial,) = {line.split()[4] for line in planned.stdout.splitlines() if line.startswith("  kernel")}
    for _ in range(2):
        status.count_failure(tmp_path / "trials" / trial, 2, "the loss became nan")
    assert "failed 2 times" in launch(words(flags, tmp_path, "--plan")).stdout
    done = launch(words(flags, tmp_path))
    assert done.returncode == 1
    assert "given up  kernel 3x3x3 seed 0  failed 2 times, the last time: the loss became nan" in done.stdout
    assert "started" not in done.stdout
    assert "They failed 2 times each, and are left alone until --force or another" in done.stdout


def test_a_finished_sweep_of_60_trials_is_answered_without_torch_or_ray(tmp_path: Path) -> None:
    seeds = 15
    sweep = made_up.kernel_sweep(seeds)
    made_up.write(sweep, tmp_path, made_up.KERNEL)
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{KERNEL}', '--recipe', 'embedded', '--num-gpus', '0', '--seeds', '{seeds}', "
        f"'--output', '{tmp_path}', '--tracking-uri', 'none']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    assert 'ray' not in sys.modules and 'torch' not in sys.modules, 'heavy'\n"
    )
    from stadapter.data.lists.formats import load_clips

    for trial in sweep.trials:  # made up, but for the clips: those are checked
        result = record.read_result(trial.folder(tmp_path))
        lists = {split: load_clips(trial.recipe.data, None, split) for split in ("train", "test")}
        data = {split: record.ClipsUsed(clips.fingerprint(), len(clips)) for split, clips in lists.items()}
        record.write_result(trial.folder(tmp_path), dataclasses.replace(result, data=data))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 trials, 60 finished before" in done.stdout


def test_more_arms_or_seeds_run_only_what_is_new(tmp_path: Path, tiny_recipe: Recipe) -> None:
    arms = [Arm("one", {}), Arm("two", {"adapter.bottleneck_width": 4})]
    first, second = (make_sweep("s", "?", tiny_recipe, arms[:n], n) for n in (1, 2))
    assert {trial.id for trial in first.trials} < {trial.id for trial in second.trials}
    made_up.write(first, tmp_path, {"one": 90.0})
    states = {trial.name: status.entry(trial, tmp_path).status for trial in second.trials}
    assert states == {"one seed 0": "done", "one seed 1": "to do", "two seed 0": "to do", "two seed 1": "to do"}
