"""The training loop's numbers follow from the recipe, whatever the processes, passes, workers and interruptions."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import multiprocessing
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from stadapter import config
from stadapter.config import ConfigError, Recipe
from stadapter.model.build import build_model
from stadapter.model.state import trainable_parameters
from stadapter.training import loop as train_module
from stadapter.training.loop import TrainingError, train
from stadapter.training.optim import diverged, dropout_mask, learning_rate, make_optimizer, summed_loss
from stadapter.training.options import TrainOptions
from stadapter.training.process_group import ProcessGroup
from stadapter.trials import record


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of each epoch and of the test without times, which must agree in two runs of one recipe."""
    clock = ("seconds", "time", "clips_per_s")
    epochs = [{k: v for k, v in line.items() if k not in clock} for line in record.read_metrics(folder)]
    result = record.read_result(folder)
    assert result is not None
    return [*epochs, result.metrics]


def losses(folder: Path) -> list[float]:
    return [line["train_loss"] for line in record.read_metrics(folder)]


def test_the_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    rates = [learning_rate(step, 10, 4, 2.0) for step in range(10)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[7] == pytest.approx(1.0)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))
    assert learning_rate(10, 10, 4, 2.0) == pytest.approx(0.0)


def test_the_optimizer_holds_what_is_trained_and_decays_no_bias(tiny_recipe: Recipe) -> None:
    model = build_model(tiny_recipe)
    decayed, kept = make_optimizer(model, tiny_recipe.optim).param_groups
    names = {id(p): name for name, p in trainable_parameters(model).items()}
    assert {names[id(p)] for p in [*decayed["params"], *kept["params"]]} == set(names.values())
    assert kept["weight_decay"] == 0
    assert decayed["weight_decay"] == tiny_recipe.optim.weight_decay
    assert all(name.endswith("weight") for name in (names[id(p)] for p in decayed["params"]))
    assert {n for n in names.values() if n.endswith("bias")} <= {names[id(p)] for p in kept["params"]}


def test_the_backbone_learns_at_its_own_rate(tiny_recipe: Recipe) -> None:
    recipe = config.replace(tiny_recipe, **{"strategy": "full_space_time", "optim.backbone_lr_factor": 0.125})
    model = build_model(recipe)
    names = {id(p): name for name, p in trainable_parameters(model).items()}
    seen = {}
    for group in make_optimizer(model, recipe.optim).param_groups:
        assert group["lr"] == recipe.optim.peak_lr * group["lr_factor"]
        seen |= {names[id(p)]: group["lr_factor"] for p in group["params"]}
    assert seen == {name: 0.125 if name.startswith("vit.") else 1.0 for name in names.values()}


def test_the_schedule_keeps_the_ratio_of_the_two_rates(
    tiny_recipe: Recipe, train_options: TrainOptions, tmp_path: Path
) -> None:
    """With a backbone rate near zero, the backbone stays as it was, and the head still learns."""
    changes = {"strategy": "full", "optim.epochs": 1, "optim.backbone_lr_factor": 1e-9, "optim.weight_decay": 0.0}
    recipe = config.replace(tiny_recipe, **changes)
    train(recipe, tmp_path, train_options)
    before, after = dict(build_model(recipe).named_parameters()), load_file(tmp_path / record.TRAINED)
    moved = {name: (after[name] - before[name]).abs().max().item() for name in after}
    assert all(step < 1e-7 for name, step in moved.items() if name.startswith("vit."))
    assert moved["head.weight"] > 1e-3


@pytest.mark.parametrize(
    ("train_losses", "is_diverged"), [([2.5, 1.0], False), ([2.5, 2.48], True), ([1.0, 30.0], True), ([2.4], False)]
)
def test_a_loss_no_better_than_guessing_is_called_diverged(train_losses: list[float], is_diverged: bool) -> None:
    assert diverged(train_losses, 12) == is_diverged  # ln 12 = 2.485
    assert diverged(train_losses, 3, 4) == is_diverged  # two heads: ln 3 + ln 4


def test_a_loss_that_is_no_number_is_called_diverged() -> None:
    assert diverged([math.nan], 12)


