"""Decisions about GPUs before one is used, tested with simulated devices."""

from __future__ import annotations

import pytest
import ray
import torch

from stadapter import config, recipes
from stadapter.ablation import script
from stadapter.ablation.options import SweepOptions
from stadapter.ablation.prepare import count_gpus, make_resources
from stadapter.cluster.ray_runtime import Cluster
from stadapter.cluster.resources import Resources
from stadapter.model.build import build_model, cast_frozen
from stadapter.model.state import trainable_parameters


def exits(*arguments: str) -> int:
    def make_arm(recipe: config.Recipe, value: str) -> script.Arm:
        return script.Arm(value, {"adapter.bottleneck_width": int(value)})

    with pytest.raises(SystemExit) as caught:
        script.main("Question?", "width", ["8"], make_arm, ["--tracking-uri", "none", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def test_with_gpus_the_default_is_the_papers_recipe_which_asks_for_its_data(
    eight_gpus: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exits() == 2
    error = capsys.readouterr().err
    assert "--data-root" in error
    assert "ssv2" in error


def test_without_gpus_the_paper_recipe_is_not_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert count_gpus(SweepOptions()) == 0


def test_more_gpus_than_there_are_is_refused(eight_gpus: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits("--num-gpus", "9") == 2
    assert "this machine has 8" in capsys.readouterr().err


def test_a_trial_cannot_have_more_gpus_than_the_sweep(eight_gpus: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits("--num-gpus", "2", "--gpus-per-trial", "4") == 2
    assert "more than the 2 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(("per_trial", "at_once"), [(1, 8), (2, 4), (8, 1)])
def test_trials_at_once_are_what_the_gpus_hold(per_trial: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": 8.0})
    assert Cluster(Resources(num_gpus=8, processes_per_trial=per_trial, cpus_per_process=8)).trials_at_once() == at_once


def test_small_trials_share_a_gpu_and_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": 8.0})
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    resources = make_resources(SweepOptions(num_gpus=8, trials_per_gpu=4), num_gpus=8)
    assert resources.cpus_per_process == 2
    assert Cluster(resources).trials_at_once() == 32


def test_trials_that_share_a_gpu_cannot_have_several(eight_gpus: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits("--trials-per-gpu", "2", "--gpus-per-trial", "2") == 2
    assert "--trials-per-gpu 2: not together with --gpus-per-trial 2" in capsys.readouterr().err


def test_few_cores_hold_fewer_trials_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 8.0})
    assert Cluster(Resources(num_gpus=8, cpus_per_process=1)).trials_at_once() == 4


def test_the_papers_model_in_half_precision_keeps_what_is_trained_in_float32() -> None:
    recipe = config.replace(recipes.ssv2_clip_b16, **{"adapter.placement": "before_mhsa"})
    model = build_model(recipe, device="meta")
    cast_frozen(model, torch.float16)
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    halved = sum(p.numel() for p in model.parameters() if p.dtype == torch.float16)
    assert halved > 0.98 * frozen
