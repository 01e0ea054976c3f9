"""An interrupted training, however it was interrupted, ends like an undisturbed one."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stadapter import config
from stadapter.config import ConfigError, Recipe
from stadapter.training.loop import train
from stadapter.training.options import TrainOptions
from stadapter.training.state import Stopped
from stadapter.trials import checkpoint, files, record

WALL_TIMES = ("seconds", "time", "clips_per_s")
STEPS = 8  # of the tiny recipe: 2 epochs of 4


def assert_same_outcome(folder: Path, undisturbed: Path) -> None:
    """Assert bitwise equal weights, and equal numbers except for wall times."""
    mine, expected = load_file(folder / record.TRAINED), load_file(undisturbed / record.TRAINED)
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], expected[name]) for name in mine)
    assert numbers(folder) == numbers(undisturbed)


def numbers(folder: Path) -> tuple[Any, ...]:
    result = record.read_result(folder)
    assert result is not None
    epochs = [{k: v for k, v in line.items() if k not in WALL_TIMES} for line in record.read_metrics(folder)]
    return result.metrics, result.diverged, result.bad_clips, epochs


def stop_after(questions: int) -> Callable[[], bool]:
    """Return a `should_stop` that is True from the given call on. A call follows each step and each test batch."""
    asked = itertools.count(1)
    return lambda: next(asked) >= questions


def stop_at(step: int) -> dict[str, Any]:
    """Return arguments of `train` that stop it after the given step."""
    done: list[int] = []
    return {"on_step": lambda at: done.append(1), "should_stop": lambda: len(done) >= step - 1}


@pytest.mark.parametrize("steps", [1, 3, 4, 6])
def test_a_training_stopped_after_any_step_goes_on_to_bitwise_the_same_end(
    steps: int, tiny_recipe: Recipe, train_options: TrainOptions, undisturbed: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stopped, match=rf"stopped after step {steps} of {STEPS} \(epoch [12] of 2\)"):
        train(tiny_recipe, tmp_path, train_options, **stop_at(steps))
    result = train(tiny_recipe, tmp_path, train_options)
    assert result.launches == 2
    assert_same_outcome(tmp_path, undisturbed)


def test_a_training_that_is_stopped_at_every_step_gets_there(
    tiny_recipe: Recipe, train_options: TrainOptions, undisturbed: Path, tmp_path: Path
) -> None:
    for _ in range(100):  # every launch takes one step at least, or one batch of a test
        try:
            train(tiny_recipe, tmp_path, train_options, should_stop=stop_after(2))
        except Stopped:
            continue
        break
    train(tiny_recipe, tmp_path, train_options)
    assert_same_outcome(tmp_path, undisturbed)


def test_time_adds_up_over_launches(tiny_recipe: Recipe, train_options: TrainOptions, tmp_path: Path) -> None:
    began = time.time()
    with pytest.raises(Stopped):
        train(tiny_recipe, tmp_path, train_options, **stop_at(6))
    first_s = time.time() - began
    time.sleep(0.5)  # not spent on it
    result = train(tiny_recipe, tmp_path, train_options)
    whole_s = time.time() - began
    assert first_s * 0.5 < result.seconds < whole_s - 0.4
    assert result.cpu_seconds > 0
    for line in record.read_metrics(tmp_path):
        assert 16 / line["clips_per_s"] < whole_s  # the epoch that was interrupted counts both its parts, and no pause


def test_a_training_that_dies_in_its_last_test_is_only_tested_again(
    tiny_recipe: Recipe, train_options: TrainOptions, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("stadapter.training.loop.cost_of", die)
        train(tiny_recipe, tmp_path, train_options)
    steps: list[dict[str, Any]] = []
    train(tiny_recipe, tmp_path, train_options, on_step=steps.append)
    assert steps == []
    assert_same_outcome(tmp_path, undisturbed)


def test_a_stop_during_validation_loses_no_step(
    tiny_recipe: Recipe, train_options: TrainOptions, undisturbed: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stopped, match=rf"stopped after step 4 of {STEPS} \(epoch 1 of 2\)"):
        train(tiny_recipe, tmp_path, train_options, should_stop=stop_after(4 + 1))
    steps: list[dict[str, Any]] = []
    train(tiny_recipe, tmp_path, train_options, on_step=steps.append)
    assert len(steps) == STEPS - 4
    assert_same_outcome(tmp_path, undisturbed)


# --- checkpoints that are not whole


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit, empty], ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    damage: Callable[[Path], None], tiny_recipe: Recipe, train_options: TrainOptions, undisturbed: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):  # the last checkpoint is after step 6, the one before after the first epoch
        train(tiny_recipe, tmp_path, train_options, **stop_at(6))
    damage(tmp_path / record.CHECKPOINT)
    steps: list[dict[str, Any]] = []
    with pytest.warns(UserWarning) as caught:
        train(tiny_recipe, tmp_path, train_options, on_step=steps.append)
    told = [str(warning.message) for warning in caught]
    assert any("checkpoint.pt: is cut short or damaged, and is kept as checkpoint.pt.broken" in line for line in told)
    assert "the training goes on from checkpoint.previous.pt" in told
    assert 0 < len(steps) < STEPS
    assert_same_outcome(tmp_path, undisturbed)


def test_without_a_whole_checkpoint_the_training_starts_again_and_says_so(
    tiny_recipe: Recipe, train_options: TrainOptions, undisturbed: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        train(tiny_recipe, tmp_path, train_options, **stop_at(6))
    for name in (record.CHECKPOINT, checkpoint.PREVIOUS):
        cut_in_half(tmp_path / name)
    with pytest.warns(UserWarning) as caught:
        train(tiny_recipe, tmp_path, train_options)
    assert "the training starts again" in [str(warning.message) for warning in caught]
    assert {path.name for path in tmp_path.glob("*.broken")} == {
        f"{name}.broken" for name in (record.CHECKPOINT, checkpoint.PREVIOUS)
    }
    assert_same_outcome(tmp_path, undisturbed)


def test_a_crash_between_the_two_renames_of_a_checkpoint_loses_nothing(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"steps_done": 1})
    checkpoint.save(tmp_path, {"steps_done": 2})
    os.replace(tmp_path / record.CHECKPOINT, tmp_path / checkpoint.PREVIOUS)
    assert checkpoint.set_broken_aside(tmp_path) == []
    assert checkpoint.load(tmp_path, torch.device("cpu")) == {"steps_done": 2}


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/ran",)

    checkpoint.save(tmp_path, {"trained": Evil()})
    with pytest.raises(Exception, match="weights_only"):
        checkpoint.load(tmp_path, torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["", '{"metrics": ', "\0" * 64, "[]"], ids=["empty", "cut", "zeros", "a list"])
@pytest.mark.parametrize("name", [record.RESULT, record.CONFIG])
def test_a_damaged_record_is_named_in_one_line(
    name: str, content: str, tiny_recipe: Recipe, train_options: TrainOptions, undisturbed: Path, tmp_path: Path
) -> None:
    for file in (record.RESULT, record.CONFIG):
        (tmp_path / file).write_bytes((undisturbed / file).read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}: is damaged \(.*delete this file") as caught:
        train(tiny_recipe, tmp_path, train_options)
    assert "\n" not in str(caught.value)


def test_a_damaged_line_of_metrics_is_named(tmp_path: Path) -> None:
    (tmp_path / record.METRICS).write_text('{"epoch": 1}\n\0\0\0\n{"epoch": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics.jsonl:2: is damaged"):
        record.read_metrics(tmp_path)


def test_what_dead_writers_left_half_written_is_removed(tmp_path: Path, tiny_recipe: Recipe) -> None:
    part = tmp_path / ".checkpoint.pt.elsewhere.1.part"
    part.touch()
    record.prepare_folder(tmp_path, tiny_recipe)
    assert not part.exists()


# --- disks


def test_a_full_disk_ends_the_training_in_one_line_and_loses_nothing(
    small_disk: Path, tiny_recipe: Recipe, train_options: TrainOptions, undisturbed: Path
) -> None:
    folder = small_disk / "run"
    with pytest.raises(Stopped):
        train(tiny_recipe, folder, train_options, **stop_at(1))
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    before = (folder / record.CHECKPOINT).read_bytes()
    with pytest.raises(files.WriteError, match=r"cannot be written \(No space left .*MiB are needed, 0.0 MiB are free"):
        train(tiny_recipe, folder, train_options)
    assert (folder / record.CHECKPOINT).read_bytes() == before
    assert not list(folder.glob("*.part")) and not list(folder.glob(".*.part"))
    filler.unlink()
    train(tiny_recipe, folder, train_options)
    assert_same_outcome(folder, undisturbed)


def test_a_folder_that_becomes_read_only_ends_the_training_in_one_line(
    small_disk: Path, tiny_recipe: Recipe, train_options: TrainOptions, undisturbed: Path
) -> None:
    folder = small_disk / "run"

    def lose_the_disk(at: dict[str, Any]) -> None:
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)

    with pytest.raises(files.WriteError, match=r"cannot be written \(Read-only file system\)") as caught:
        train(tiny_recipe, folder, train_options, on_step=lose_the_disk)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="choose another folder"):
        train(tiny_recipe, folder, train_options)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    train(tiny_recipe, folder, train_options)
    assert_same_outcome(folder, undisturbed)


# --- the command line

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: sums depend on it


def command(tiny_flags: list[str], folder: Path, *more: str) -> list[str]:
    flags = [*tiny_flags, "--output", str(folder), "--checkpoint-every", "0", *more]
    return ["-m", "stadapter", "train", "--recipe", "embedded", *flags]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        state = checkpoint.load(folder, torch.device("cpu"))
        if state is not None and state["steps_done"] >= step:
            return
        time.sleep(0.002)
    process.kill()
    raise AssertionError(f"not at step {step}: {process.communicate()}")


@pytest.fixture
def slow_flags(tiny_flags: list[str]) -> list[str]:
    """Return the tiny recipe's flags with more epochs, so that there is time to interrupt."""
    return [*tiny_flags, "--set", "optim.epochs=6"]


