"""The output of --plan, before anything starts."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import made_up
import pytest
import torch

from stadapter import config, recipes
from stadapter.ablation.observer import Outcome
from stadapter.ablation.plan.estimate import Work, operations, rate_of
from stadapter.ablation.plan.gpus import GPUS, gpu_named
from stadapter.ablation.plan.memory import Memory, memory_of
from stadapter.ablation.progress import planned_and_taken
from stadapter.config import Recipe
from stadapter.model.build import build_model
from stadapter.model.cost import cost_of
from stadapter.training.hardware import device_name
from stadapter.trials.record import write_result
from stadapter.trials.status import entry
from stadapter.trials.sweep import make_sweep

ROOT = Path(__file__).parents[2]
KERNEL = str(ROOT / "experiments" / "ablate_kernel.py")


def plan(*flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, KERNEL, "--plan", *flags], cwd=cwd, capture_output=True, text=True)


def test_the_papers_recipe_is_planned_on_a_laptop_without_its_data(tmp_path: Path) -> None:
    done = plan("--recipe", "ssv2_clip_b16", "--num-gpus", "8", "--gpu", "v100-16gb", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "8 trials, 8 to run; nothing is started" in done.stdout
    assert "kernel 3x1x1 seed 1" in done.stdout and "13,761,582" in done.stdout
    assert "does not fit" in done.stdout
    assert "hours are for 100,000 training clips" in done.stdout
    assert "V100 data sheet (SXM2)) at 35 % utilisation, an assumption" in done.stdout
    assert os.listdir(tmp_path) == []  # nothing written


def test_a_plan_tells_what_is_done_and_calibrates_on_it(tmp_path: Path) -> None:
    here = device_name(torch.device("cpu"))
    sweep = made_up.kernel_sweep(2)
    made_up.write(sweep, tmp_path / "runs", made_up.KERNEL, leave_out=3)
    for trial in sweep.trials:  # made up as if on this kind of machine
        path = trial.folder(tmp_path / "runs") / "result.json"
        if path.exists():
            text = path.read_text().replace('"precision"', '"processes": 1, "precision"')
            path.write_text(text.replace('"device": "made up"', f'"device": "{here}"'))
    done = plan("--num-gpus", "0", "--recipe", "embedded", "--only", "seed 1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[1].strip(): line for line in done.stdout.splitlines() if "seed" in line}
    assert lines["kernel 1x3x3 seed 1"].endswith("  done")
    assert lines["kernel 3x3x3 seed 1"].endswith("  to do")
    assert lines["kernel 3x3x3 seed 0"].endswith("  done, left out by --only")
    assert "calibrated from 7 finished trials" in done.stdout


def test_a_plan_for_a_gpu_and_without_gpus_is_refused(tmp_path: Path) -> None:
    done = plan("--num-gpus", "0", "--gpu", "a100-80gb", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: --gpu a100-80gb: --num-gpus 0 plans for the CPU; leave one of them out\n"


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24gb"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("Tesla T4", "t4-16gb"),
        ("AMD EPYC", None),
    ],
)
def test_a_gpu_is_known_by_the_drivers_name_for_it(device: str, name: str | None) -> None:
    assert gpu_named(device) == name
    assert name is None or name in GPUS


def test_saved_activations_are_what_autograd_keeps_on_a_real_device(tiny_recipe: Recipe) -> None:
    """The count on meta tensors equals the CPU's, except for the CPU's attention and convolution."""
    model = build_model(tiny_recipe)
    kept: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    T, side = tiny_recipe.data.num_frames, tiny_recipe.data.frame_size
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.run_blocks(torch.zeros(3 * T, 3, side, side), T)
        expected = sum(kept.values())
    del out
    counted = memory_of(tiny_recipe, cost_of(tiny_recipe), 3).activations_most
    assert counted == pytest.approx(expected, rel=0.15)


def test_optimiser_weights_and_gradients_are_counted_exactly(tiny_recipe: Recipe) -> None:
    cost = cost_of(tiny_recipe)
    frozen = cost.total_params - cost.trainable_params
    assert memory_of(tiny_recipe, cost, 1).fixed == 4 * frozen + 16 * cost.trainable_params
    half = config.replace(tiny_recipe, **{"optim.precision": "bfloat16"})
    memory = memory_of(half, cost, 1)
    assert memory.fixed == 2 * frozen + 16 * cost.trainable_params
    assert memory.activations_least < 0.6 * memory.activations_most


def test_the_least_that_is_kept_has_no_attention_weights() -> None:
    """In float32 a kernel keeps its output and a sum per row, in every block but the last, where only CLS attends."""
    recipe = config.replace(recipes.ssv2_clip_b16, **{"optim.precision": "float32"})
    memory = memory_of(recipe, cost_of(recipe), 1)
    frames, heads, tokens, width, blocks = 8, 12, 197, 768, 11
    weights, outputs, sums = heads * tokens**2, tokens * width, heads * 224  # rows in multiples of 32
    difference = memory.activations_most - memory.activations_least
    assert difference == pytest.approx(4 * frames * blocks * (weights - outputs - sums), rel=0.01)


def test_a_plan_that_cannot_be_sure_says_may_not_fit() -> None:
    memory = Memory(fixed=10, activations_most=100, activations_least=50)
    assert [memory.fits(capacity) for capacity in (110, 100, 60, 59)] == [
        "fits",
        "may not fit",
        "may not fit",
        "does not fit",
    ]


def test_a_rate_is_the_operations_of_finished_trials_over_their_seconds(tmp_path: Path) -> None:
    sweep = make_sweep("one", "?", recipes.embedded, [made_up.kernel_sweep().arms[1]], 1)
    (trial,) = sweep.trials
    made_up.write(sweep, tmp_path, made_up.KERNEL)
    result = made_up.result(trial, 90.0, seconds=20.0, processes=2, device=device_name(torch.device("cpu")))
    write_result(trial.folder(tmp_path), result)
    rate, source = rate_of([entry(trial, tmp_path)], trial.recipe, None)
    work = Work(720, 360, 360, True)
    assert rate == pytest.approx(operations(trial.recipe, cost_of(trial.recipe), work) / 20 / 2)
    assert source == "calibrated from 1 finished trials"
    assert rate_of([], trial.recipe, None)[0] is None
    assert rate_of([entry(trial, tmp_path)], trial.recipe, "t4-16gb")[1].endswith("an assumption")
    made_up.write(sweep, tmp_path, made_up.KERNEL)  # on a device that is neither listed nor this CPU
    assert rate_of([entry(trial, tmp_path)], trial.recipe, None)[0] is None
    write_result(trial.folder(tmp_path), result)
    outcome = Outcome(sweep, (result,), (), (trial,), False, tmp_path, (), 36.0)
    assert planned_and_taken(outcome) == "Planned: 0.01 hours for these 1 trials; taken: 0.00556."
    assert planned_and_taken(dataclasses.replace(outcome, records=(None,))) == ""
    assert planned_and_taken(dataclasses.replace(outcome, estimate_s=None)) == ""


def test_a_frozen_backbone_takes_no_weight_gradients() -> None:
    """A frozen backbone computes gradients of activations above the first adapter; full fine-tuning computes both."""
    work = Work(100, 0, 0, True)
    by_strategy = {}
    for strategy in ("linear_probe", "st_adapter", "full"):
        recipe = config.replace(recipes.embedded, strategy=strategy)
        cost = cost_of(recipe)
        by_strategy[strategy] = operations(recipe, cost, work) / (2 * cost.macs_per_view * 100 * recipe.optim.epochs)
    assert by_strategy["linear_probe"] == pytest.approx(1, abs=0.01)
    assert by_strategy["st_adapter"] == pytest.approx(2, abs=0.1)
    assert by_strategy["full"] == pytest.approx(3, abs=0.01)
