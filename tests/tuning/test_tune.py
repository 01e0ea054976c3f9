"""The search for settings, with real trainings on real files, a real Ray and a real Optuna."""

from __future__ import annotations

import argparse
import csv
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stadapter import config, recipes
from stadapter.cluster.ray_runtime import Cluster
from stadapter.cluster.resources import Resources
from stadapter.commands.main import main
from stadapter.config import Recipe
from stadapter.training.loop import train
from stadapter.training.options import TrainOptions
from stadapter.trials import record
from stadapter.tuning import tune
from stadapter.tuning.report import best_text
from stadapter.tuning.search import search
from stadapter.tuning.space import TrialOutcome, apply, known_trials, search_space, trial_of
from stadapter.tuning.tune import SearchOptions, plan_search, run_search

TRIALS = 5


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(Resources()) as started:
        yield started


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def tried(cluster: Cluster, tiny_recipe: Recipe, clip_folder: Path, output: Path) -> list[TrialOutcome]:
    """Run a search without earlier trials, and return its trials."""
    seen: list[TrialOutcome] = []
    space = search_space(tiny_recipe)
    found = search(cluster, tiny_recipe, space, TRIALS, [], output, TrainOptions(clip_folder), seen.append)
    assert found == seen
    return found


def folder(one: TrialOutcome, output: Path) -> Path:
    return trial_of(one.recipe).folder(output)


def test_the_search_tries_the_recipes_own_settings_and_others_within_the_space(
    tried: list[TrialOutcome], tiny_recipe: Recipe
) -> None:
    assert len(tried) == TRIALS
    ids = {config.identity(one.recipe) for one in tried}
    assert len(ids) == TRIALS
    assert config.identity(tiny_recipe) in ids
    space = search_space(tiny_recipe)
    for one in tried:
        assert set(config.difference(tiny_recipe, one.recipe)) <= set(space)
        for path, limits in space.items():
            assert limits.low <= config.flatten(one.recipe)[path] <= limits.high


def test_a_trial_stopped_early_does_not_look_finished(
    tried: list[TrialOutcome], output: Path, clip_folder: Path, tiny_recipe: Recipe
) -> None:
    assert {one.status for one in tried} == {"finished", "stopped"}
    for one in tried:
        assert (record.read_result(folder(one, output)) is not None) == (one.status == "finished")
        assert one.epochs == len(record.read_metrics(folder(one, output)))
        assert (one.epochs == tiny_recipe.optim.epochs) == (one.status == "finished")
    stopped = next(one for one in tried if one.status == "stopped")
    resumed = train(stopped.recipe, folder(stopped, output), TrainOptions(clip_folder))  # as a later sweep would
    assert resumed.epoch == tiny_recipe.optim.epochs
    (folder(stopped, output) / record.RESULT).unlink()


def test_the_value_of_a_trial_is_its_validation_accuracy(tried: list[TrialOutcome], output: Path) -> None:
    for one in tried:
        if one.status == "finished":
            assert one.value == record.read_metrics(folder(one, output))[-1]["val_top1"]


def test_finished_trials_are_known_to_the_next_search(
    cluster: Cluster, tried: list[TrialOutcome], output: Path, tiny_recipe: Recipe, clip_folder: Path
) -> None:
    space = search_space(tiny_recipe)
    known = known_trials(tiny_recipe, space, output)
    finished = {config.identity(one.recipe): one.value for one in tried if one.status == "finished"}
    assert {config.identity(apply(tiny_recipe, one.settings)): one.value for one in known} == finished
    other_seed = config.replace(tiny_recipe, seed=1)
    assert known_trials(other_seed, search_space(other_seed), output) == []

    again = search(
        cluster, tiny_recipe, space, 1, known, output, TrainOptions(clip_folder), lambda one: None, early_stopping=False
    )
    assert len(again) == 1
    assert again[0].status == "finished"
    # One that was stopped early may be tried again: the recipe's own settings are, until they have finished.
    assert config.identity(again[0].recipe) not in finished


def test_a_training_that_fails_does_not_end_the_search(
    cluster: Cluster, tiny_recipe: Recipe, clip_folder: Path, tmp_path: Path
) -> None:
    wild = config.replace(tiny_recipe, **{"optim.base_lr": 1e30, "optim.clip_norm": None})
    found = search(cluster, wild, search_space(wild), 2, [], tmp_path, TrainOptions(clip_folder), lambda one: None)
    assert [(one.status, one.value) for one in found] == [("failed", None)] * 2
    assert "the loss became" in found[0].message


