"""A sweep run from Python, without argparse, an exit, or output other than through an observer."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import made_up
import pytest

from stadapter import config
from stadapter.ablation import Arm, Outcome, SweepOptions, TrialEvent, run_sweep
from stadapter.ablation.exit_codes import DONE, FAILED, STOPPED
from stadapter.ablation.flags import make_parser, sweep_options
from stadapter.ablation.progress import conclusion, front_door
from stadapter.cluster.resources import Resources
from stadapter.config import ConfigError, Recipe
from stadapter.training.options import TrainOptions
from stadapter.trials.record import Record
from stadapter.trials.sweep import Sweep, make_sweep


class Recording:
    """An observer that records its calls."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.calls: list[str] = []
        self.events: list[TrialEvent] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def sweep_began(self, sweep: Sweep, finished: int) -> None:
        self.calls.append(f"{sweep.name} began, {finished} finished")

    def round_began(self, trials: int, at_once: int, resources: Resources, output: Path) -> None:
        self.calls.append(f"{trials} trials on {resources.num_gpus} GPUs")

    def trial_changed(self, event: TrialEvent) -> None:
        self.events.append(event)

    def stopping(self, text: str) -> None:
        self.calls.append("stopping")

    def trials_ended(self, records: Sequence[Record | None]) -> None:
        self.calls.append(f"{len(records)} ended")


@pytest.fixture
def sweep(tiny_recipe: Recipe) -> Sweep:
    recipe = config.replace(tiny_recipe, **{"optim.epochs": 1})
    arms = [Arm("sound", {}), Arm("broken", {"optim.base_lr": 1e30, "optim.clip_norm": None})]
    return make_sweep("robust", "Does it train?", recipe, arms, 1)


def test_a_sweep_runs_from_python_and_only_its_observer_hears_of_it(
    sweep: Sweep, clip_folder: Path, tmp_path: Path, capfd: Any
) -> None:
    options = SweepOptions(
        output=tmp_path, tracking_uri=None, num_gpus=0, max_failures=2, training=TrainOptions(data_root=clip_folder)
    )
    seen = Recording()
    outcome = run_sweep(sweep, options, seen)
    sound, broken = sweep.trials
    assert outcome.left == (broken,) and outcome.exit_code == FAILED and not outcome.stopped
    first, second = outcome.records
    assert first is not None and first.trial_id == sound.id and second is None
    assert {file.name for file in outcome.files} == {"table.txt", "table.md", "table.csv", "figure.png"}
    assert all(file.parent == outcome.folder and file.exists() for file in outcome.files)
    assert seen.calls == ["robust began, 0 finished", "2 trials on 0 GPUs", "2 ended"]
    kinds = {trial: [event.kind for event in seen.events if event.trial == trial] for trial in sweep.trials}
    assert kinds[sound] == ["started", "epoch", "finished"]
    assert kinds[broken] == ["started", "failed", "started", "failed", "given up"]
    failures = [event for event in seen.events if event.kind == "failed"]
    assert [event.is_retried for event in failures] == [True, False]
    assert "the loss became" in failures[0].message
    assert any(event.record == first for event in seen.events) and any("float32" in note for note in seen.notes)

    again = run_sweep(sweep, dataclasses.replace(options, only=("sound",)))  # nobody looks
    assert again.exit_code == DONE and again.records == outcome.records and again.left == again.ran == ()
    assert capfd.readouterr() == ("", "")


def test_an_input_that_cannot_work_is_raised_and_starts_nothing(sweep: Sweep, tmp_path: Path, capfd: Any) -> None:
    seen = Recording()
    nowhere = SweepOptions(output=tmp_path / "runs", training=TrainOptions(data_root=tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="nowhere"):
        run_sweep(sweep, dataclasses.replace(nowhere, num_gpus=0), seen)
    with pytest.raises(ConfigError, match="--num-gpus 99: this machine has"):
        run_sweep(sweep, dataclasses.replace(nowhere, num_gpus=99), seen)
    with pytest.raises(ConfigError, match="--gpus-per-trial 0: must be at least 1"):
        SweepOptions(gpus_per_trial=0)
    with pytest.raises(ConfigError, match="set num_workers and decode_on_cluster of the sweep"):
        SweepOptions(training=TrainOptions(num_workers=2))
    assert not seen.calls and not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_an_outcome_stands_for_an_exit_code_and_says_how_to_go_on(tmp_path: Path) -> None:
    sweep = made_up.kernel_sweep(1)
    made_up.write(sweep, tmp_path, made_up.KERNEL)
    left, options = sweep.trials[:1], SweepOptions(output=tmp_path)
    nothing: tuple[None, ...] = (None,) * len(sweep.trials)
    codes = {}
    for name, trials, stopped in (("done", (), True), ("failed", left, False), ("stopped", left, True)):
        outcome = Outcome(sweep, nothing, trials, (), stopped, tmp_path, ())
        codes[name] = outcome.exit_code, " ".join(conclusion(outcome, options))
    assert [code for code, _ in codes.values()] == [DONE, FAILED, STOPPED]
    assert "--only left them out" in codes["done"][1] and f"{front_door()} ui " in codes["done"][1]
    assert "They failed 2 times each" in codes["failed"][1] and "--max-failures 3" in codes["failed"][1]
    assert "This continues them from their checkpoints" in codes["stopped"][1]


def test_the_flags_default_to_the_options_defaults() -> None:
    given = make_parser("Question?", ["8"]).parse_args([])
    assert dataclasses.replace(sweep_options(given), command="run_sweep") == SweepOptions()
    given = make_parser("Question?", ["8"]).parse_args(["--tracking-uri", "none", "--only", "a", "--cache-prefix", "2"])
    options = sweep_options(given)
    assert (options.tracking_uri, options.only, options.training.token_cache_gb) == (None, ("a",), 2)


@pytest.mark.parametrize("path", ["", str(Path(sys.executable).parent)])
def test_the_printed_name_of_the_command_can_be_typed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the PATH its name is enough; `make demo` does not put it there."""
    monkeypatch.setenv("PATH", path)
    assert front_door() == "stadapter" if path else front_door().endswith(("/stadapter", " -m stadapter"))
    done = subprocess.run([*front_door().split(), "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("stadapter ")