@pytest.fixture(scope="module")
def undisturbed_slow(
    tiny_recipe: Recipe, train_options: TrainOptions, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed_slow")
    train(config.replace(tiny_recipe, **{"optim.epochs": 6}), folder, train_options)
    return folder


def test_kill_9_in_the_middle_of_an_epoch_costs_at_most_a_step(
    slow_flags: list[str], undisturbed_slow: Path, tmp_path: Path
) -> None:
    words = [sys.executable, *command(slow_flags, tmp_path)]
    for step in (2, 9):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
        wait_for_step(tmp_path, step, process)
        process.kill()
        process.communicate()
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert_same_outcome(tmp_path, undisturbed_slow)


def test_a_signal_ends_the_training_with_a_checkpoint_and_says_how_to_go_on(
    slow_flags: list[str], undisturbed_slow: Path, tmp_path: Path
) -> None:
    words = [sys.executable, *command(slow_flags, tmp_path)]
    for step, number in ((3, signal.SIGINT), (9, signal.SIGTERM), (15, signal.SIGUSR1)):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
        wait_for_step(tmp_path, step, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert "stopping after this step, with a checkpoint" in said
        assert re.search(r"stopped after step \d+ of 24 \(epoch \d of 6\).*; the same command goes on from there", said)
        assert "Traceback" not in said
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert_same_outcome(tmp_path, undisturbed_slow)


def test_a_killed_process_of_two_ends_the_other_and_the_next_launch_goes_on(
    slow_flags: list[str], undisturbed_slow: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += command(slow_flags, tmp_path)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, 3, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    losses = [[line["train_loss"] for line in record.read_metrics(folder)] for folder in (tmp_path, undisturbed_slow)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # two processes: other sums
    assert json.loads((tmp_path / record.RESULT).read_text())["launches"] == 2