def test_the_best_settings_can_be_pasted_as_python_and_as_flags() -> None:
    best = recipes.for_strategy(recipes.embedded, "lora")
    best = config.replace(best, **{"optim.base_lr": 0.0123, "optim.warmup_epochs": 0.5, "adapter.blocks": (1, 2)})
    text = best_text("embedded", best)
    python = text.partition("As Python:")[2].partition("As flags:")[0].strip()
    assert eval(python, {"config": config, "recipes": recipes}) == best
    flags = text.partition("As flags:")[2].split()
    overrides = dict(config.parse_override(word) for word in flags if "=" in word)
    assert config.replace(recipes.embedded, **overrides) == best


def test_the_backbones_own_rate_is_searched_where_there_is_one() -> None:
    assert "optim.backbone_lr_factor" not in search_space(recipes.embedded)
    full = search_space(recipes.for_strategy(recipes.embedded, "full"))
    limits = full["optim.backbone_lr_factor"]
    assert limits.low < limits.start < limits.high <= 1


def test_settings_are_rounded_but_the_recipes_own_values_are_kept() -> None:
    recipe = config.replace(recipes.embedded, **{"optim.base_lr": 0.123456})
    assert apply(recipe, {"optim.base_lr": 0.123456}) == recipe
    assert apply(recipe, {"optim.base_lr": 0.234567}).optim.base_lr == 0.235


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trials", "0"], "at least 1"),
        (["--recipe", "embeded"], "did you mean embedded"),
        (["--recipe", "ssv2_clip_b16"], "--data-root"),
        (["--num-gpus", "99"], "this machine has"),
    ],
)
def test_bad_input_has_a_one_line_answer(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "--output", str(tmp_path), *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_the_command_prints_and_keeps_the_best(
    cluster: Cluster, tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The last test here: the command stops the Ray that it finds.
    flags = ["--strategy", "linear_probe", "--trials", "2", "--num-gpus", "0", "--no-early-stopping", *tiny_flags]
    assert main(["tune", "--output", str(tmp_path), *flags]) == 0
    shown = capsys.readouterr().out
    assert shown.count("  finished  ") == 2
    kept = tmp_path / "searches" / "embedded-linear_probe"
    assert (kept / "best.txt").read_text() in shown
    assert "'strategy': 'linear_probe'" in shown
    with (kept / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = [float(row["val_top1"]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert f"val top-1 {values[0]:.1f} %" in shown


def test_a_search_runs_from_python_and_prints_nothing(
    tiny_recipe: Recipe, clip_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changed = config.difference(recipes.embedded, tiny_recipe)
    options = SearchOptions(trials=1, fields=changed, data_root=str(clip_folder), num_gpus=0, output=tmp_path)
    plan = plan_search(options)
    seen: list[TrialOutcome] = []
    result = run_search(plan, seen.append)
    assert list(result.trials) == seen and result.best == seen[0]
    assert result.text == (plan.folder / "best.txt").read_text()
    assert capfd.readouterr().out == ""


def test_the_data_root_of_a_search_may_be_an_address() -> None:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    assert parser.parse_args(["--data-root", "s3://bucket/ssv2"]).data_root == "s3://bucket/ssv2"
    assert parser.parse_args(["--data-root", "here"]).data_root == str(Path("here").resolve())


def test_ctrl_c_ends_a_search_and_what_has_ended_counts(tiny_recipe: Recipe, clip_folder: Path, tmp_path: Path) -> None:
    """The test has a separate Ray: an interrupted trial may hold its CPUs until Ray is shut down."""
    seen: list[TrialOutcome] = []

    def interrupt_soon(one: TrialOutcome) -> None:
        seen.append(one)
        if len(seen) == 1:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    longer = config.replace(tiny_recipe, **{"optim.epochs": 10})
    space = search_space(longer)
    with Cluster(Resources()) as alone:
        found = search(alone, longer, space, 50, [], tmp_path, TrainOptions(clip_folder), interrupt_soon)
    assert found == seen and 1 <= len(found) < 50