def test_the_peak_rate_is_linear_in_the_global_batch(tiny_recipe: Recipe) -> None:
    assert tiny_recipe.optim.peak_lr == pytest.approx(tiny_recipe.optim.base_lr * 4 / 256)


def test_dropout_keeps_the_mean_and_repeats_by_seed_and_step() -> None:
    mask = dropout_mask(0, 3, 64, 512, 0.5)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    assert mask.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(mask, dropout_mask(0, 3, 64, 512, 0.5))
    assert not torch.equal(mask, dropout_mask(0, 4, 64, 512, 0.5))
    assert not torch.equal(mask, dropout_mask(1, 3, 64, 512, 0.5))


def test_a_run_folder_says_everything(undisturbed: Path, tiny_recipe: Recipe) -> None:
    result = record.read_result(undisturbed)
    assert result is not None
    assert result.recipe == json.loads((undisturbed / record.CONFIG).read_text()) == config.flatten(tiny_recipe)
    assert result.trial_id == config.identity(tiny_recipe)
    assert 0 <= result.metrics["top1"] <= 100
    assert result.data["test"].clips == 7
    assert result.trainable_params < result.total_params
    assert result.peak_memory_mib > 50
    assert set(load_file(undisturbed / record.TRAINED)) == set(trainable_parameters(build_model(tiny_recipe)))
    assert [line["epoch"] for line in record.read_metrics(undisturbed)] == [1, 2]
    assert [line["step"] for line in record.read_metrics(undisturbed)] == [4, 8]


def test_the_loss_goes_down(undisturbed: Path) -> None:
    first, last = losses(undisturbed)
    assert last < first


def test_the_same_recipe_gives_bitwise_the_same_numbers_and_weights(
    undisturbed: Path, tiny_recipe: Recipe, train_options: TrainOptions, tmp_path: Path
) -> None:
    train(tiny_recipe, tmp_path, train_options)
    assert numbers(tmp_path) == numbers(undisturbed)
    ours, theirs = load_file(tmp_path / record.TRAINED), load_file(undisturbed / record.TRAINED)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_seed_gives_other_numbers(
    undisturbed: Path, tiny_recipe: Recipe, train_options: TrainOptions, tmp_path: Path
) -> None:
    train(config.replace(tiny_recipe, seed=1), tmp_path, train_options)
    assert losses(tmp_path) != losses(undisturbed)


def test_a_run_stopped_after_an_epoch_goes_on_to_bitwise_the_same_end(
    undisturbed: Path, tiny_recipe: Recipe, train_options: TrainOptions, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(metrics: dict[str, Any]) -> None:
        raise Stop

    with pytest.raises(Stop):
        train(tiny_recipe, tmp_path, train_options, on_epoch=stop)
    assert record.read_result(tmp_path) is None
    epochs: list[int] = []
    train(tiny_recipe, tmp_path, train_options, on_epoch=lambda metrics: epochs.append(metrics["epoch"]))
    assert epochs == [2]
    assert numbers(tmp_path) == numbers(undisturbed)


@pytest.mark.parametrize("wrong", [{"clips_per_pass": 0}, {"clips_per_pass": -1}, {"num_workers": -1}])
def test_options_that_would_train_on_nothing_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        TrainOptions(**wrong)  # type: ignore[arg-type]


def test_a_finished_folder_is_not_trained_again(
    undisturbed: Path, tiny_recipe: Recipe, train_options: TrainOptions
) -> None:
    def fail(metrics: dict[str, Any]) -> None:
        raise AssertionError("trained again")

    assert train(tiny_recipe, undisturbed, train_options, on_epoch=fail) == record.read_result(undisturbed)


def test_accumulating_small_passes_changes_only_rounding(
    undisturbed: Path, tiny_recipe: Recipe, clip_folder: Path, tmp_path: Path
) -> None:
    train(tiny_recipe, tmp_path, TrainOptions(data_root=clip_folder, clips_per_pass=3))
    assert losses(tmp_path) == pytest.approx(losses(undisturbed), rel=1e-5)


def test_recomputing_activations_changes_no_bit(
    undisturbed: Path, tiny_recipe: Recipe, clip_folder: Path, tmp_path: Path
) -> None:
    train(tiny_recipe, tmp_path, TrainOptions(data_root=clip_folder, recompute=True))
    assert numbers(tmp_path) == numbers(undisturbed)
    expected, got = (load_file(folder / record.TRAINED) for folder in (undisturbed, tmp_path))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def _watch_gradients(rank: int, rendezvous: str, recipe: Recipe, root: Path, folder: Path) -> None:
    """Train with one pass per step, then with two; each process writes its exchanged gradients to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    make_components = train_module.make_components
    bytes_by_step: dict[str, list[int]] = {}
    names: set[str] = set()
    searches: set[bool] = set()

    def watched(*arguments: Any) -> Any:
        components = make_components(*arguments)
        name_of = {id(parameter): name for name, parameter in components.model.named_parameters()}
        in_step: list[int] = []

        def exchange(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            in_step.append(bucket.buffer().nbytes)
            names.update(name_of[id(parameter)] for parameter in bucket.parameters())
            return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None: the default group

        def end_step(*_: Any) -> None:
            bytes_by_step.setdefault(f"{arguments[1].clips_per_pass}", []).append(sum(in_step))
            in_step.clear()

        # A lambda, since the annotations of this module are text, which this interface refuses.
        components.replica.register_comm_hook(None, lambda state, bucket: exchange(bucket))
        components.optimizer.register_step_post_hook(end_step)
        searches.add(components.replica.find_unused_parameters)
        return components

    train_module.make_components = watched
    try:
        for clips_per_pass in (2, 1):
            train_options = TrainOptions(data_root=root, clips_per_pass=clips_per_pass)
            train(recipe, folder / f"passes-of-{clips_per_pass}", train_options, ProcessGroup(rank, 2))
        seen = {"bytes_by_step": bytes_by_step, "names": sorted(names), "searches": list(searches)}
        (folder / f"exchanged-{rank}").write_text(json.dumps(seen))
    finally:
        dist.barrier()
        dist.destroy_process_group()


def test_a_step_exchanges_each_trained_gradient_once_and_no_other(
    tiny_recipe: Recipe, clip_folder: Path, tmp_path: Path
) -> None:
    """Four bytes per trained parameter, however many passes make a step, and no search for unused parameters."""
    recipe = config.replace(tiny_recipe, **{"optim.epochs": 1})
    arguments = (f"file://{tmp_path}/rendezvous", recipe, clip_folder, tmp_path)
    multiprocessing.spawn(_watch_gradients, arguments, nprocs=2)  # type: ignore[no-untyped-call]
    trained = trainable_parameters(build_model(recipe))
    size = 4 * sum(parameter.numel() for parameter in trained.values())
    steps = 4  # of 4 clips: 2 for each process
    for rank in range(2):
        seen = json.loads((tmp_path / f"exchanged-{rank}").read_text())
        assert seen["bytes_by_step"] == {"2": [size] * steps, "1": [size] * steps}
        assert seen["names"] == sorted(trained)
        assert seen["searches"] == [False]


def test_loader_processes_change_no_number(
    undisturbed: Path, tiny_recipe: Recipe, clip_folder: Path, tmp_path: Path
) -> None:
    train(tiny_recipe, tmp_path, TrainOptions(data_root=clip_folder, num_workers=2))
    assert numbers(tmp_path) == numbers(undisturbed)


def test_two_processes_under_torchrun_give_the_numbers_of_one(
    undisturbed: Path, tiny_flags: list[str], tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "stadapter", "train", "--output", str(tmp_path / "run"), *tiny_flags]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert losses(tmp_path / "run") == pytest.approx(losses(undisturbed), rel=1e-5)
    one, two = numbers(undisturbed)[-1], numbers(tmp_path / "run")[-1]
    assert two["top1"] == one["top1"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def _train_where_one_loss_breaks(rank: int, rendezvous: str, recipe: Recipe, root: Path, folder: Path) -> None:
    """Train with a third loss that is not finite in one of two processes; each writes its reason to stop to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    calls = itertools.count()

    def broken(*arguments: Any) -> torch.Tensor:
        loss = summed_loss(*arguments)
        return loss * math.inf if rank == 1 and next(calls) == 2 else loss

    train_module.summed_loss = broken  # type: ignore[attr-defined]
    try:
        train(recipe, folder, TrainOptions(data_root=root), ProcessGroup(rank, 2))
    except TrainingError as error:
        (folder / f"stopped-{rank}").write_text(str(error))
    finally:
        # Neither leaves while the other still talks to it: gloo's threads would abort the process.
        dist.barrier()
        dist.destroy_process_group()


def test_all_processes_stop_where_one_loss_is_not_finite(
    tiny_recipe: Recipe, clip_folder: Path, tmp_path: Path
) -> None:
    """Otherwise the others would wait for it in the next exchange of gradients, on GPUs for minutes."""
    recipe = config.replace(tiny_recipe, **{"optim.clip_norm": None})
    arguments = (f"file://{tmp_path}/rendezvous", recipe, clip_folder, tmp_path)
    multiprocessing.spawn(_train_where_one_loss_breaks, arguments, nprocs=2)  # type: ignore[no-untyped-call]
    said = [(tmp_path / f"stopped-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert "at step 2" in said[0]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_close_to_float32(
    precision: str, undisturbed: Path, tiny_recipe: Recipe, train_options: TrainOptions, tmp_path: Path
) -> None:
    train(config.replace(tiny_recipe, **{"optim.precision": precision}), tmp_path, train_options)
    assert losses(tmp_path) == pytest.approx(losses(undisturbed), rel=0.05)
    assert losses(tmp_path) != losses(undisturbed)


def test_a_loss_that_is_not_finite_stops_the_training(
    tiny_recipe: Recipe, train_options: TrainOptions, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"nan|inf") as caught:
        train(config.replace(tiny_recipe, **{"optim.base_lr": 1e30, "optim.clip_norm": None}), tmp_path, train_options)
    assert "optim.base_lr" in str(caught.value)
    assert record.read_result(tmp_path) is None


def test_weights_broken_by_the_last_step_are_called_diverged(
    tiny_recipe: Recipe, train_options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loss of the training is finite, but not the weights that it leaves."""
    rate, last_step = learning_rate, 7
    monkeypatch.setattr(
        "stadapter.training.loop.learning_rate", lambda step, *a: math.nan if step == last_step else rate(step, *a)
    )
    result = train(tiny_recipe, tmp_path, train_options)
    assert all(map(math.isfinite, losses(tmp_path)))
    assert result.metrics["top1"] == 0
    assert result.diverged


def test_label_smoothing_and_dropout_reach_the_loss(
    undisturbed: Path, tiny_recipe: Recipe, train_options: TrainOptions, tmp_path: Path
) -> None:
    for field in ("optim.label_smoothing", "optim.head_dropout"):
        train(config.replace(tiny_recipe, **{field: 0.4}), tmp_path / field, train_options)
        assert losses(tmp_path / field) != losses(undisturbed)
        assert all(map(math.isfinite, losses(tmp_path / field)))


def test_a_folder_that_holds_another_training_is_refused(
    undisturbed: Path, tiny_recipe: Recipe, train_options: TrainOptions, tmp_path: Path
) -> None:
    record.prepare_folder(tmp_path, tiny_recipe)
    for begun_or_finished in (tmp_path, undisturbed):
        with pytest.raises(ConfigError, match="holds another training"):
            train(config.replace(tiny_recipe, seed=5), begun_or_finished, train_options)


def test_a_training_on_other_clips_is_neither_returned_nor_continued(
    undisturbed: Path, tiny_recipe: Recipe, clip_folder: Path, tmp_path: Path
) -> None:
    """The identity does not say where the data lies, so the same recipe on another data set must be told apart."""
    other, begun = tmp_path / "clips", tmp_path / "begun"
    shutil.copytree(clip_folder, other)
    next((other / "train").glob("*/0.mp4")).unlink()
    begun.mkdir()
    for name in (record.CONFIG, record.METRICS, record.CHECKPOINT):
        shutil.copy(undisturbed / name, begun)
    for folder in (undisturbed, begun):
        with pytest.raises(ConfigError, match="another data set") as caught:
            train(tiny_recipe, folder, TrainOptions(data_root=other))
        assert "--data-root" in str(caught.value)
    moved = tmp_path / "moved"
    shutil.copytree(clip_folder, moved)
    assert train(tiny_recipe, undisturbed, TrainOptions(data_root=moved)) == record.read_result(undisturbed)
